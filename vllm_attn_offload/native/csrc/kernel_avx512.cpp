// SPDX-License-Identifier: Apache-2.0
// The AVX-512 kernels without AVX512_BF16: bf16 is widened.
#if defined(__x86_64__)
// Before the target changes: nothing from a system header may be compiled for AVX-512.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "target.h"
ATTN_OFFLOAD_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "attend_kernel.h"
#include "isa_avx512.h"

namespace attn_offload {

const KernelTable* avx512_kernels() {
  static const KernelTable table = {"avx512", run_kernel<Avx512, false>, save_rows,
                                    merge_partials, read_all<Avx512>};
  return &table;
}

}  // namespace attn_offload
ATTN_OFFLOAD_TARGET_END
#endif
