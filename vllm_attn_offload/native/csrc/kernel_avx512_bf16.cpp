// SPDX-License-Identifier: Apache-2.0
// The AVX-512 kernels with vdpbf16ps for bf16 and fp8 caches. "avx512-bf16-shifts" is
// what CPUs without AVX512_VBMI get, by a name for tests.
#if defined(__x86_64__)
// Before the target changes: nothing from a system header may be compiled for AVX-512.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "target.h"
#define ATTN_OFFLOAD_AVX512_BF16
ATTN_OFFLOAD_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "attend_kernel.h"
#include "isa_avx512.h"

namespace attn_offload {

const KernelTable* avx512_bf16_kernels() {
  static const KernelTable table = {"avx512-bf16", run_kernel<Avx512, true>, save_rows,
                                    merge_partials, read_all<Avx512>};
  return &table;
}

const KernelTable* avx512_bf16_shifts_kernels() {
  static const KernelTable table = {"avx512-bf16-shifts", run_kernel<Avx512, true>,
                                    save_rows, merge_partials, read_all<Avx512>};
  return &table;
}

}  // namespace attn_offload
ATTN_OFFLOAD_TARGET_END
#endif
