// SPDX-License-Identifier: Apache-2.0
// The AVX2 kernels. "avx2-pairs" emulates vdpbf16ps, so that the AVX-512-BF16 path's
// rounding and packing run in tests on any x86 CPU.
#if defined(__x86_64__)
// Before the target changes: nothing from a system header may be compiled for AVX2.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "target.h"
ATTN_OFFLOAD_TARGET("avx2,fma,f16c")
#include "attend_kernel.h"
#include "isa_avx2.h"

namespace attn_offload {

const KernelTable* avx2_kernels() {
  static const KernelTable table = {"avx2", run_kernel<Avx2, false>, save_rows,
                                    merge_partials, read_all<Avx2>};
  return &table;
}

const KernelTable* avx2_pairs_kernels() {
  static const KernelTable table = {"avx2-pairs", run_kernel<Avx2, true>, save_rows,
                                    merge_partials, read_all<Avx2>};
  return &table;
}

}  // namespace attn_offload
ATTN_OFFLOAD_TARGET_END
#endif
