// SPDX-License-Identifier: Apache-2.0
// The word of memory_node/fair_lock.py, for those who take turns without the GIL.
#include "turn.h"

extern "C" {

int32_t ao_turn_take(int32_t* turn) { return attn_offload::change_turn(turn, 0, 1); }

int32_t ao_turn_ask(int32_t* turn) {
  while (true) {
    if (attn_offload::change_turn(turn, 1, 2)) return 1;
    const int32_t value = __atomic_load_n(turn, __ATOMIC_ACQUIRE);
    if (value != 1) return value == 2;
  }
}

void ao_turn_set(int32_t* turn, int32_t value) {
  __atomic_store_n(turn, value, __ATOMIC_RELEASE);
}
}
