// SPDX-License-Identifier: Apache-2.0
// Compiles what follows for other instructions than the rest of the library, so that
// one set of compiler flags serves every source file.
#ifndef ATTN_OFFLOAD_TARGET_H_
#define ATTN_OFFLOAD_TARGET_H_

#define ATTN_OFFLOAD_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define ATTN_OFFLOAD_TARGET(isa) \
  ATTN_OFFLOAD_PRAGMA(           \
      clang attribute push(__attribute__((target(isa))), apply_to = function))
#define ATTN_OFFLOAD_TARGET_END ATTN_OFFLOAD_PRAGMA(clang attribute pop)
#else
#define ATTN_OFFLOAD_TARGET(isa) ATTN_OFFLOAD_PRAGMA(GCC target(isa))
#define ATTN_OFFLOAD_TARGET_END
#endif

#endif  // ATTN_OFFLOAD_TARGET_H_
