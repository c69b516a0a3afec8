// SPDX-License-Identifier: Apache-2.0
// Attends a planned layer, at once or in slices: see README.md.
#include <algorithm>
#include <new>
#include <utility>

#include "plan.h"
#include "pool.h"

using namespace attn_offload;

namespace {

// About 100 us of a sliced layer, in cache elements times rows.
constexpr int64_t kClockWork = int64_t{1200} * kTile * 256;

// The clock is not read where there is no deadline.
bool now_is_over(int64_t deadline_ns) {
  return deadline_ns != INT64_MAX && now_ns() >= deadline_ns;
}

}  // namespace

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
  const float unit = g.dtype == AO_FP8_E4M3 ? kFp8Unit : 1.0f;
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
               sliding_window_,
               input.softmax_scale * input.k_scale * unit,
               input.v_scale * unit};
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

extern "C" int32_t ao_attend(AoPool* pool, AoPlan* plan, const AoAttendInput* input,
                             int64_t budget_ns) {
  try {
    return plan->attend(pool, *input, budget_ns);
  } catch (const std::bad_alloc&) {
    return AO_NO_MEMORY;
  }
}