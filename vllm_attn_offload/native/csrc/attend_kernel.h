// SPDX-License-Identifier: Apache-2.0
// Paged decode attention for one ISA: scores of a macro tile (64 tokens), softmax,
// values. While the keys of a macro tile are read its values are prefetched, while the
// values are read the keys of the next one are.
#ifndef ATTN_OFFLOAD_ATTEND_KERNEL_H_
#define ATTN_OFFLOAD_ATTEND_KERNEL_H_

#include "panels.h"
#include "rows.h"
#include "softmax.h"
#include "tile_cursor.h"
#include "types.h"

namespace attn_offload {
namespace {

template <class I, class F>
class AttendKernel {
  using Vec = typename I::Vec;
  using Left = typename F::Left;
  static constexpr int kVectors = kTile / I::kLanes;
  static constexpr int kTileSteps = kTile / F::kElements;
  static constexpr int kPanelBytes = kTileSteps * kStepBytes;  // of a V panel
  static constexpr int kCachePanelBytes = F::kExpands ? kPanelBytes / 2 : kPanelBytes;
  // Elements of Left that hold one token's probability, or one query dimension.
  static constexpr int kPacked = F::kPairs ? 2 : 1;

 public:
  static void run(const Job& job, int64_t work, Span* span, Scratch* scratch) {
    TileCursor cursor(job, *span);
    MacroTile macros[2];
    int current = 0;
    bool is_begun = span->is_begun;
    if (span->state != nullptr) {
      begin_rows(job, job.pieces[span->piece].rows, F::kPairs, scratch);
      restore_rows(job, job.pieces[span->piece].rows, span->state, scratch);
    }
    for (bool more = cursor.next(&macros[0]); more; current ^= 1) {
      const MacroTile& macro = macros[current];
      MacroTile& next = macros[current ^ 1];
      more = cursor.next(&next);
      if (!more) next.count = 0;
      const Piece& piece = job.pieces[macro.piece];
      if (!is_begun) begin_rows(job, piece.rows, F::kPairs, scratch);
      if (macro.count > 0) AttendKernel(job, piece.rows, scratch).attend(macro, next);
      if (macro.is_last && piece.partial >= 0) {
        save_rows(job, piece.rows, scratch, partial_at(job, piece.partial));
      } else if (macro.is_last) {
        finish_rows(job, piece.rows, scratch);
      }
      is_begun = !macro.is_last;
      work -= macro_work(job, macro);
      if (work <= 0 && more) {
        *span = {next.piece, span->piece_end, is_begun,
                 next.block, next.token,      nullptr};
        return;
      }
    }
    span->piece = span->piece_end;
  }

 private:
  // Two rows more for loading the tiles, a tile more for reading and writing the rows.
  static int64_t macro_work(const Job& job, const MacroTile& macro) {
    const int64_t rows = job.pieces[macro.piece].rows.row_count + 2;
    return rows * (macro.count + 1) * kTile *
           (job.geometry->head_size + job.geometry->v_columns);
  }

  AttendKernel(const Job& job, const Rows& rows, Scratch* scratch)
      : job_(job), rows_(rows), scratch_(scratch) {}

  void attend(const MacroTile& macro, const MacroTile& next) {
    if constexpr (F::kExpands) {
      MacroTile expanded = macro;
      expand(&Tile::k, job_.geometry->k_tile_bytes, &expanded);
      attend_keys(expanded, next);
      expand(&Tile::v, job_.geometry->v_tile_bytes, &expanded);
      attend_values(expanded, next);
    } else {
      attend_keys(macro, next);
      attend_values(macro, next);
    }
  }

  void attend_keys(const MacroTile& macro, const MacroTile& next) {
    for_row_groups([&](auto rows, int first) {
      score<decltype(rows)::kRows>(first, macro, next);
    });
    softmax_rows<I>(job_, rows_, macro, scratch_);
    if constexpr (F::kPairs) pack_scores(macro.count * kTile);
  }

  void attend_values(const MacroTile& macro, const MacroTile& next) {
    for_row_groups([&](auto rows, int first) {
      add_values<decltype(rows)::kRows>(first, macro, next);
    });
  }

  // Points the tiles' keys or values to their halves in the scratch.
  void expand(const char* Tile::* panels, int64_t tile_bytes, MacroTile* macro) {
    char* target = reinterpret_cast<char*>(scratch_->halves);
    for (int t = 0; t < macro->count; ++t, target += 2 * tile_bytes) {
      const char* source = macro->tiles[t].*panels;
      for (int64_t i = 0; i < tile_bytes; i += 32)
        I::expand_fp8(source + i, target + 2 * i);
      macro->tiles[t].*panels = target;
    }
  }

  template <int M>
  struct RowCount {
    static constexpr int kRows = M;
  };

  // Calls body(RowCount<M>, first row) for groups of almost equal size.
  template <class Body>
  void for_row_groups(Body body) {
    const int count = rows_.row_count;
    const int groups = (count + I::kMaxRowGroup - 1) / I::kMaxRowGroup;
    for (int group = 0; group < groups; ++group) {
      const int first = count * group / groups;
      dispatch<1>(count * (group + 1) / groups - first, first, body);
    }
  }

  template <int M, class Body>
  static void dispatch(int rows, int first, Body& body) {
    if constexpr (M < I::kMaxRowGroup) {
      if (rows > M) return dispatch<M + 1>(rows, first, body);
    }
    body(RowCount<M>{}, first);
  }

  const Left* query(int row) const {
    const int stride = job_.geometry->head_size / kPacked;
    if constexpr (F::kPairs)
      return scratch_->query_pairs + row * stride;
    else
      return scratch_->query + row * stride;
  }

  const Left* probabilities(int row) const {
    const int stride = kMacroTokens / kPacked;
    if constexpr (F::kPairs)
      return scratch_->score_pairs + row * stride;
    else
      return scratch_->scores + row * stride;
  }

  void pack_scores(int count) {
    for (int r = 0; r < rows_.row_count; ++r) {
      const float* scores = scratch_->scores + r * kMacroTokens;
      uint32_t* pairs = scratch_->score_pairs + r * (kMacroTokens / 2);
      for (int i = 0; i < count / 2; ++i)
        pairs[i] = to_bf16(scores[2 * i]) | to_bf16(scores[2 * i + 1]) << 16;
    }
  }

  template <int M>
  void score(int first, const MacroTile& macro, const MacroTile& next) {
    constexpr int P = I::panels_at_once(M);
    int t = 0;
    for (; t + P <= macro.count; t += P) score_tiles<M, P>(first, macro, next, t);
    for (; t < macro.count; ++t) score_tiles<M, 1>(first, macro, next, t);
  }

  template <int M, int P>
  __attribute__((noinline)) void score_tiles(int first, const MacroTile& macro,
                                             const MacroTile& next, int t) {
    const int stride = job_.geometry->head_size / kPacked;
    const char* panels[P];
    const char* ahead[P];
    for (int p = 0; p < P; ++p) {
      panels[p] = macro.tiles[t + p].k;
      ahead[p] = t + p < next.count ? next.tiles[t + p].k : panels[p];
    }
    Vec sum[M][P * kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v) sum[m][v] = I::zero();
    panel_dot<I, F, M, P>(sum, query(first), stride, panels, ahead,
                          job_.geometry->head_size / F::kElements);
    float* scores = scratch_->scores + first * kMacroTokens + t * kTile;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v)
        I::store(scores + m * kMacroTokens + v * I::kLanes, sum[m][v]);
  }

  template <int M>
  void add_values(int first, const MacroTile& macro, const MacroTile& next) {
    constexpr int P = I::panels_at_once(M);
    const int panels = job_.geometry->v_columns / kTile;
    int c = 0;
    for (; c + P <= panels; c += P) add_columns<M, P>(first, macro, next, c);
    for (; c < panels; ++c) add_columns<M, 1>(first, macro, next, c);
  }

  // out[rows][P panels of columns from panel c] of every tile.
  template <int M, int P>
  __attribute__((noinline)) void add_columns(int first, const MacroTile& macro,
                                             const MacroTile& next, int c) {
    const int columns = job_.geometry->v_columns;
    float* out = scratch_->out + int64_t{first} * columns + c * kTile;
    Vec sum[M][P * kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec rescale = I::set1(scratch_->rescale[first + m]);
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v)
        sum[m][v] = I::mul(I::load(out + m * columns + v * I::kLanes), rescale);
    }
    for (int t = 0; t < macro.count; ++t) {
      const Tile& tile = macro.tiles[t];
      const char* panels[P];
      const char* ahead[P];
      for (int p = 0; p < P; ++p) {
        panels[p] = tile.v + int64_t{c + p} * kPanelBytes;
        ahead[p] = value_ahead(next, c * macro.count + t * P + p, panels[p]);
      }
      const Left* left = probabilities(first) + t * (kTile / kPacked);
      const int stride = kMacroTokens / kPacked;
      if (tile.begin == 0 && tile.end == kTile) {
        panel_dot<I, F, M, P>(sum, left, stride, panels, ahead, kTileSteps);
      } else {
        panel_dot_range<I, F, M, P>(sum, left, stride, panels, tile.begin, tile.end);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v)
        I::store(out + m * columns + v * I::kLanes, sum[m][v]);
  }

  // The index-th V panel of the next macro tile in the order of memory, which suits
  // the hardware prefetcher better than the order of use.
  const char* value_ahead(const MacroTile& next, int index, const char* none) const {
    const int panels = job_.geometry->v_columns / kTile;
    const int tile = index / panels;
    if (tile >= next.count) return none;
    return next.tiles[tile].v + int64_t{index % panels} * kCachePanelBytes;
  }

  const Job& job_;
  const Rows& rows_;
  Scratch* const scratch_;
};

// A plain sum of all floats: the read bound that benchmarks print beside the kernel.
template <class I>
static float read_all(const char* data, int64_t bytes) {
  constexpr int kSums = 8;
  constexpr int64_t kStride = int64_t{kSums} * I::kLanes;
  typename I::Vec sums[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) sums[i] = I::zero();
  const float* p = reinterpret_cast<const float*>(data);
  const float* end = p + bytes / (kStride * 4) * kStride;
  for (; p < end; p += kStride) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i)
      sums[i] = I::add(sums[i], I::load(p + i * I::kLanes));
  }
  for (int i = 1; i < kSums; ++i) sums[0] = I::add(sums[0], sums[i]);
  return I::reduce_add(sums[0]);
}

// One ISA's entry points; bf16 pairs only where the query is bf16 already, so that it
// is never rounded.
template <class I, bool kUsePairs>
static void run_kernel(const Job& job, int64_t work, Span* span, Scratch* scratch) {
  switch (job.geometry->dtype) {
    case AO_BF16:
      if constexpr (kUsePairs) {
        if (job.input->query_dtype == AO_BF16)
          return AttendKernel<I, Bf16Pairs>::run(job, work, span, scratch);
      }
      return AttendKernel<I, Bf16Widened>::run(job, work, span, scratch);
    case AO_FP16: return AttendKernel<I, Fp16>::run(job, work, span, scratch);
    case AO_FP8_E4M3:
      if constexpr (kUsePairs) {
        if (job.input->query_dtype == AO_BF16)
          return AttendKernel<I, Fp8Pairs>::run(job, work, span, scratch);
      }
      return AttendKernel<I, typename I::Fp8>::run(job, work, span, scratch);
    default: return AttendKernel<I, Fp32>::run(job, work, span, scratch);
  }
}

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ATTEND_KERNEL_H_
