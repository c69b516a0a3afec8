// SPDX-License-Identifier: Apache-2.0
// The inner product that both halves of attention share. A panel holds 16 columns of a
// matrix, reduction index outermost, in 64-byte steps; panel_dot multiplies rows of
// query (K panels: 16 tokens) or of probabilities (V panels: 16 dimensions) by it.
#ifndef ATTN_OFFLOAD_PANELS_H_
#define ATTN_OFFLOAD_PANELS_H_

#include "types.h"

namespace attn_offload {
namespace {

constexpr int kStepBytes = 64;

// bf16 panels interleave two reduction indices per column, so widening is a shift or a
// mask and a pair is what vdpbf16ps takes. The left operand stays fp32.
struct Bf16Widened {
  static constexpr int kElements = 2;  // reduction indices per step
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = false;
  using Left = float;
  template <class I>
  static inline typename I::Vec load(const char* step, int element, int vector) {
    const auto pair = I::load_pair(step + vector * I::kLanes * 4);
    return element == 0 ? I::low(pair) : I::high(pair);
  }
};

// The same panels, left operand rounded to bf16 pairs.
struct Bf16Pairs {
  static constexpr int kElements = 2;
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = true;
  using Left = uint32_t;
  template <class I>
  static inline typename I::Pair load_pair(const char* step, int, int vector) {
    return I::load_pair(step + vector * I::kLanes * 4);
  }
};

struct Fp16 {
  static constexpr int kElements = 2;
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = false;
  using Left = float;
  template <class I>
  static inline typename I::Vec load(const char* step, int element, int vector) {
    return I::load_half(step + (element * kTile + vector * I::kLanes) * 2);
  }
};

// fp8 panels interleave like those of bf16: two runs of 16 columns x 2 indices a step.
struct Fp8Widened {
  static constexpr int kElements = 4;
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = false;
  using Left = float;
  template <class I>
  static inline typename I::Vec load(const char* step, int element, int vector) {
    return I::load_fp8(step + element / 2 * (kTile * 2), element % 2, vector);
  }
};

// The same panels as bf16 pairs, in which every fp8 number is exact.
struct Fp8Pairs {
  static constexpr int kElements = 4;
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = true;
  using Left = uint32_t;
  template <class I>
  static inline typename I::Pair load_pair(const char* step, int pair, int vector) {
    return I::load_fp8_pair(step, pair, vector);
  }
};

// The same panels, made panels of halves before they are used: all rows share that, and
// conversions to fp32 that take their operand from memory are the cheap ones.
struct Fp8Expanded : Fp16 {
  static constexpr bool kExpands = true;
};

struct Fp32 {
  static constexpr int kElements = 1;
  static constexpr bool kExpands = false;
  static constexpr bool kPairs = false;
  using Left = float;
  template <class I>
  static inline typename I::Vec load(const char* step, int, int vector) {
    return I::load(reinterpret_cast<const float*>(step) + vector * I::kLanes);
  }
};

// Into L2 only: the next tiles would push the current ones out of L1.
static inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// sum[m][v] += left[m][element] * panel[element][v] for one reduction index.
template <class I, class F, int M, int P>
static inline __attribute__((always_inline)) void multiply_element(
    typename I::Vec (&sum)[M][P * (kTile / I::kLanes)], const float* left, int stride,
    const char* const* panels, int64_t offset, int element) {
  constexpr int kVectors = kTile / I::kLanes;
  if constexpr (M > P * kVectors) {
    typename I::Vec right[P * kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < P * kVectors; ++v)
      right[v] =
          F::template load<I>(panels[v / kVectors] + offset, element, v % kVectors);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto factor = I::set1(left[m * stride]);
#pragma GCC unroll 16
      for (int v = 0; v < P * kVectors; ++v)
        sum[m][v] = I::fma(factor, right[v], sum[m][v]);
    }
  } else {
    typename I::Vec factor[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) factor[m] = I::set1(left[m * stride]);
#pragma GCC unroll 16
    for (int v = 0; v < P * kVectors; ++v) {
      const auto right =
          F::template load<I>(panels[v / kVectors] + offset, element, v % kVectors);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][v] = I::fma(factor[m], right, sum[m][v]);
    }
  }
}

// One pair of reduction indices; `mask` drops the half of it that must not count.
template <class I, class F, int M, int P>
static inline __attribute__((always_inline)) void multiply_pair(
    typename I::Vec (&sum)[M][P * (kTile / I::kLanes)], const uint32_t* left,
    int stride, const char* const* panels, int64_t offset, int pair, uint32_t mask) {
  constexpr int kVectors = kTile / I::kLanes;
  typename I::Pair factor[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) factor[m] = I::broadcast_pair(left[m * stride]);
#pragma GCC unroll 16
  for (int v = 0; v < P * kVectors; ++v) {
    auto right =
        F::template load_pair<I>(panels[v / kVectors] + offset, pair, v % kVectors);
    if (mask != 0xffffffffu) right = I::mask_pair(right, mask);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[m][v] = I::pair_dot(sum[m][v], factor[m], right);
  }
}

// All of `steps`, prefetching at ahead[p] as much of the cache as panels[p] came from.
template <class I, class F, int M, int P>
static inline __attribute__((always_inline)) void panel_dot(
    typename I::Vec (&sum)[M][P * (kTile / I::kLanes)], const typename F::Left* left,
    int stride, const char* const* panels, const char* const* ahead, int steps) {
  constexpr int kSums = P * (kTile / I::kLanes);
  // Odd elements of a step in sums of their own: twice as many independent chains.
  constexpr bool kIsSplit =
      !F::kPairs && F::kElements > 1 && 2 * M * kSums <= I::kMaxSums;
  typename I::Vec second[M][kSums];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < kSums; ++v) second[m][v] = I::zero();
  for (int step = 0; step < steps; ++step) {
    const int64_t offset = int64_t{step} * kStepBytes;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      prefetch(ahead[p] + (F::kExpands ? offset / 2 : offset));
    if constexpr (F::kPairs) {
      const uint32_t* factors = left + step * (F::kElements / 2);
#pragma GCC unroll 2
      for (int pair = 0; pair < F::kElements / 2; ++pair)
        multiply_pair<I, F, M, P>(sum, factors + pair, stride, panels, offset, pair,
                                  0xffffffffu);
    } else {
      const float* factors = left + step * F::kElements;
#pragma GCC unroll 4
      for (int e = 0; e < F::kElements; e += 2) {
        multiply_element<I, F, M, P>(sum, factors + e, stride, panels, offset, e);
        if constexpr (kIsSplit) {
          multiply_element<I, F, M, P>(second, factors + e + 1, stride, panels, offset,
                                       e + 1);
        } else if constexpr (F::kElements > 1) {
          multiply_element<I, F, M, P>(sum, factors + e + 1, stride, panels, offset,
                                       e + 1);
        }
      }
    }
  }
  if constexpr (kIsSplit) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < kSums; ++v) sum[m][v] = I::add(sum[m][v], second[m][v]);
  }
}

// Only reduction indices [begin, end): what lies outside is not multiplied, not even
// by zero, for it may hold anything.
template <class I, class F, int M, int P>
static inline void panel_dot_range(typename I::Vec (&sum)[M][P * (kTile / I::kLanes)],
                                   const typename F::Left* left, int stride,
                                   const char* const* panels, int begin, int end) {
  if constexpr (F::kPairs) {
    constexpr int kStepPairs = F::kElements / 2;
    for (int i = begin / 2; 2 * i < end; ++i) {
      const uint32_t low = 2 * i >= begin ? 0x0000ffffu : 0;
      const uint32_t high = 2 * i + 1 < end ? 0xffff0000u : 0;
      multiply_pair<I, F, M, P>(sum, left + i, stride, panels,
                                int64_t{i / kStepPairs} * kStepBytes, i % kStepPairs,
                                low | high);
    }
  } else {
    for (int i = begin; i < end; ++i)
      multiply_element<I, F, M, P>(sum, left + i, stride, panels,
                                   int64_t{i / F::kElements} * kStepBytes,
                                   i % F::kElements);
  }
}

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_PANELS_H_
