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
// About 30 us of a sliced layer, in cache elements times rows.
constexpr int64_t kClockWork = 2 * kMinChunkCost * kTile * 256;

// The clock is not read where there is no deadline.
bool now_is_over(int64_t deadline_ns) {
  return deadline_ns != INT64_MAX && now_ns() >= deadline_ns;
}

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
  const int32_t status = read_sequences(input);
  if (status != AO_OK) {
    clear();
    return status;
  }
  split(num_threads, measure(sliding_window_));
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
  int64_t count = input.max_blocks;
  if (input.block_positions == nullptr && input.block_lens == nullptr) {
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
    blocks_.push_back({block, int32_t(position), int32_t(length)});
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

// Loading a tile costs about as much as multiplying it by two rows.
int32_t AoPlan::tile_cost(const Rows& rows) const { return rows.row_count + 2; }

int64_t AoPlan::measure(int32_t sliding_window) {
  int64_t total = 0;
  for (int32_t s = 0; s < int32_t(sequences_.size()); ++s) {
    const int32_t rows = sequences_[size_t(s)].query_len * group_;
    for (int32_t row = 0; row < rows; row += kMaxRows) {
      const Rows tile = tile_of_rows(s, row);
      int64_t tiles = 2;  // reading the query and writing the output
      for (int32_t b = block_begin_[size_t(s)]; b < block_begin_[size_t(s) + 1]; ++b)
        tiles += block_tiles(blocks_[size_t(b)], tile, sliding_window);
      costs_.push_back(tiles * tile_cost(tile));
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
    pieces_.push_back({rows, first, b + 1, num_partials_++,
                       int32_t(merges_.size()) - 1});
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

struct AoPlan::Slice {
  AoPlan* plan;
  Job job;
  int64_t deadline_ns;
  int64_t work;   // between two looks at the clock
  bool is_first;  // of its layer: nothing is paused
};

void AoPlan::begin_layer() {
  for (size_t i = 0; i < merges_.size(); ++i)
    pending_[i].store(merges_[i].num_partials, std::memory_order_relaxed);
  next_chunk_.store(0, std::memory_order_relaxed);
  is_running_ = true;
}

int32_t AoPlan::attend(AoPool* pool, const AoAttendInput& input, int64_t budget_ns) {
  if (input.query_dtype < AO_BF16 || input.query_dtype > AO_FP32 ||
      input.out_dtype < AO_BF16 || input.out_dtype > AO_FP32)
    return AO_BAD_DTYPE;
  if (pieces_.empty()) return AO_OK;
  const bool is_first = !is_running_;
  if (budget_ns > 0) paused_.reserve(paused_.size() + size_t(pool->num_threads()));
  if (is_first) begin_layer();
  const Geometry& g = cache_->geometry;
  Slice slice;
  slice.plan = this;
  slice.job = {&g,
               &input,
               sequences_.data(),
               blocks_.data(),
               pieces_.data(),
               partials_.data(),
               state_floats(g),
               num_query_heads_,
               group_,
               causal_};
  slice.deadline_ns = budget_ns > 0 ? now_ns() + budget_ns : INT64_MAX;
  slice.work = budget_ns > 0 ? kClockWork : INT64_MAX;
  slice.is_first = is_first;
  const auto body = [](void* raw, int, Scratch* scratch) {
    Slice& shared = *static_cast<Slice*>(raw);
    shared.plan->work(shared, scratch);
  };
  const int32_t next = next_chunk_.load(std::memory_order_relaxed);
  pool->run(body, &slice, int(paused_.size()) + num_chunks() - next);
  // Every thread that found no chunk has counted on.
  const int32_t taken = std::min(num_chunks(), next_chunk_.load());
  next_chunk_.store(taken, std::memory_order_relaxed);
  is_running_ = taken < num_chunks() || !paused_.empty();
  return is_running_ ? AO_UNFINISHED : AO_OK;
}

// Takes chunks until none is left or the time is over. A result does not depend on who
// computes what, nor on where a slice ends.
void AoPlan::work(Slice& slice, Scratch* scratch) {
  Paused task;
  while (take(slice, &task)) {
    Span& span = task.span;
    const int32_t begin = span.piece;
    bool is_paused = false;
    do {
      cache_->kernels->run(slice.job, slice.work, &span, scratch);
      is_paused = now_is_over(slice.deadline_ns) && span.piece < span.piece_end &&
                  pause(slice, span, scratch);
    } while (span.piece < span.piece_end && !is_paused);
    // Not before the scratch is free.
    merge_finished(slice, begin, span.piece, scratch);
    if (now_is_over(slice.deadline_ns)) return;
  }
}

// The paused first: so there are never more of them than threads.
bool AoPlan::take(const Slice& slice, Paused* task) {
  if (!slice.is_first) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!paused_.empty()) {
      *task = std::move(paused_.back());
      paused_.pop_back();
      return true;
    }
  }
  const int32_t chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
  if (chunk >= num_chunks()) return false;
  const size_t index = size_t(chunk);
  *task = {{chunk_begin_[index], chunk_begin_[index + 1], false, 0, 0, nullptr}, {}};
  return true;
}

// False where there is no memory for the state: then the thread goes on.
bool AoPlan::pause(const Slice& slice, const Span& span, const Scratch* scratch) {
  Paused paused = {span, nullptr};
  if (span.is_begun) {
    const size_t floats = size_t(slice.job.partial_stride);
    paused.state.reset(new (std::nothrow) float[floats]);
    if (paused.state == nullptr) return false;
    const Rows& rows = pieces_[size_t(span.piece)].rows;
    cache_->kernels->save(slice.job, rows, scratch, paused.state.get());
    paused.span.state = paused.state.get();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  paused_.push_back(std::move(paused));
  return true;
}

// Whoever finishes the last part of a split piece merges it, in the order of the parts.
void AoPlan::merge_finished(const Slice& slice, int32_t begin, int32_t end,
                            Scratch* scratch) {
  for (int32_t i = begin; i < end; ++i) {
    const int32_t merge = pieces_[size_t(i)].merge;
    if (merge < 0) continue;
    if (pending_[size_t(merge)].fetch_sub(1, std::memory_order_acq_rel) == 1)
      cache_->kernels->merge(slice.job, merges_[size_t(merge)], scratch);
  }
}

extern "C" {

AoPlan* ao_plan_create(const AoCache* cache) { return new (std::nothrow) AoPlan(cache); }

void ao_plan_destroy(AoPlan* plan) { delete plan; }

int32_t ao_plan_step(AoPlan* plan, const AoPool* pool, const AoPlanInput* input) {
  try {
    return plan->build(*input, pool->num_threads());
  } catch (const std::bad_alloc&) {
    return AO_NO_MEMORY;
  }
}

int32_t ao_attend(AoPool* pool, AoPlan* plan, const AoAttendInput* input,
                  int64_t budget_ns) {
  try {
    return plan->attend(pool, *input, budget_ns);
  } catch (const std::bad_alloc&) {
    return AO_NO_MEMORY;
  }
}
}
