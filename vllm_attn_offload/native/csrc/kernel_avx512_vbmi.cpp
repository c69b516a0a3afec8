// SPDX-License-Identifier: Apache-2.0
// The AVX-512-BF16 kernels of CPUs with AVX512_VBMI: those for fp8 caches are others.
#if defined(__x86_64__)
// Before the target changes: nothing from a system header may be compiled for AVX-512.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "target.h"
#define ATTN_OFFLOAD_AVX512_BF16
#define ATTN_OFFLOAD_AVX512_VBMI
ATTN_OFFLOAD_TARGET(
    "avx512vbmi,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "attend_kernel.h"
#include "isa_avx512.h"

namespace attn_offload {
namespace {

void run(const Job& job, int64_t work, Span* span, Scratch* scratch) {
  if (job.geometry->dtype == AO_FP8_E4M3 && job.input->query_dtype == AO_BF16)
    return AttendKernel<Avx512, Fp8Pairs>::run(job, work, span, scratch);
  avx512_bf16_kernels()->run(job, work, span, scratch);
}

}  // namespace

const KernelTable* avx512_vbmi_kernels() {
  static const KernelTable table = {"avx512-bf16", run, save_rows, merge_partials,
                                    read_all<Avx512>};
  return &table;
}

}  // namespace attn_offload
ATTN_OFFLOAD_TARGET_END
#endif
