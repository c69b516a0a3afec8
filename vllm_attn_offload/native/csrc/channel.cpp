// SPDX-License-Identifier: Apache-2.0
// Frames through slots of shared memory: who has which slot, and the headers.
//
// What the peer can write is read once, and checked then: it may lie about everything,
// and change it at any time.
#include "channel.h"

#include <string.h>

namespace attn_offload {
namespace {

constexpr int64_t kPlaceBytes = 64;

char* place_of(const AoRing& ring, uint64_t frame, int32_t num_slots) {
  return ring.headers + int64_t(frame % uint64_t(num_slots)) * kPlaceBytes;
}

// A peer that counts wrongly frees no slot but those in use.
void note_freed(AoChannel* channel, uint64_t num_freed) {
  while (channel->num_freed < num_freed && channel->num_held > 0) {
    channel->free_slots[channel->num_free++] = channel->held_slots[channel->first_held];
    channel->first_held = (channel->first_held + 1) % channel->num_slots;
    --channel->num_held;
    ++channel->num_freed;
  }
}

}  // namespace

char* slot_of(const AoRing& ring, int32_t slot) {
  return ring.slots + slot * ring.slot_stride;
}

}  // namespace attn_offload

using namespace attn_offload;

extern "C" {

int32_t ao_channel_take(AoChannel* channel, int32_t timeout_ms) {
  if (channel->taken >= 0) return AO_WAIT_READY;
  // Writes to a slot depend on this read: no processor moves them before it.
  note_freed(channel, __atomic_load_n(channel->freed.counter, __ATOMIC_SEQ_CST));
  if (channel->num_free == 0) {
    channel->freed.target = channel->num_freed + 1;
    const int32_t status = ao_signal_wait(&channel->freed, timeout_ms);
    if (status != AO_WAIT_READY) return status;
    note_freed(channel, channel->freed.target);
  }
  // The slot that was freed last is still in the caches.
  channel->taken = channel->free_slots[--channel->num_free];
  return AO_WAIT_READY;
}

void ao_channel_send(AoChannel* channel) {
  const int32_t slot = channel->taken;
  char* place = place_of(channel->out, channel->num_sent, channel->num_slots);
  memcpy(place, &channel->outgoing, sizeof channel->outgoing);
  memcpy(place + sizeof channel->outgoing, &slot, sizeof slot);
  const int32_t end = channel->first_held + channel->num_held;
  channel->held_slots[end % channel->num_slots] = slot;
  ++channel->num_held;
  channel->taken = -1;
  ++channel->num_sent;
  ao_signal_post(&channel->sent);
}

int32_t ao_channel_receive(AoChannel* channel, int32_t timeout_ms) {
  if (channel->current >= 0) {
    channel->current = -1;
    ao_signal_post(&channel->released);
  }
  AoSignal& received = channel->received;
  const uint64_t target = channel->num_received + 1;
  if (received.seen < target) {
    received.target = target;
    const int32_t status = ao_signal_wait(&received, timeout_ms);
    if (status != AO_WAIT_READY) return status;
    if (received.seen >= target + uint64_t(channel->num_slots))
      return AO_FRAME_OVERRUN;
  }
  const char* place = place_of(channel->in, channel->num_received, channel->num_slots);
  uint32_t slot;
  memcpy(&channel->frame, place, sizeof channel->frame);
  memcpy(&slot, place + sizeof channel->frame, sizeof slot);
  // No compiler may read shared memory once more in place of these copies.
  asm volatile("" : "+r"(slot) : : "memory");
  if (slot >= uint32_t(channel->num_slots) || channel->frame.magic != AO_FRAME_MAGIC)
    return AO_FRAME_MALFORMED;
  channel->num_received = target;
  channel->current = int32_t(slot);
  if (channel->frame.num_bytes > uint64_t(channel->in.slot_bytes))
    return AO_FRAME_TOO_LONG;
  return AO_WAIT_READY;
}
}
