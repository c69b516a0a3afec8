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
  tiles_.clear();
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
  sliding_window_ = input.sliding_window;
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
    const int32_t length = end - begin;
    int32_t position = seq_len - length;
    if (input.query_positions != nullptr) {
      position = input.query_positions[i];
      if (position < 0 || position > kMaxPosition - length) return AO_BAD_LENGTH;
    }
    sequences_.push_back({begin, length, position});
    block_begin_.push_back(int32_t(blocks_.size()));
    const int32_t status = read_blocks(input, i);
    if (status != AO_OK) return status;
  }
  block_begin_.push_back(int32_t(blocks_.size()));
  return AO_OK;
}

// Copies what some row sees. The rest may belong to somebody else by now.
int32_t AoPlan::read_blocks(const AoPlanInput& input, int32_t sequence) {
  const int32_t query_len = sequences_.back().query_len;
  if (query_len == 0) return AO_OK;
  Visible seen = visible_to({sequence, 0, 0, query_len * group_});
  seen.end = std::min(seen.end, input.seq_lens[sequence]);
  if (seen.begin >= seen.end) return AO_OK;
  if (input.block_indices != nullptr) return read_indexed_blocks(input, sequence, seen);
  const int64_t block_size = cache_->geometry.block_size;
  const int64_t first = input.first_block ? input.first_block[sequence] : 0;
  const int64_t end = (seen.end + block_size - 1) / block_size - first;
  if (first < 0 || end > input.max_blocks) return AO_BAD_LENGTH;
  const int32_t* const table = input.block_table + sequence * input.table_stride;
  for (int64_t i = std::max<int64_t>(seen.begin / block_size - first, 0); i < end;
       ++i) {
    const int32_t status = add_block(table[i], (first + i) * block_size, seen);
    if (status != AO_OK) return status;
  }
  return AO_OK;
}

int32_t AoPlan::read_indexed_blocks(const AoPlanInput& input, int32_t sequence,
                                    const Visible& seen) {
  const int64_t block_size = cache_->geometry.block_size;
  const int64_t row = sequence * input.table_stride;
  int32_t before = -1;
  for (int32_t i = 0; i < input.max_blocks; ++i) {
    const int32_t index = input.block_indices[row + i];
    if (index < 0) break;
    if (index <= before) return AO_BAD_LENGTH;
    before = index;
    const int64_t position = index * block_size;
    if (position + block_size <= seen.begin) continue;
    if (position >= seen.end) break;
    const int32_t status = add_block(input.block_table[row + i], position, seen);
    if (status != AO_OK) return status;
  }
  return AO_OK;
}

int32_t AoPlan::add_block(int32_t block, int64_t position, const Visible& seen) {
  const Geometry& g = cache_->geometry;
  if (block < 0 || block >= g.num_blocks) return AO_BAD_BLOCK;
  const int64_t length = std::min<int64_t>(seen.end - position, g.block_size);
  blocks_.push_back({block, int32_t(position), int32_t(length)});
  return AO_OK;
}

Rows AoPlan::tile_of_rows(int32_t sequence, int32_t row) const {
  const int32_t rows = sequences_[size_t(sequence)].query_len * group_;
  return {sequence, 0, row, std::min(kMaxRows, rows - row)};
}

// Keys that some of these rows see.
Visible AoPlan::visible_to(const Rows& rows) const {
  const SequenceRef& sequence = sequences_[size_t(rows.sequence)];
  const int32_t last = (rows.row_begin + rows.row_count - 1) / group_;
  return {visible_keys(sequence, rows.row_begin / group_, sliding_window_).begin,
          visible_keys(sequence, last, sliding_window_).end};
}

// Tiles of a block that are read.
int32_t AoPlan::block_tiles(const BlockRef& block, const Visible& visible) const {
  const int32_t begin = clamp(visible.begin - block.position, 0, block.length);
  const int32_t end = clamp(visible.end - block.position, begin, block.length);
  return begin == end ? 0 : (end + kTile - 1) / kTile - begin / kTile;
}

// Between the first and the last visible block all are read whole: they are not counted
// one by one, which takes longer than planning.
AoPlan::TileWork AoPlan::measure_tile(const Rows& rows) const {
  const Visible visible = visible_to(rows);
  const BlockRef* const all = blocks_.data();
  const BlockRef* first = all + block_begin_[size_t(rows.sequence)];
  const BlockRef* end = all + block_begin_[size_t(rows.sequence) + 1];
  first = std::partition_point(first, end, [&](const BlockRef& block) {
    return block.position + block.length <= visible.begin;
  });
  end = std::partition_point(
      first, end, [&](const BlockRef& block) { return block.position < visible.end; });
  int64_t tiles = 0;
  if (first < end) tiles += block_tiles(*first, visible);
  if (first + 1 < end) tiles += block_tiles(end[-1], visible);
  if (first + 2 < end) {
    const int32_t per_block = (cache_->geometry.block_size + kTile - 1) / kTile;
    tiles += (end - first - 2) * per_block;
  }
  // Two more for reading the query and writing the output.
  return {int32_t(first - all), int32_t(end - all), (tiles + 2) * tile_cost(rows)};
}

// Loading a tile costs about as much as multiplying it by two rows.
int32_t AoPlan::tile_cost(const Rows& rows) const { return rows.row_count + 2; }

int64_t AoPlan::measure() {
  int64_t total = 0;
  for (int32_t s = 0; s < int32_t(sequences_.size()); ++s) {
    const int32_t rows = sequences_[size_t(s)].query_len * group_;
    for (int32_t row = 0; row < rows; row += kMaxRows) {
      tiles_.push_back(measure_tile(tile_of_rows(s, row)));
      total += tiles_.back().cost;
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
  size_t first_tile = 0;
  for (int32_t s = 0; s < int32_t(sequences_.size()); ++s) {
    const int32_t rows = sequences_[size_t(s)].query_len * group_;
    for (int32_t head = 0; head < g.num_kv_heads; ++head) {
      size_t tile = first_tile;
      for (int32_t row = 0; row < rows; row += kMaxRows, ++tile) {
        Rows piece = tile_of_rows(s, row);
        piece.kv_head = head;
        add_piece(piece, tiles_[tile], target);
      }
    }
    first_tile += size_t((rows + kMaxRows - 1) / kMaxRows);
  }
  close_chunk(0, 0);
}

void AoPlan::add_piece(const Rows& rows, const TileWork& work, int64_t target) {
  const int32_t begin = work.block_begin;
  const int32_t end = work.block_end;
  const int64_t cost = work.cost;
  if (cost <= target + target / 4 || end - begin < 2) {
    pieces_.push_back({rows, begin, end, -1, -1});
    return close_chunk(cost, target);
  }
  const int64_t parts = (cost + target - 1) / target;
  const Visible visible = visible_to(rows);
  merges_.push_back({rows, num_partials_, 0});
  int32_t first = begin;
  int64_t part_cost = 0;
  for (int32_t b = begin; b < end; ++b) {
    part_cost += int64_t{block_tiles(blocks_[size_t(b)], visible)} * tile_cost(rows);
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
