// SPDX-License-Identifier: Apache-2.0
// Query rows in, output rows and LSE out, partial states merged.
#ifndef ATTN_OFFLOAD_ROWS_H_
#define ATTN_OFFLOAD_ROWS_H_

#include <math.h>
#include <string.h>

#include "elements.h"
#include "types.h"

namespace attn_offload {
namespace {

struct RowAddress {
  int64_t token;
  int64_t head;
};

static inline RowAddress row_address(const Job& job, const Rows& rows, int32_t r) {
  const int32_t row = rows.row_begin + r;
  return {job.sequences[rows.sequence].query_begin + int64_t{row / job.group},
          int64_t{rows.kv_head} * job.group + row % job.group};
}

static inline void begin_rows(const Job& job, const Rows& rows, bool as_pairs,
                              Scratch* scratch) {
  const Geometry& g = *job.geometry;
  const AoAttendInput& input = *job.input;
  const int64_t row_bytes = int64_t{g.head_size} * element_bytes(input.query_dtype);
  for (int32_t r = 0; r < rows.row_count; ++r) {
    const RowAddress at = row_address(job, rows, r);
    const char* source = static_cast<const char*>(input.query) +
                         at.token * input.query_stride + at.head * row_bytes;
    if (as_pairs) {
      memcpy(scratch->query_pairs + r * (g.head_size / 2), source, size_t(row_bytes));
    } else {
      load_row(source, input.query_dtype, g.head_size,
               scratch->query + r * g.head_size);
    }
    scratch->row_max[r] = -INFINITY;
    scratch->row_sum[r] = 0.0f;
  }
  memset(scratch->out, 0, size_t(rows.row_count) * g.v_columns * sizeof(float));
}

// Divides by the sum, counts the sink and writes output and LSE.
static inline void finish_rows(const Job& job, const Rows& rows,
                               const Scratch* scratch) {
  const Geometry& g = *job.geometry;
  const AoAttendInput& input = *job.input;
  const int64_t row_bytes = int64_t{g.v_head_size} * element_bytes(input.out_dtype);
  for (int32_t r = 0; r < rows.row_count; ++r) {
    const RowAddress at = row_address(job, rows, r);
    float maximum = scratch->row_max[r];
    float sum = scratch->row_sum[r];
    float factor = 1.0f;
    if (input.sinks != nullptr) {
      const float sink = input.sinks[at.head];
      const float larger = fmaxf(maximum, sink);
      factor = maximum == -INFINITY ? 0.0f : expf(maximum - larger);
      sum = sum * factor + (sink == -INFINITY ? 0.0f : expf(sink - larger));
      maximum = larger;
    }
    const bool is_empty = sum == 0.0f;
    const float scale = is_empty ? 0.0f : job.value_scale * factor / sum;
    store_row(scratch->out + int64_t{r} * g.v_columns, scale, input.out_dtype,
              g.v_head_size,
              static_cast<char*>(input.out) + at.token * input.out_stride +
                  at.head * row_bytes);
    if (input.lse != nullptr)
      input.lse[at.token * job.num_query_heads + at.head] =
          is_empty ? -INFINITY : maximum + logf(sum);
  }
}

static inline float* partial_at(const Job& job, int32_t index) {
  return job.partials + int64_t{index} * job.partial_stride;
}

static void save_rows(const Job& job, const Rows& rows, const Scratch* scratch,
                      float* state) {
  const size_t count = size_t(rows.row_count);
  memcpy(state, scratch->row_max, count * sizeof(float));
  memcpy(state + kMaxRows, scratch->row_sum, count * sizeof(float));
  memcpy(state + 2 * kMaxRows, scratch->out,
         count * job.geometry->v_columns * sizeof(float));
}

static inline void restore_rows(const Job& job, const Rows& rows, const float* state,
                                Scratch* scratch) {
  const size_t count = size_t(rows.row_count);
  memcpy(scratch->row_max, state, count * sizeof(float));
  memcpy(scratch->row_sum, state + kMaxRows, count * sizeof(float));
  memcpy(scratch->out, state + 2 * kMaxRows,
         count * job.geometry->v_columns * sizeof(float));
}

static void merge_partials(const Job& job, const Merge& merge, Scratch* scratch) {
  const int32_t columns = job.geometry->v_columns;
  for (int32_t r = 0; r < merge.rows.row_count; ++r) {
    float maximum = -INFINITY;
    for (int32_t i = 0; i < merge.num_partials; ++i)
      maximum = fmaxf(maximum, partial_at(job, merge.first_partial + i)[r]);
    float* out = scratch->out + int64_t{r} * columns;
    memset(out, 0, size_t(columns) * sizeof(float));
    float sum = 0.0f;
    for (int32_t i = 0; i < merge.num_partials; ++i) {
      const float* partial = partial_at(job, merge.first_partial + i);
      if (partial[r] == -INFINITY) continue;
      const float factor = expf(partial[r] - maximum);
      sum += partial[kMaxRows + r] * factor;
      const float* part = partial + 2 * kMaxRows + int64_t{r} * columns;
      for (int32_t c = 0; c < columns; ++c) out[c] += part[c] * factor;
    }
    scratch->row_max[r] = maximum;
    scratch->row_sum[r] = sum;
  }
  finish_rows(job, merge.rows, scratch);
}

}  // namespace
}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_ROWS_H_
