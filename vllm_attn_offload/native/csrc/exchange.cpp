// SPDX-License-Identifier: Apache-2.0
// A layer of a worker: rows out, output in, in one call.
#include <string.h>

#include "channel.h"
#include "pool.h"

namespace attn_offload {
namespace {

// Rows q | k | v, as a fused projection leaves them; then they are copied at once.
void pack(const AoExchange& call, char* payload) {
  const int64_t q = call.q_bytes, k = call.k_bytes, v = call.v_bytes;
  if (call.key == nullptr) {
    for (int64_t row = 0; row < call.num_rows; ++row)
      memcpy(payload + row * q, call.query + row * call.query_stride, size_t(q));
    return;
  }
  const int64_t width = q + k + v;
  if (call.key == call.query + q && call.value == call.key + k &&
      call.query_stride == width && call.key_stride == width &&
      call.value_stride == width) {
    memcpy(payload, call.query, size_t(call.num_rows * width));
    return;
  }
  for (int64_t row = 0; row < call.num_rows; ++row, payload += width) {
    memcpy(payload, call.query + row * call.query_stride, size_t(q));
    memcpy(payload + q, call.key + row * call.key_stride, size_t(k));
    memcpy(payload + q + k, call.value + row * call.value_stride, size_t(v));
  }
}

// Milliseconds that are left of a wait which an interruption may cut in pieces.
int32_t left_ms(AoExchange* call, int32_t timeout_ms) {
  const int64_t now = now_ns();
  if (call->deadline_ns == 0) call->deadline_ns = now + int64_t{timeout_ms} * 1000000;
  const int64_t left = call->deadline_ns - now;
  return left <= 0 ? 0 : int32_t((left + 999999) / 1000000);
}

int32_t send(AoExchange* call) {
  AoChannel& channel = *call->channel;
  const int64_t begun = now_ns();
  const int32_t status = ao_channel_take(&channel, left_ms(call, call->take_ms));
  if (status != AO_WAIT_INTERRUPTED) call->deadline_ns = 0;
  if (status != AO_WAIT_READY) return status;
  AoFrame& frame = channel.outgoing;
  int64_t row_bytes = call->q_bytes;
  if (call->key != nullptr) row_bytes += int64_t{call->k_bytes} + call->v_bytes;
  frame = {AO_FRAME_MAGIC,
           AO_FRAME_LAYER,
           uint16_t(call->layer),
           call->step,
           uint16_t(call->micro_batch),
           0,
           call->key == nullptr ? 0u : uint32_t(AO_FLAG_FUSED),
           uint64_t(call->num_rows * row_bytes)};
  if (frame.num_bytes > uint64_t(channel.out.slot_bytes)) return AO_FRAME_TOO_LONG;
  const int64_t taken = now_ns();
  pack(*call, slot_of(channel.out, channel.taken));
  const int64_t packed = now_ns();
  ao_channel_send(&channel);
  call->is_sent = 1;
  call->packed_ns = packed - taken;
  call->sent_ns = now_ns() - begun - call->packed_ns;
  return AO_WAIT_READY;
}

}  // namespace
}  // namespace attn_offload

using namespace attn_offload;

extern "C" int32_t ao_exchange(AoExchange* call, int32_t) {
  if (!call->is_sent) {
    const int32_t status = send(call);
    if (status != AO_WAIT_READY) return status;
  }
  AoChannel& channel = *call->channel;
  const int32_t status =
      ao_channel_receive(&channel, left_ms(call, call->answer_ms));
  if (status != AO_WAIT_INTERRUPTED) call->deadline_ns = 0;
  if (status != AO_WAIT_READY) return status;
  const AoFrame& frame = channel.frame;
  if (frame.kind != AO_FRAME_OUT || frame.layer != call->layer ||
      frame.flags & AO_FLAG_ON_DEVICE ||
      frame.num_bytes != uint64_t(call->out_bytes))
    return AO_EXCHANGE_OTHER;
  memcpy(call->out, slot_of(channel.in, channel.current), size_t(call->out_bytes));
  return AO_WAIT_READY;
}
