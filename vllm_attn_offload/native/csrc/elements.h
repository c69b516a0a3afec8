// SPDX-License-Identifier: Apache-2.0
// Elements of queries, outputs and new tokens, one by one and in rows.
#ifndef ATTN_OFFLOAD_ELEMENTS_H_
#define ATTN_OFFLOAD_ELEMENTS_H_

#include <string.h>

#include "types.h"

namespace attn_offload {
namespace {

static inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Round to nearest even, written without branches so that loops vectorise.
static inline uint32_t to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : 0x7fc0u;
}

static inline float from_fp16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // 2^112 moves the exponent and scales subnormals alike.
  uint32_t bits = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(bits | (uint32_t{half} & 0x8000u) << 16);
}

static inline uint16_t to_fp16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  // Adding 0.5 leaves the ten mantissa bits of a subnormal half, rounded, at the end.
  const uint32_t small = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  uint32_t half = size < 0x38800000u ? small : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;
  half = size > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(half | sign);
}

// Round to nearest even, saturating at 448; NaN stays NaN. Masks, not choices: one side
// adds floats, so the compiler would make branches of them.
static inline uint8_t to_e4m3(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t held = size < 0x43e00000u ? size : 0x43e00000u;
  // Adding 2^14 leaves the three mantissa bits of a subnormal, rounded, at the end.
  const uint32_t small = float_to_bits(bits_to_float(held) + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (held - 0x3c000000u + 0x7ffffu + ((held >> 20) & 1u)) >> 20;
  const uint32_t is_small = 0u - uint32_t(held < 0x3c800000u);
  const uint32_t is_nan = 0u - uint32_t(size > 0x7f800000u);
  const uint32_t code = (small & is_small) | (normal & ~is_small) | (is_nan & 0x7fu);
  return uint8_t(code | (bits >> 24 & 0x80u));
}

static inline void load_row(const char* source, int32_t dtype, int32_t count,
                            float* row) {
  if (dtype == AO_FP32) {
    memcpy(row, source, size_t(count) * sizeof *row);
    return;
  }
  uint16_t halves[kMaxHeadSize];
  memcpy(halves, source, size_t(count) * sizeof *halves);
  if (dtype == AO_BF16) {
    for (int i = 0; i < count; ++i) row[i] = bits_to_float(uint32_t{halves[i]} << 16);
  } else {
    for (int i = 0; i < count; ++i) row[i] = from_fp16(halves[i]);
  }
}

static inline void store_row(const float* row, float factor, int32_t dtype,
                             int32_t count, char* target) {
  if (dtype == AO_FP32) {
    float scaled[kMaxHeadSize];
    for (int i = 0; i < count; ++i) scaled[i] = row[i] * factor;
    memcpy(target, scaled, size_t(count) * sizeof *scaled);
    return;
  }
  uint16_t halves[kMaxHeadSize];
  if (dtype == AO_BF16) {
    for (int i = 0; i < count; ++i) halves[i] = uint16_t(to_bf16(row[i] * factor));
  } else {
    for (int i = 0; i < count; ++i) halves[i] = to_fp16(row[i] * factor);
  }
  memcpy(target, halves, size_t(count) * sizeof *halves);
}

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ELEMENTS_H_
