// SPDX-License-Identifier: Apache-2.0
// Data shared by the planner, the store and the kernels. Plain structs and static
// functions only: each ISA compiles its own copy, and none may leak into another.
#ifndef ATTN_OFFLOAD_TYPES_H_
#define ATTN_OFFLOAD_TYPES_H_

#include <stdint.h>

#include "abi.h"

namespace attn_offload {

constexpr int kTile = 16;       // tokens of a K panel, columns of a V panel
constexpr int kMacroTiles = 4;  // tiles that share one softmax update
constexpr int kMacroTokens = kTile * kMacroTiles;
constexpr int kMaxRows = 32;  // query rows (positions x heads) of one piece
constexpr int kMaxHeadSize = 576;
// Kernels read fp8 elements as if they were 2^-8 times as large: then an element needs
// no more than its bits shifted to be a half.
constexpr float kFp8Unit = 256.0f;

struct Geometry {
  int64_t num_blocks;
  int32_t block_size;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t v_head_size;
  int32_t v_columns;  // v_head_size rounded up to whole panels
  int32_t dtype;
  int64_t k_tile_bytes;
  int64_t v_tile_bytes;  // a tile's values follow its keys
  int64_t head_bytes;    // one KV head's tiles within a block
  int64_t block_bytes;
  int64_t block_stride;
};

// Tokens [position, position + length) of a request, at the start of a block.
struct BlockRef {
  int32_t block;
  int32_t position;
  int32_t length;
};

struct SequenceRef {
  int32_t query_begin;  // row in the query tensor
  int32_t query_len;
  int32_t position;  // of the first query row
};

// Rows of one KV head of one request. Row r is query position r / group, head
// r % group of the KV head's group.
struct Rows {
  int32_t sequence;
  int32_t kv_head;
  int32_t row_begin;
  int32_t row_count;
};

// Rows against a range of the request's blocks; the unit of work.
struct Piece {
  Rows rows;
  int32_t block_begin;
  int32_t block_end;
  int32_t partial;  // where a split piece leaves its state, else -1
  int32_t merge;    // the merge it takes part in, else -1
};

// Pieces [piece, piece_end) that one thread works on, and where it is.
struct Span {
  int32_t piece;
  int32_t piece_end;
  bool is_begun;  // `piece` goes on at `block`, `token`: its state is in the scratch
  int32_t block;
  int32_t token;
  const float* state;  // of a begun piece that left the scratch, else null
};

struct Merge {
  Rows rows;
  int32_t first_partial;
  int32_t num_partials;
};

// What the kernels need of a planned step and of one layer's call.
struct Job {
  const Geometry* geometry;
  const AoAttendInput* input;
  const SequenceRef* sequences;
  const BlockRef* blocks;
  const Piece* pieces;
  float* partials;  // [num_partials, partial_stride]
  int64_t partial_stride;
  int32_t num_query_heads;
  int32_t group;           // query heads per KV head
  int32_t sliding_window;  // 0: none
  float score_scale;       // turns a product with what is read of keys into a score
  float value_scale;       // turns a sum of what is read of values into an output
};

struct alignas(64) Scratch {
  float query[kMaxRows * kMaxHeadSize];
  float out[kMaxRows * kMaxHeadSize];
  float scores[kMaxRows * kMacroTokens];
  uint32_t query_pairs[kMaxRows * kMaxHeadSize / 2];  // bf16, low half first
  uint32_t score_pairs[kMaxRows * kMacroTokens / 2];
  uint16_t halves[kMacroTokens * kMaxHeadSize];  // panels of an fp8 cache, expanded
  float row_max[kMaxRows];
  float row_sum[kMaxRows];
  float rescale[kMaxRows];
};

struct KernelTable {
  const char* name;
  // Works on the span until its end, or until about `work` (cache elements times rows)
  // is done. It is finished when span->piece == span->piece_end.
  void (*run)(const Job& job, int64_t work, Span* span, Scratch* scratch);
  // Copies the rows' state, state_floats() at most, out of the scratch.
  void (*save)(const Job& job, const Rows& rows, const Scratch* scratch, float* state);
  void (*merge)(const Job& job, const Merge& merge, Scratch* scratch);
  float (*read)(const char* data, int64_t bytes);
};

const KernelTable* portable_kernels();
const KernelTable* portable_pairs_kernels();
#if defined(__x86_64__)
const KernelTable* avx2_kernels();
const KernelTable* avx2_pairs_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable* avx512_bf16_shifts_kernels();
const KernelTable* avx512_vbmi_kernels();
#endif

static inline int32_t element_bytes(int32_t dtype) {
  return dtype == AO_FP32 ? 4 : dtype == AO_FP8_E4M3 ? 1 : 2;
}

static inline int32_t clamp(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : x > high ? high : x;
}

// A row's maximum, sum and unnormalised output, for kMaxRows rows.
static inline int64_t state_floats(const Geometry& geometry) {
  return int64_t{kMaxRows} * (geometry.v_columns + 2);
}

// Keys that a row of a request may see: positions [begin, end).
struct Visible {
  int32_t begin;
  int32_t end;
};

static inline Visible visible_keys(const SequenceRef& sequence, int32_t query_index,
                                   int32_t window) {
  const int32_t position = sequence.position + query_index;
  const int32_t begin = window > 0 ? position - window + 1 : 0;
  return {begin > 0 ? begin : 0, position + 1};
}

}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_TYPES_H_
