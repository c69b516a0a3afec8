// SPDX-License-Identifier: Apache-2.0
// One step's work, split into chunks that threads take in turn. Reused between steps:
// nothing is allocated once the vectors have grown.
#ifndef ATTN_OFFLOAD_PLAN_H_
#define ATTN_OFFLOAD_PLAN_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cache.h"
#include "types.h"

struct AoPlan {
 public:
  explicit AoPlan(const AoCache* cache) : cache_(cache) {}

  // Copies what it needs of `input`. The plan is empty after an error.
  int32_t build(const AoPlanInput& input, int num_threads);
  int32_t attend(AoPool* pool, const AoAttendInput& input, int64_t budget_ns);
  // Whether a layer is work for several threads.
  bool is_split() const { return num_chunks() > 1; }

 private:
  struct Slice;
  // Blocks that a tile of rows sees, and what it costs for one KV head.
  struct TileWork {
    int32_t block_begin;
    int32_t block_end;
    int64_t cost;
  };
  // What a thread was at when the time of its slice was over.
  struct Paused {
    attn_offload::Span span;
    std::unique_ptr<float[]> state;  // of a begun piece
  };

  void clear();
  int32_t read_sequences(const AoPlanInput& input);
  int32_t read_blocks(const AoPlanInput& input, int32_t sequence);
  int32_t read_indexed_blocks(const AoPlanInput& input, int32_t sequence,
                              const attn_offload::Visible& seen);
  int32_t add_block(int32_t block, int64_t position, const attn_offload::Visible& seen);
  int64_t measure();
  void split(int num_threads, int64_t total_cost);
  void add_piece(const attn_offload::Rows& rows, const TileWork& work, int64_t target);
  void close_chunk(int64_t cost, int64_t target);
  void reserve_partials();
  attn_offload::Rows tile_of_rows(int32_t sequence, int32_t row) const;
  int32_t block_tiles(const attn_offload::BlockRef& block,
                      const attn_offload::Visible& visible) const;
  attn_offload::Visible visible_to(const attn_offload::Rows& rows) const;
  TileWork measure_tile(const attn_offload::Rows& rows) const;
  int32_t tile_cost(const attn_offload::Rows& rows) const;
  void begin_layer();
  int32_t num_chunks() const { return int32_t(chunk_begin_.size()) - 1; }
  void work(Slice& slice, attn_offload::Scratch* scratch);
  bool take(const Slice& slice, Paused* task);
  bool pause(const Slice& slice, const attn_offload::Span& span,
             const attn_offload::Scratch* scratch);
  void merge_finished(const Slice& slice, int32_t begin, int32_t end,
                      attn_offload::Scratch* scratch);

  const AoCache* const cache_;
  int32_t num_query_heads_ = 0;
  int32_t group_ = 1;
  int32_t sliding_window_ = 0;
  std::vector<attn_offload::SequenceRef> sequences_;
  std::vector<int32_t> block_begin_;            // of each sequence, and the end
  std::vector<attn_offload::BlockRef> blocks_;  // positions rise within a sequence
  std::vector<TileWork> tiles_;                 // each tile of rows
  std::vector<attn_offload::Piece> pieces_;
  std::vector<attn_offload::Merge> merges_;
  std::vector<int32_t> chunk_begin_;  // first piece of each chunk, and the end
  int64_t open_chunk_cost_ = 0;
  int32_t num_partials_ = 0;
  std::vector<float> partials_;
  std::unique_ptr<std::atomic<int32_t>[]> pending_;  // partials a merge waits for
  size_t pending_size_ = 0;
  // Of the layer that is being attended, kept between its slices.
  bool is_running_ = false;
  std::atomic<int32_t> next_chunk_{0};
  std::mutex mutex_;  // guards paused_
  std::vector<Paused> paused_;
};

#endif  // ATTN_OFFLOAD_PLAN_H_
