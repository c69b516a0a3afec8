// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <new>

#include "pool.h"

using namespace attn_offload;

namespace {

constexpr int kChunksPerThread = 8;  // the last chunk to finish wastes 6 % at most
// Cost units (tiles of 16 x 128 elements times rows + 2) that take about 15 us: less is
// not worth another thread.
constexpr int64_t kMinChunkCost = 200;
constexpr int32_t kMaxPosition = 1 << 30;
}  // namespace

void AoPlan::clear() {
  sequences_.clear();
  block_begin_.clear();
  blocks_.clear();
  costs_.clear();
  pieces_.clear();
  merges_.clear();
  chunk_begin_.clear();
  open_chunk_cost_ = 0;
  num_partials_ = 0;
  paused_.clear();
  is_running_ = false;
}

int32_t AoPlan::build(const AoPlanInput& input, int num_threads) {
  clear();
  const int32_t num_kv_heads = cache_->geometry.num_kv_heads;
  if (input.num_query_heads < 1 || input.num_query_heads % num_kv_heads != 0)
    return AO_BAD_HEADS;
  num_query_heads_ = input.num_query_heads;
  group_ = input.num_query_heads / num_kv_heads;
  causal_ = input.causal != 0;
  sliding_window_ = input.sliding_window;
  is_in_order_ = input.block_positions == nullptr && input.block_lens == nullptr;
  const int32_t status = read_sequences(input);
  if (status != AO_OK) {
    clear();
    return status;
  }
  split(num_threads, measure());
  reserve_partials();
  return AO_OK;
}

int32_t AoPlan::read_sequences(const AoPlanInput& input) {
  for (int32_t i = 0; i < input.num_seqs; ++i) {
    const int32_t begin = input.query_start_loc[i];
    const int32_t end = input.query_start_loc[i + 1];
    const int32_t seq_len = input.seq_lens[i];
    if (begin < 0 || end < begin || seq_len < 0 || seq_len > kMaxPosition)
      return AO_BAD_LENGTH;
    sequences_.push_back({begin, end - begin, seq_len});
    block_begin_.push_back(int32_t(blocks_.size()));
    const int32_t status = read_blocks(input, i);
    if (status != AO_OK) return status;
  }
  block_begin_.push_back(int32_t(blocks_.size()));
  return AO_OK;
}

int32_t AoPlan::read_blocks(const AoPlanInput& input, int32_t sequence) {
  const Geometry& g = cache_->geometry;
  const int64_t row = sequence * input.table_stride;
  const int32_t seq_len = input.seq_lens[sequence];
  const bool is_read = sequences_.back().query_len > 0;
  int64_t count = input.max_blocks;
  if (is_in_order_) {
    count = (int64_t{seq_len} + g.block_size - 1) / g.block_size;
    if (count > input.max_blocks) return AO_BAD_LENGTH;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position =
        input.block_positions ? input.block_positions[row + i] : i * g.block_size;
    int64_t length = std::clamp<int64_t>(seq_len - position, 0, g.block_size);
    if (input.block_lens != nullptr) length = input.block_lens[row + i];
    if (length == 0) continue;
    if (position < 0 || position > kMaxPosition || length < 0 || length > g.block_size)
      return AO_BAD_LENGTH;
    const int32_t block = input.block_table[row + i];
    if (block < 0 || block >= g.num_blocks) return AO_BAD_BLOCK;
    if (is_read) blocks_.push_back({block, int32_t(position), int32_t(length)});
  }
  return AO_OK;
}

Rows AoPlan::tile_of_rows(int32_t sequence, int32_t row) const {
  const int32_t rows = sequences_[size_t(sequence)].query_len * group_;
  return {sequence, 0, row, std::min(kMaxRows, rows - row)};
}

// Tiles of a block that these rows read.
int32_t AoPlan::block_tiles(const BlockRef& block, const Rows& rows,
                            int32_t window) const {
  const SequenceRef& sequence = sequences_[size_t(rows.sequence)];
  const int32_t last = (rows.row_begin + rows.row_count - 1) / group_;
  const Visible oldest =
      visible_keys(sequence, rows.row_begin / group_, causal_, window);
  const Visible newest = visible_keys(sequence, last, causal_, window);
  const int32_t begin = clamp(oldest.begin - block.position, 0, block.length);
  const int32_t end = clamp(newest.end - block.position, begin, block.length);
  return begin == end ? 0 : (end + kTile - 1) / kTile - begin / kTile;
}

// Tiles of all blocks that these rows read. Between the first and the last visible
// block all are read whole: not counted one by one, which takes longer than planning.
int64_t AoPlan::visible_tiles(const Rows& rows) const {
  const size_t sequence = size_t(rows.sequence);
  int32_t first = block_begin_[sequence];
  const int32_t end = block_begin_[sequence + 1];
  int64_t tiles = 0;
  while (first < end) {
    tiles += block_tiles(blocks_[size_t(first)], rows, sliding_window_);
    ++first;
    if (is_in_order_ && tiles > 0) break;
  }
  int32_t last = end;
  while (last > first) {
    --last;
    const int32_t read = block_tiles(blocks_[size_t(last)], rows, sliding_window_);
    tiles += read;
    if (is_in_order_ && read > 0) break;
  }
  const int32_t block_size = cache_->geometry.block_size;
  return tiles + int64_t{last - first} * ((block_size + kTile - 1) / kTile);
}

// Loading a tile costs about as much as multiplying it by two rows.
int32_t AoPlan::tile_cost(const Rows& rows) const { return rows.row_count + 2; }

int64_t AoPlan::measure() {
  int64_t total = 0;
  for (int32_t s = 0; s < int32_t(sequences_.size()); ++s) {
    const int32_t rows = sequences_[size_t(s)].query_len * group_;
    for (int32_t row = 0; row < rows; row += kMaxRows) {
      const Rows tile = tile_of_rows(s, row);
      // Two more for reading the query and writing the output.
      costs_.push_back((visible_tiles(tile) + 2) * tile_cost(tile));
      total += costs_.back();
    }
  }
  return total * cache_->geometry.num_kv_heads;
}

void AoPlan::split(int num_threads, int64_t total_cost) {
  const Geometry& g = cache_->geometry;
  const int64_t min_cost = kMinChunkCost * 256 / (g.head_size + g.v_columns);
  const int64_t target =
      num_threads == 1
          ? INT64_MAX / 4
          : std::max(min_cost, total_cost / (int64_t{num_threads} * kChunksPerThread));
  chunk_begin_.push_back(0);
  size_t first_cost = 0;
  for (int32_t s = 0; s < int32_t(sequences_.size()); ++s) {
    const int32_t rows = sequences_[size_t(s)].query_len * group_;
    for (int32_t head = 0; head < g.num_kv_heads; ++head) {
      size_t cost = first_cost;
      for (int32_t row = 0; row < rows; row += kMaxRows, ++cost) {
        Rows tile = tile_of_rows(s, row);
        tile.kv_head = head;
        add_piece(tile, costs_[cost], target);
      }
    }
    first_cost += size_t((rows + kMaxRows - 1) / kMaxRows);
  }
  close_chunk(0, 0);
}

void AoPlan::add_piece(const Rows& rows, int64_t cost, int64_t target) {
  const int32_t begin = block_begin_[size_t(rows.sequence)];
  const int32_t end = block_begin_[size_t(rows.sequence) + 1];
  if (cost <= target + target / 4 || end - begin < 2) {
    pieces_.push_back({rows, begin, end, -1, -1});
    return close_chunk(cost, target);
  }
  const int64_t parts = (cost + target - 1) / target;
  merges_.push_back({rows, num_partials_, 0});
  int32_t first = begin;
  int64_t part_cost = 0;
  for (int32_t b = begin; b < end; ++b) {
    part_cost += int64_t{block_tiles(blocks_[size_t(b)], rows, sliding_window_)} *
                 tile_cost(rows);
    if (part_cost * parts < cost && b + 1 < end) continue;
    pieces_.push_back(
        {rows, first, b + 1, num_partials_++, int32_t(merges_.size()) - 1});
    ++merges_.back().num_partials;
    close_chunk(part_cost, target);
    first = b + 1;
    part_cost = 0;
  }
}

// Counts the piece just added and ends its chunk once that is large enough.
void AoPlan::close_chunk(int64_t cost, int64_t target) {
  open_chunk_cost_ += cost;
  if (open_chunk_cost_ < target || chunk_begin_.back() == int32_t(pieces_.size()))
    return;
  chunk_begin_.push_back(int32_t(pieces_.size()));
  open_chunk_cost_ = 0;
}

void AoPlan::reserve_partials() {
  const size_t stride = size_t(kMaxRows) * (size_t(cache_->geometry.v_columns) + 2);
  if (partials_.size() < size_t(num_partials_) * stride)
    partials_.resize(size_t(num_partials_) * stride);
  if (pending_size_ < merges_.size()) {
    pending_size_ = merges_.size() * 2;
    pending_.reset(new std::atomic<int32_t>[pending_size_]);
  }
}

extern "C" {

AoPlan* ao_plan_create(const AoCache* cache) {
  return new (std::nothrow) AoPlan(cache);
}

void ao_plan_destroy(AoPlan* plan) { delete plan; }

int32_t ao_plan_step(AoPlan* plan, const AoPool* pool, const AoPlanInput* input) {
  try {
    return plan->build(*input, pool->num_threads());
  } catch (const std::bad_alloc&) {
    return AO_NO_MEMORY;
  }
}
}
