// SPDX-License-Identifier: Apache-2.0
// Waiting without the GIL: for a counter in shared memory, and for bytes of a socket.
//
// A waiter that blocks announces it and then looks at the counter once more; a poster
// moves the counter and then looks for the announcement. All four are sequentially
// consistent, so one of the two sees the other and no wake-up is lost.
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "abi.h"
#include "pool.h"

namespace attn_offload {
namespace {

// A peer that is slower than 1 MB/s on average is as good as silent; as in streams.py.
constexpr int64_t kSlowestNsPerByte = 1000;
constexpr short kSocketEvents = POLLIN | POLLRDHUP;

// Poll's milliseconds, rounded up so that a deadline is never polled for in a loop.
int remaining_ms(int64_t deadline_ns) {
  if (deadline_ns < 0) return -1;
  const int64_t left = deadline_ns - now_ns();
  if (left <= 0) return 0;
  const int64_t ms = (left + 999999) / 1000000;
  return ms > INT32_MAX ? INT32_MAX : int(ms);
}

int64_t deadline_of(int64_t started_ns, int32_t timeout_ms) {
  return timeout_ms < 0 ? -1 : started_ns + int64_t{timeout_ms} * 1000000;
}

// Spinning pays only where waits are short; the last one foretells the next. Twice the
// spin, because a wait that blocked includes its wake-up.
int64_t spin_for(int64_t spin_ns, int64_t last_wait_ns) {
  return last_wait_ns <= 2 * spin_ns ? spin_ns : 0;
}

bool has_reached_target(AoSignal* signal) {
  signal->seen = __atomic_load_n(signal->counter, __ATOMIC_SEQ_CST);
  return signal->seen >= signal->target;
}

void drain(int32_t doorbell) {
  uint64_t rings;
  while (read(doorbell, &rings, sizeof rings) < 0 && errno == EINTR) {
  }
}

int32_t block_on_signal(AoSignal* signal, int64_t deadline_ns) {
  pollfd polled[2] = {{signal->doorbell, POLLIN, 0},
                      {signal->socket, kSocketEvents, 0}};
  while (true) {
    __atomic_store_n(signal->is_waiting, 1, __ATOMIC_SEQ_CST);
    if (has_reached_target(signal)) return AO_WAIT_READY;
    const int timeout_ms = remaining_ms(deadline_ns);
    const int count = poll(polled, 2, timeout_ms);
    if (has_reached_target(signal)) return AO_WAIT_READY;
    if (count < 0) return errno == EINTR ? AO_WAIT_INTERRUPTED : AO_WAIT_CLOSED;
    if (polled[1].revents) return AO_WAIT_CLOSED;
    if (polled[0].revents & ~POLLIN) return AO_WAIT_CLOSED;
    if (polled[0].revents) drain(signal->doorbell);
    // Also where the peer rings without end.
    if (timeout_ms >= 0 && remaining_ms(deadline_ns) == 0) return AO_WAIT_TIMED_OUT;
  }
}

// Takes what is there without blocking; READY once the buffer is full.
int32_t take(AoReceive* call) {
  while (call->received < call->num_bytes) {
    const ssize_t count = recv(call->socket, call->data + call->received,
                               size_t(call->num_bytes - call->received), MSG_DONTWAIT);
    if (count == 0) return AO_WAIT_CLOSED;
    if (count > 0) {
      call->received += count;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return AO_WAIT_TIMED_OUT;
    } else if (errno != EINTR) {
      call->error = errno;
      return AO_WAIT_FAILED;
    }
  }
  call->received = 0;
  return AO_WAIT_READY;
}

// Of two deadlines; a negative one never comes.
int64_t earlier(int64_t a, int64_t b) { return a < 0 || (b >= 0 && b < a) ? b : a; }

int32_t block_on_socket(AoReceive* call, int64_t deadline_ns) {
  pollfd polled = {call->socket, POLLIN, 0};
  const int timeout_ms = remaining_ms(deadline_ns);
  const int count = poll(&polled, 1, timeout_ms);
  if (count > 0) return AO_WAIT_READY;
  if (count == 0) return AO_WAIT_TIMED_OUT;
  call->error = errno;
  return errno == EINTR ? AO_WAIT_INTERRUPTED : AO_WAIT_FAILED;
}

int32_t receive(AoReceive* call, int32_t timeout_ms) {
  const int64_t started = now_ns();
  const int64_t transfer_ns = call->num_bytes * kSlowestNsPerByte;
  int64_t pause_end =
      deadline_of(started, call->received ? call->stall_ms : timeout_ms);
  if (call->deadline_ns == 0 && timeout_ms >= 0)
    call->deadline_ns = deadline_of(started, timeout_ms) + transfer_ns;
  int64_t spin_ns = spin_for(call->spin_ns, call->last_wait_ns);
  while (true) {
    const int64_t before = call->received;
    int32_t status = AO_WAIT_TIMED_OUT;
    spin_until(spin_ns, [&] {
      status = take(call);
      return status != AO_WAIT_TIMED_OUT || call->received > before;
    });
    const bool has_progress = status == AO_WAIT_READY || call->received > before;
    if (has_progress) {
      const int64_t now = now_ns();
      // The wait is for the first bytes; what follows shows the link's speed.
      if (before == 0) call->last_wait_ns = now - started;
      pause_end = deadline_of(now, call->stall_ms);
      if (call->deadline_ns == 0) call->deadline_ns = pause_end + transfer_ns;
    }
    if (status != AO_WAIT_TIMED_OUT) return status;
    const int64_t whole_end = call->deadline_ns == 0 ? -1 : call->deadline_ns;
    if (call->received > 0 && remaining_ms(whole_end) == 0) {
      call->error = ETIMEDOUT;
      return AO_WAIT_TIMED_OUT;
    }
    if (has_progress && spin_ns > 0) continue;
    status = block_on_socket(call, earlier(pause_end, whole_end));
    if (status == AO_WAIT_TIMED_OUT && remaining_ms(pause_end) != 0) continue;
    if (status != AO_WAIT_READY) return status;
    spin_ns = 0;
  }
}

}  // namespace
}  // namespace attn_offload

using namespace attn_offload;

extern "C" {

int32_t ao_signal_wait(AoSignal* signal, int32_t timeout_ms) {
  if (has_reached_target(signal)) return AO_WAIT_READY;
  const int64_t started = now_ns();
  int32_t status = AO_WAIT_READY;
  if (!spin_until(spin_for(signal->spin_ns, signal->last_wait_ns),
                  [=] { return has_reached_target(signal); })) {
    status = block_on_signal(signal, deadline_of(started, timeout_ms));
    __atomic_store_n(signal->is_waiting, 0, __ATOMIC_SEQ_CST);
  }
  if (status == AO_WAIT_READY) signal->last_wait_ns = now_ns() - started;
  return status;
}

int32_t ao_receive(AoReceive* call, int32_t timeout_ms) {
  call->error = 0;
  const int32_t status = receive(call, timeout_ms);
  if (status != AO_WAIT_INTERRUPTED) call->deadline_ns = 0;
  return status;
}

void ao_signal_post(AoSignal* signal) {
  __atomic_store_n(signal->counter, ++signal->posted, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(signal->is_waiting, __ATOMIC_SEQ_CST) == 0) return;
  if (__atomic_exchange_n(signal->is_waiting, 0, __ATOMIC_SEQ_CST) == 0) return;
  const uint64_t ring = 1;
  while (write(signal->doorbell, &ring, sizeof ring) < 0 && errno == EINTR) {
  }
}
}
