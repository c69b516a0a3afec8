// SPDX-License-Identifier: Apache-2.0
// The geometry of one cache and the kernels chosen for it.
#ifndef ATTN_OFFLOAD_CACHE_H_
#define ATTN_OFFLOAD_CACHE_H_

#include "types.h"

struct AoCache {
  attn_offload::Geometry geometry;
  const attn_offload::KernelTable* kernels;
};

#endif  // ATTN_OFFLOAD_CACHE_H_
