// SPDX-License-Identifier: Apache-2.0
// The portable kernels: the compiler's baseline of this architecture.
#include "attend_kernel.h"
#include "isa_portable.h"

namespace attn_offload {

const KernelTable* portable_kernels() {
  static const KernelTable table = {"portable", run_kernel<Portable, false>, save_rows,
                                    merge_partials, read_all<Portable>};
  return &table;
}

const KernelTable* portable_pairs_kernels() {
  static const KernelTable table = {"portable-pairs", run_kernel<Portable, true>,
                                    save_rows, merge_partials, read_all<Portable>};
  return &table;
}

}  // namespace attn_offload
