// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane vectors: AVX-512 F, BW, VL and DQ; with AVX512_BF16 the pair products
// are one instruction, with AVX512_VBMI fp8 elements are looked up in registers.
#ifndef ATTN_OFFLOAD_ISA_AVX512_H_
#define ATTN_OFFLOAD_ISA_AVX512_H_

#include <immintrin.h>
#include <stdint.h>

#include "panels.h"

namespace attn_offload {
namespace {

#if defined(ATTN_OFFLOAD_AVX512_VBMI)
// The two bytes of the bf16 number that is 2^-8 times what an fp8 code stands for.
struct alignas(64) Fp8Bytes {
  uint8_t low[128];
  uint8_t high[128];
  constexpr Fp8Bytes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      int bits = code == 127 ? 0x7fc0 : (code << 4) + (112 << 7);
      if (code < 8) {
        // A subnormal: its leading one moves up to where the mantissa's hidden one is.
        int mantissa = code, exponent = 113;
        while (mantissa != 0 && mantissa < 8) mantissa *= 2, --exponent;
        bits = mantissa == 0 ? 0 : exponent << 7 | (mantissa & 7) << 4;
      }
      low[code] = uint8_t(bits);
      high[code] = uint8_t(bits >> 8);
    }
  }
};
constexpr Fp8Bytes kFp8Bytes;
#endif

struct Avx512 {
  using Vec = __m512;
  using Pair = __m512i;
  using Fp8 = Fp8Widened;  // how an fp8 cache is read
  static constexpr int kLanes = 16;
  static constexpr int kMaxRowGroup = 8;
  static constexpr int kMaxSums = 16;
  static constexpr int panels_at_once(int rows) { return rows <= 2 ? 4 : 2; }

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

  // Of 16 pairs of fp8 elements, the first or second ones; times 2^-8.
  static inline Vec load_fp8(const char* pairs, int element, int) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    // Sign-extended and shifted by 7: the first as a product, which is one instruction.
    const __m256i shifted = element == 0
                                ? _mm256_maddubs_epi16(_mm256_set1_epi16(128), x)
                                : _mm256_srai_epi16(x, 1);
    // The sign at bit 15, exponent and mantissa from bit 13 on: a half.
    return _mm512_cvtph_ps(
        _mm256_and_si256(shifted, _mm256_set1_epi16(int16_t(0xbf80))));
  }
#if defined(ATTN_OFFLOAD_AVX512_VBMI)
  static inline Pair load_fp8_pair(const char* step, int pair, int) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(step));
    const __m512i low = look_up(kFp8Bytes.low, code);
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    // look_up | (code & sign)
    const __m512i high =
        _mm512_ternarylogic_epi32(look_up(kFp8Bytes.high, code), code, sign, 0xf8);
    if (pair == 0) return _mm512_unpacklo_epi8(low, high);
    return _mm512_unpackhi_epi8(low, high);
  }
#else
  static inline Pair load_fp8_pair(const char* step, int pair, int vector) {
    const char* pairs = step + pair * 32;
    const __m512i first = _mm512_castps_si512(load_fp8(pairs, 0, vector));
    const __m512i second = _mm512_castps_si512(load_fp8(pairs, 1, vector));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second);
  }
#endif

 private:
#if defined(ATTN_OFFLOAD_AVX512_VBMI)
  // The bytes at the low seven bits of each index.
  static inline __m512i look_up(const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index,
                                    _mm512_load_si512(table + 64));
  }
#endif
  static inline __m512i lanes() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
};

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ISA_AVX512_H_
