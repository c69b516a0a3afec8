// SPDX-License-Identifier: Apache-2.0
// Scatters new keys and values into the block layout of README.md.
#include <string.h>

#include <algorithm>
#include <atomic>

#include "cache.h"
#include "elements.h"
#include "pool.h"

namespace attn_offload {
namespace {

// Consecutive tokens that land in one tile.
struct Run {
  const char* source;
  int64_t stride;
  char* tile;
  int32_t first;  // token within the tile
  int32_t count;
};

// Of panels that interleave two reduction indices: dimensions 2s and 2s + 1 of a token
// are adjacent, and copied as one T.
template <class T>
void store_key_pairs(const Run& run, int32_t head_size) {
  for (int32_t pair = 0; pair < head_size / 2; ++pair)
    for (int32_t i = 0; i < run.count; ++i)
      memcpy(run.tile + (pair * kTile + run.first + i) * sizeof(T),
             run.source + i * run.stride + pair * sizeof(T), sizeof(T));
}

template <class T>
void store_key_plain(const Run& run, int32_t head_size) {
  for (int32_t d = 0; d < head_size; ++d)
    for (int32_t i = 0; i < run.count; ++i)
      memcpy(run.tile + (d * kTile + run.first + i) * sizeof(T),
             run.source + i * run.stride + d * sizeof(T), sizeof(T));
}

template <class T>
void store_value_pairs(const Run& run, int32_t head_size) {
  for (int32_t i = 0; i < run.count; ++i) {
    const int32_t token = run.first + i;
    const char* source = run.source + i * run.stride;
    for (int32_t d = 0; d < head_size; ++d) {
      const int64_t panel = d / kTile * kTile * kTile;
      const int64_t at = panel + (token / 2 * kTile + d % kTile) * 2 + token % 2;
      memcpy(run.tile + at * sizeof(T), source + d * sizeof(T), sizeof(T));
    }
  }
}

template <class T>
void store_value_plain(const Run& run, int32_t head_size) {
  for (int32_t i = 0; i < run.count; ++i) {
    const char* source = run.source + i * run.stride;
    for (int32_t d = 0; d < head_size; d += kTile) {
      const int32_t width = std::min(kTile, head_size - d);
      memcpy(run.tile + (d * kTile + (run.first + i) * kTile) * sizeof(T),
             source + d * sizeof(T), size_t(width) * sizeof(T));
    }
  }
}

void store_key(const Run& run, const Geometry& g) {
  if (g.dtype == AO_FP8_E4M3) return store_key_pairs<uint16_t>(run, g.head_size);
  if (g.dtype == AO_BF16) return store_key_pairs<uint32_t>(run, g.head_size);
  if (g.dtype == AO_FP16) return store_key_plain<uint16_t>(run, g.head_size);
  store_key_plain<uint32_t>(run, g.head_size);
}

void store_value(const Run& run, const Geometry& g) {
  if (g.dtype == AO_FP8_E4M3) return store_value_pairs<uint8_t>(run, g.v_head_size);
  if (g.dtype == AO_BF16) return store_value_pairs<uint16_t>(run, g.v_head_size);
  if (g.dtype == AO_FP16) return store_value_plain<uint16_t>(run, g.v_head_size);
  store_value_plain<uint32_t>(run, g.v_head_size);
}

// The rows of a run as the cache's elements, one after the other.
struct Quantized {
  uint8_t codes[kTile * kMaxHeadSize];

  Run fill(const Run& run, int32_t dtype, float scale, int32_t head_size) {
    float row[kMaxHeadSize];
    for (int32_t i = 0; i < run.count; ++i) {
      load_row(run.source + i * run.stride, dtype, head_size, row);
      uint8_t* target = codes + i * head_size;
      for (int32_t d = 0; d < head_size; ++d) target[d] = to_e4m3(row[d] / scale);
    }
    const char* source = reinterpret_cast<const char*>(codes);
    return {source, head_size, run.tile, run.first, run.count};
  }
};

struct StoreJob {
  const Geometry* geometry;
  const AoStoreInput* input;
  int64_t chunk;  // tokens
  std::atomic<int64_t> next{0};
};

int32_t run_length(const StoreJob& job, int64_t token, int64_t end) {
  const int64_t* slots = job.input->slot_mapping;
  const int64_t offset = slots[token] % job.geometry->block_size;
  const int64_t limit = std::min<int64_t>(
      {end - token, kTile - offset % kTile, job.geometry->block_size - offset});
  int32_t count = 1;
  while (count < limit && slots[token + count] == slots[token] + count) ++count;
  return count;
}

void store_tokens(const StoreJob& job, int64_t begin, int64_t end) {
  const Geometry& g = *job.geometry;
  const AoStoreInput& input = *job.input;
  const bool is_fp8 = g.dtype == AO_FP8_E4M3;
  const int32_t dtype = is_fp8 ? input.source_dtype : g.dtype;
  const int64_t k_row = int64_t{g.head_size} * element_bytes(dtype);
  const int64_t v_row = int64_t{g.v_head_size} * element_bytes(dtype);
  Quantized quantized;
  int32_t count = 1;
  for (int64_t token = begin; token < end; token += count) {
    count = 1;
    const int64_t slot = input.slot_mapping[token];
    if (slot < 0) continue;
    count = run_length(job, token, end);
    const int64_t block = slot / g.block_size;
    const int64_t offset = slot % g.block_size;
    const int64_t tile = offset / kTile;
    const int32_t first = int32_t(offset % kTile);
    const char* key = static_cast<const char*>(input.key) + token * input.key_stride;
    const char* value =
        static_cast<const char*>(input.value) + token * input.value_stride;
    char* k = static_cast<char*>(input.cache) + block * g.block_stride +
              tile * (g.k_tile_bytes + g.v_tile_bytes);
    char* v = k + g.k_tile_bytes;
    for (int32_t head = 0; head < g.num_kv_heads; ++head) {
      Run keys = {key + head * k_row, input.key_stride, k + head * g.head_bytes, first,
                  count};
      if (is_fp8) keys = quantized.fill(keys, dtype, input.k_scale, g.head_size);
      store_key(keys, g);
      Run values = {value + head * v_row, input.value_stride, v + head * g.head_bytes,
                    first, count};
      if (is_fp8) values = quantized.fill(values, dtype, input.v_scale, g.v_head_size);
      store_value(values, g);
    }
  }
}

void store_body(void* context, int, Scratch*) {
  StoreJob& job = *static_cast<StoreJob*>(context);
  while (true) {
    const int64_t begin = job.next.fetch_add(1) * job.chunk;
    if (begin >= job.input->num_tokens) return;
    store_tokens(job, begin, std::min(begin + job.chunk, job.input->num_tokens));
  }
}

}  // namespace
}  // namespace attn_offload

extern "C" int32_t ao_store(AoPool* pool, const AoCache* cache,
                            const AoStoreInput* input) {
  using namespace attn_offload;
  const Geometry& g = cache->geometry;
  if (g.dtype == AO_FP8_E4M3 &&
      (input->source_dtype < AO_BF16 || input->source_dtype > AO_FP32))
    return AO_BAD_DTYPE;
  const int64_t num_slots = g.num_blocks * g.block_size;
  for (int64_t i = 0; i < input->num_tokens; ++i)
    if (input->slot_mapping[i] >= num_slots) return AO_BAD_SLOT;
  StoreJob job;
  job.geometry = &g;
  job.input = input;
  // Whole prefill chunks only: waking workers costs more than storing decode rows.
  job.chunk = 64;
  if (input->num_tokens <= job.chunk) {
    store_tokens(job, 0, input->num_tokens);
  } else {
    pool->run(store_body, &job, pool->num_threads());
  }
  return AO_OK;
}
