// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane vectors: AVX-512 F, BW, VL and DQ; with AVX512_BF16 the pair products
// are one instruction.
#ifndef ATTN_OFFLOAD_ISA_AVX512_H_
#define ATTN_OFFLOAD_ISA_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

namespace attn_offload {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Pair = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kMaxRowGroup = 8;
  static constexpr int kMaxSums = 16;
  static constexpr int panels_at_once(int rows) { return rows <= 4 ? 4 : 2; }

  static inline Vec zero() { return _mm512_setzero_ps(); }
  static inline Vec set1(float x) { return _mm512_set1_ps(x); }
  static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
  static inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
  static inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }

  static inline Vec round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline Vec scale_pow2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }
  // a where x < y, else b.
  static inline Vec where_less(Vec x, Vec y, Vec a, Vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
  }
  // x in lanes with begin <= first + lane < end, else -inf.
  static inline Vec keep(Vec x, int first, int begin, int end) {
    const __m512i lane = _mm512_add_epi32(lanes(), _mm512_set1_epi32(first));
    const __mmask16 in = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(begin)) &
                         _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(end), lane);
    return _mm512_mask_blend_ps(in, set1(-__builtin_inff()), x);
  }
  static inline Vec iota() { return _mm512_cvtepi32_ps(lanes()); }

  static inline Pair load_pair(const char* p) { return _mm512_loadu_si512(p); }
  static inline Pair broadcast_pair(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  static inline Pair mask_pair(Pair x, uint32_t mask) {
    return _mm512_and_si512(x, _mm512_set1_epi32(int(mask)));
  }
  static inline Vec low(Pair x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  }
  static inline Vec high(Pair x) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
  }
  static inline Vec pair_dot(Vec sum, Pair a, Pair b) {
#if defined(ATTN_OFFLOAD_AVX512_BF16)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return fma(high(a), high(b), fma(low(a), low(b), sum));
#endif
  }

  static inline Vec load_half(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

 private:
  static inline __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
};

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ISA_AVX512_H_
