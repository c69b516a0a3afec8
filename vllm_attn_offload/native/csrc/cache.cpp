// SPDX-License-Identifier: Apache-2.0
// Block layout, choice of the ISA, and the read loop behind the bandwidth bound.
#include "cache.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "pool.h"

namespace attn_offload {
namespace {

// What runs on this CPU, best first. Those of lesser CPUs and the emulated pair kernels
// come last: they exist for tests and are chosen by name only.
std::vector<const KernelTable*> runnable_kernels() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  const bool has_vbmi = has_bf16 && __builtin_cpu_supports("avx512vbmi");
  if (has_bf16)
    tables.push_back(has_vbmi ? avx512_vbmi_kernels() : avx512_bf16_kernels());
  if (has_avx512) tables.push_back(avx512_kernels());
  if (has_avx2) tables.push_back(avx2_kernels());
  tables.push_back(portable_kernels());
  if (has_vbmi) tables.push_back(avx512_bf16_shifts_kernels());
  if (has_avx2) tables.push_back(avx2_pairs_kernels());
#else
  tables.push_back(portable_kernels());
#endif
  tables.push_back(portable_pairs_kernels());
  return tables;
}

const KernelTable* find_kernels(const char* isa) {
  const std::vector<const KernelTable*> tables = runnable_kernels();
  if (isa == nullptr) return tables.front();
  for (const KernelTable* table : tables)
    if (strcmp(table->name, isa) == 0) return table;
  return nullptr;
}

bool is_head_size(int32_t size) {
  return size >= 8 && size <= kMaxHeadSize && size % 8 == 0;
}

bool is_valid(const AoGeometryInput& input) {
  return input.num_blocks >= 1 && input.num_blocks <= INT32_MAX &&
         input.block_size >= 1 && input.block_size <= (1 << 24) &&
         input.num_kv_heads >= 1 && input.num_kv_heads <= (1 << 16) &&
         is_head_size(input.head_size) && is_head_size(input.v_head_size) &&
         input.dtype >= AO_BF16 && input.dtype <= AO_FP8_E4M3;
}

Geometry make_geometry(const AoGeometryInput& input) {
  Geometry g = {};
  g.num_blocks = input.num_blocks;
  g.block_size = input.block_size;
  g.num_kv_heads = input.num_kv_heads;
  g.head_size = input.head_size;
  g.v_head_size = input.v_head_size;
  g.v_columns = (input.v_head_size + kTile - 1) / kTile * kTile;
  g.dtype = input.dtype;
  const int64_t tiles = (input.block_size + kTile - 1) / kTile;
  const int64_t bytes = element_bytes(input.dtype);
  g.k_tile_bytes = kTile * g.head_size * bytes;
  g.v_tile_bytes = kTile * g.v_columns * bytes;
  g.head_bytes = tiles * (g.k_tile_bytes + g.v_tile_bytes);
  g.block_bytes = g.num_kv_heads * g.head_bytes;
  g.block_stride = input.block_stride == 0 ? g.block_bytes : input.block_stride;
  return g;
}

struct ReadJob {
  const char* data;
  int64_t bytes;
  int64_t chunk;
  float (*read)(const char*, int64_t);
  std::atomic<int64_t> next{0};
  std::atomic<uint32_t> sink{0};
};

void read_body(void* context, int, Scratch*) {
  ReadJob& job = *static_cast<ReadJob*>(context);
  float sum = 0.0f;
  while (true) {
    const int64_t begin = job.next.fetch_add(1) * job.chunk;
    if (begin >= job.bytes) break;
    sum += job.read(job.data + begin, std::min(job.chunk, job.bytes - begin));
  }
  // A use of the sum, or the compiler drops the loop.
  job.sink.fetch_xor(uint32_t(sum != 0.0f));
}

}  // namespace
}  // namespace attn_offload

using namespace attn_offload;

extern "C" {

int32_t ao_abi_version() { return AO_ABI_VERSION; }

const char* ao_error_text(int32_t status) {
  switch (status) {
    case AO_OK: return "ok";
    case AO_NO_MEMORY: return "out of memory";
    case AO_BAD_GEOMETRY: return "bad geometry";
    case AO_BAD_BLOCK: return "block id outside the cache";
    case AO_BAD_LENGTH: return "lengths that contradict each other or the table";
    case AO_BAD_SLOT: return "slot outside the cache";
    case AO_BAD_HEADS: return "query heads not a multiple of the KV heads";
    case AO_BAD_DTYPE: return "unknown dtype";
    case AO_BAD_ISA: return "instruction set unknown or not on this CPU";
    default: return "unknown status";
  }
}

const char* ao_isa_names() {
  // No std::string: newer compilers call parts of it that older C++ runtimes lack.
  static const std::vector<char> names = [] {
    std::vector<char> list;
    for (const KernelTable* table : runnable_kernels()) {
      if (!list.empty()) list.back() = ' ';
      list.insert(list.end(), table->name, table->name + strlen(table->name) + 1);
    }
    return list;
  }();
  return names.data();
}

int32_t ao_cache_create(const AoGeometryInput* input, const char* isa,
                        AoCache** cache) {
  if (!is_valid(*input)) return AO_BAD_GEOMETRY;
  const Geometry geometry = make_geometry(*input);
  if (geometry.block_stride < geometry.block_bytes || geometry.block_stride % 64 != 0)
    return AO_BAD_GEOMETRY;
  const KernelTable* kernels = find_kernels(isa);
  if (kernels == nullptr) return AO_BAD_ISA;
  *cache = new (std::nothrow) AoCache{geometry, kernels};
  return *cache == nullptr ? AO_NO_MEMORY : AO_OK;
}

void ao_cache_destroy(AoCache* cache) { delete cache; }

const char* ao_cache_isa(const AoCache* cache) { return cache->kernels->name; }

int64_t ao_block_bytes(const AoCache* cache) { return cache->geometry.block_bytes; }

double ao_read_seconds(AoPool* pool, const void* data, int64_t bytes) {
  ReadJob job;
  job.data = static_cast<const char*>(data);
  job.bytes = bytes;
  job.chunk = int64_t{4} << 20;
  job.read = find_kernels(nullptr)->read;
  const int64_t started = now_ns();
  pool->run(read_body, &job, pool->num_threads());
  return double(now_ns() - started) * 1e-9;
}
}
