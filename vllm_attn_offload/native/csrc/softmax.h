// SPDX-License-Identifier: Apache-2.0
// Online softmax in fp32: one running maximum and rescale per row and macro tile.
#ifndef ATTN_OFFLOAD_SOFTMAX_H_
#define ATTN_OFFLOAD_SOFTMAX_H_

#include <math.h>
#include <string.h>

#include "tile_cursor.h"
#include "types.h"

namespace attn_offload {
namespace {

// exp(x) for x <= 0: relative error below 2e-7, 0 below -87, NaN for NaN.
template <class I>
static inline typename I::Vec exp_nonpositive(typename I::Vec x) {
  using Vec = typename I::Vec;
  const Vec lowest = I::set1(-87.0f);
  const Vec bounded = I::max(lowest, x);  // in this order, NaN stays
  const Vec n = I::round(I::mul(bounded, I::set1(1.44269504f)));
  // ln 2 in two parts: the first has few enough bits that n times it is exact.
  Vec r = I::fma(n, I::set1(-0.693359375f), bounded);
  r = I::fma(n, I::set1(2.12194440e-4f), r);
  // Chebyshev interpolant of exp on [-ln 2 / 2, ln 2 / 2].
  Vec p = I::set1(1.3941213e-3f);
  p = I::fma(p, r, I::set1(8.3752102e-3f));
  p = I::fma(p, r, I::set1(4.1666352e-2f));
  p = I::fma(p, r, I::set1(1.6666415e-1f));
  p = I::fma(p, r, I::set1(0.5f));
  p = I::fma(p, r, I::set1(1.0f));
  p = I::fma(p, r, I::set1(1.0f));
  return I::where_less(x, lowest, I::zero(), I::scale_pow2(p, n));
}

// tanh(x): its series for small |x|, where (1 - e) / (1 + e) cancels.
template <class I>
static inline typename I::Vec tanh(typename I::Vec x) {
  using Vec = typename I::Vec;
  const Vec size = I::abs(x);
  const Vec e = exp_nonpositive<I>(I::mul(size, I::set1(-2.0f)));
  const Vec one = I::set1(1.0f);
  const Vec large = I::div(I::fma(e, I::set1(-1.0f), one), I::add(one, e));
  const Vec square = I::mul(x, x);
  Vec p = I::set1(62.0f / 2835);
  p = I::fma(p, square, I::set1(-17.0f / 315));
  p = I::fma(p, square, I::set1(2.0f / 15));
  p = I::fma(p, square, I::set1(-1.0f / 3));
  p = I::fma(p, square, one);
  const Vec sign = I::where_less(x, I::zero(), I::set1(-1.0f), one);
  return I::where_less(size, I::set1(0.3f), I::mul(x, p), I::mul(sign, large));
}

// What turns one row's dot products into masked scores.
struct RowScores {
  float scale;
  float soft_cap;     // 0: none
  float alibi_slope;  // 0: none
  int32_t position;   // of the query
  Visible visible;
};

static inline RowScores row_scores(const Job& job, const Rows& rows, int32_t row) {
  const SequenceRef& sequence = job.sequences[rows.sequence];
  const AoAttendInput& input = *job.input;
  const int32_t query_index = row / job.group;
  const int32_t head = rows.kv_head * job.group + row % job.group;
  return {job.score_scale, input.soft_cap,
          input.alibi_slopes ? input.alibi_slopes[head] : 0.0f,
          sequence.position + query_index,
          visible_keys(sequence, query_index, job.sliding_window)};
}

// Finishes the scores of one row in place and returns their maximum.
template <class I>
static inline float finish_scores(const RowScores& row, const MacroTile& macro,
                                  float* scores) {
  using Vec = typename I::Vec;
  const Vec scale = I::set1(row.scale);
  Vec highest = I::set1(-INFINITY);
  for (int t = 0; t < macro.count; ++t) {
    const Tile& tile = macro.tiles[t];
    const int begin = clamp(row.visible.begin - tile.position, tile.begin, tile.end);
    const int end = clamp(row.visible.end - tile.position, tile.begin, tile.end);
    const bool is_whole = begin == 0 && end == kTile;
    for (int lane = 0; lane < kTile; lane += I::kLanes) {
      float* place = scores + t * kTile + lane;
      Vec x = I::mul(I::load(place), scale);
      if (row.soft_cap != 0.0f)
        x = I::mul(I::set1(row.soft_cap), tanh<I>(I::div(x, I::set1(row.soft_cap))));
      if (row.alibi_slope != 0.0f) {
        const float distance = float(tile.position + lane - row.position);
        x = I::fma(I::add(I::iota(), I::set1(distance)), I::set1(row.alibi_slope), x);
      }
      if (!is_whole) x = I::keep(x, lane, begin, end);
      I::store(place, x);
      highest = I::max(highest, x);
    }
  }
  return I::reduce_max(highest);
}

// Replaces scores by exp(score - maximum) and returns their sum.
template <class I>
static inline float exponentiate(float maximum, int count, float* scores) {
  using Vec = typename I::Vec;
  const Vec shift = I::set1(-maximum);
  Vec sum = I::zero();
  for (int i = 0; i < count; i += I::kLanes) {
    const Vec p = exp_nonpositive<I>(I::add(I::load(scores + i), shift));
    I::store(scores + i, p);
    sum = I::add(sum, p);
  }
  return I::reduce_add(sum);
}

static inline bool has_nan(const float* scores, int count) {
  bool found = false;
  for (int i = 0; i < count; ++i) found |= scores[i] != scores[i];
  return found;
}

template <class I>
static __attribute__((noinline)) void softmax_rows(const Job& job, const Rows& rows,
                                                   const MacroTile& macro,
                                                   Scratch* scratch) {
  const int count = macro.count * kTile;
  for (int r = 0; r < rows.row_count; ++r) {
    float* scores = scratch->scores + r * kMacroTokens;
    const float highest =
        finish_scores<I>(row_scores(job, rows, rows.row_begin + r), macro, scores);
    const float old_max = scratch->row_max[r];
    scratch->rescale[r] = 1.0f;
    if (!(highest <= old_max)) {  // NaN included
      scratch->row_max[r] = highest;
      scratch->rescale[r] = expf(old_max - highest);
    }
    if (scratch->row_max[r] == -INFINITY) {
      // The maximum forgets a NaN that a masked score follows: not "no key seen".
      if (!has_nan(scores, count)) {
        memset(scores, 0, size_t(count) * sizeof *scores);
        continue;
      }
      scratch->row_max[r] = NAN;
    }
    const float sum = exponentiate<I>(scratch->row_max[r], count, scores);
    scratch->row_sum[r] = scratch->row_sum[r] * scratch->rescale[r] + sum;
  }
}

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_SOFTMAX_H_
