// SPDX-License-Identifier: Apache-2.0
// Four-lane vectors in the compiler's vector extension: any CPU, and the model for a
// NEON layer.
#ifndef ATTN_OFFLOAD_ISA_PORTABLE_H_
#define ATTN_OFFLOAD_ISA_PORTABLE_H_

#include <stdint.h>
#include <string.h>

#include "panels.h"

namespace attn_offload {
namespace {

// What fp8 codes stand for, times 2^-8.
struct Fp8Table {
  float value[256];
  constexpr Fp8Table() : value() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15;
      float x = exponent == 0 ? float(code & 7) : float(8 + (code & 7));
      for (int i = 1; i < exponent; ++i) x *= 2.0f;
      x = (code & 127) == 127 ? __builtin_nanf("") : x * 0x1p-17f;
      value[code] = code < 128 ? x : -x;
    }
  }
};
constexpr Fp8Table kFp8Table;

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Pair __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  using Fp8 = Fp8Widened;  // how an fp8 cache is read
  static constexpr int kLanes = 4;
  static constexpr int kMaxRowGroup = 2;
  static constexpr int kMaxSums = 8;
  static constexpr int panels_at_once(int) { return 1; }

  static inline Vec zero() { return Vec{}; }
  static inline Vec set1(float x) { return Vec{x, x, x, x}; }
  static inline Vec load(const float* p) { return load_as<Vec>(p); }
  static inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
  static inline Vec add(Vec a, Vec b) { return a + b; }
  static inline Vec mul(Vec a, Vec b) { return a * b; }
  static inline Vec div(Vec a, Vec b) { return a / b; }
  static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static inline Vec abs(Vec a) { return (Vec)((Int)a & 0x7fffffff); }
  static inline float reduce_max(Vec a) {
    const float x = a[0] > a[1] ? a[0] : a[1];
    const float y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
  static inline float reduce_add(Vec a) { return (a[0] + a[1]) + (a[2] + a[3]); }

  // Nearest integer of |x| < 2^22.
  static inline Vec round(Vec x) { return (x + 12582912.0f) - 12582912.0f; }
  // p * 2^n, n integral and the result normal.
  static inline Vec scale_pow2(Vec p, Vec n) {
    return (Vec)((Int)p + (__builtin_convertvector(n, Int) << 23));
  }
  // a where x < y, else b.
  static inline Vec where_less(Vec x, Vec y, Vec a, Vec b) { return x < y ? a : b; }
  // x in lanes with begin <= first + lane < end, else -inf.
  static inline Vec keep(Vec x, int first, int begin, int end) {
    const Int lane = lanes() + first;
    return ((lane >= begin) & (lane < end)) ? x : set1(-__builtin_inff());
  }
  static inline Vec iota() { return __builtin_convertvector(lanes(), Vec); }

  static inline Pair load_pair(const char* p) { return load_as<Pair>(p); }
  static inline Pair broadcast_pair(uint32_t x) { return Pair{x, x, x, x}; }
  static inline Pair mask_pair(Pair x, uint32_t mask) { return x & mask; }
  static inline Vec low(Pair x) { return (Vec)(x << 16); }
  static inline Vec high(Pair x) { return (Vec)(x & 0xffff0000u); }
  static inline Vec pair_dot(Vec sum, Pair a, Pair b) {
    return fma(high(a), high(b), fma(low(a), low(b), sum));
  }

  static inline Vec load_half(const char* p) {
    uint16_t half[4];
    memcpy(half, p, sizeof half);
    const Pair h = {half[0], half[1], half[2], half[3]};
    // Exponent moved by 112 with a multiplication, which also scales subnormals.
    Pair bits = (Pair)((Vec)((h & 0x7fffu) << 13) * 0x1p112f);
    bits |= (Pair)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (Vec)(bits | (h & 0x8000u) << 16);
  }

  // Of 16 pairs of fp8 elements, the first or second ones; times 2^-8.
  static inline Vec load_fp8(const char* pairs, int element, int vector) {
    uint8_t code[2 * kLanes];
    memcpy(code, pairs + vector * sizeof code, sizeof code);
    const float* table = kFp8Table.value;
    return Vec{table[code[element]], table[code[2 + element]], table[code[4 + element]],
               table[code[6 + element]]};
  }
  static inline Pair load_fp8_pair(const char* step, int pair, int vector) {
    const char* pairs = step + pair * 32;
    const Pair first = (Pair)load_fp8(pairs, 0, vector);
    return first >> 16 | ((Pair)load_fp8(pairs, 1, vector) & 0xffff0000u);
  }

 private:
  static inline Int lanes() { return Int{0, 1, 2, 3}; }
  template <class T>
  static inline T load_as(const void* p) {
    T x;
    memcpy(&x, p, sizeof x);
    return x;
  }
};

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ISA_PORTABLE_H_
