// SPDX-License-Identifier: Apache-2.0
#ifndef ATTN_OFFLOAD_CHANNEL_H_
#define ATTN_OFFLOAD_CHANNEL_H_

#include "abi.h"

namespace attn_offload {

char* slot_of(const AoRing& ring, int32_t slot);

}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_CHANNEL_H_
