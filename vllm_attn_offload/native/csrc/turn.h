// SPDX-License-Identifier: Apache-2.0
#ifndef ATTN_OFFLOAD_TURN_H_
#define ATTN_OFFLOAD_TURN_H_

#include "abi.h"

namespace attn_offload {

inline bool change_turn(int32_t* turn, int32_t from, int32_t to) {
  return __atomic_compare_exchange_n(turn, &from, to, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED);
}

}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_TURN_H_
