// SPDX-License-Identifier: Apache-2.0
// Eight-lane vectors: AVX2, FMA and F16C. Intel's intrinsics guide names each one.
#ifndef ATTN_OFFLOAD_ISA_AVX2_H_
#define ATTN_OFFLOAD_ISA_AVX2_H_

#include <immintrin.h>
#include <stdint.h>

#include "panels.h"

namespace attn_offload {
namespace {

struct Avx2 {
  using Vec = __m256;
  using Pair = __m256i;
  using Fp8 = Fp8Expanded;  // how an fp8 cache is read
  static constexpr int kLanes = 8;
  // Eight to twelve independent sums hide the latency of a fused multiply-add; with
  // more, or with five rows and up, the compiler runs out of the sixteen registers.
  static constexpr int kMaxRowGroup = 4;
  static constexpr int kMaxSums = 8;
  static constexpr int panels_at_once(int rows) { return rows <= 2 ? 2 : 1; }

  static inline Vec zero() { return _mm256_setzero_ps(); }
  static inline Vec set1(float x) { return _mm256_set1_ps(x); }
  static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static inline float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static inline float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  static inline Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // p * 2^n, n integral and the result normal.
  static inline Vec scale_pow2(Vec p, Vec n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  }
  // a where x < y, else b.
  static inline Vec where_less(Vec x, Vec y, Vec a, Vec b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
  }
  // x in lanes with begin <= first + lane < end, else -inf.
  static inline Vec keep(Vec x, int first, int begin, int end) {
    const __m256i lane = _mm256_add_epi32(lanes(), _mm256_set1_epi32(first));
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
    const __m256i within = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane);
    return _mm256_blendv_ps(set1(-__builtin_inff()), x,
                            _mm256_castsi256_ps(_mm256_andnot_si256(before, within)));
  }
  static inline Vec iota() { return _mm256_cvtepi32_ps(lanes()); }

  static inline Pair load_pair(const char* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline Pair broadcast_pair(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  static inline Pair mask_pair(Pair x, uint32_t mask) {
    return _mm256_and_si256(x, _mm256_set1_epi32(int(mask)));
  }
  static inline Vec low(Pair x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  }
  static inline Vec high(Pair x) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
  }
  static inline Vec pair_dot(Vec sum, Pair a, Pair b) {
    return fma(high(a), high(b), fma(low(a), low(b), sum));
  }

  static inline Vec load_half(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // 16 pairs of fp8 elements, as the halves of the first and then of the second ones.
  static inline void expand_fp8(const char* pairs, char* halves) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    __m256i* target = reinterpret_cast<__m256i*>(halves);
    _mm256_store_si256(target, fp8_to_half(_mm256_slli_epi16(x, 8)));
    _mm256_store_si256(target + 1, fp8_to_half(x));
  }
  // Of 16 pairs of fp8 elements, the first or second ones; times 2^-8.
  static inline Vec load_fp8(const char* pairs, int element, int vector) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const __m256i half = fp8_to_half(element == 0 ? _mm256_slli_epi16(x, 8) : x);
    return _mm256_cvtph_ps(vector == 0 ? _mm256_castsi256_si128(half)
                                       : _mm256_extracti128_si256(half, 1));
  }
  static inline Pair load_fp8_pair(const char* step, int pair, int vector) {
    const char* pairs = step + pair * 32;
    const __m256i first = _mm256_castps_si256(load_fp8(pairs, 0, vector));
    const __m256i second = _mm256_castps_si256(load_fp8(pairs, 1, vector));
    return _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa);
  }

 private:
  // Of the upper byte of each word: the sign stays, exponent and mantissa move to bit
  // 13 and on.
  static inline __m256i fp8_to_half(__m256i words) {
    return _mm256_and_si256(_mm256_srai_epi16(words, 1),
                            _mm256_set1_epi16(int16_t(0xbf80)));
  }
  static inline __m256i lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
};

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ISA_AVX2_H_
