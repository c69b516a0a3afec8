// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <sched.h>
#include <time.h>

#include <exception>

namespace attn_offload {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
}

void pin_current_thread(int32_t cpu_id) {
  if (cpu_id < 0 || cpu_id >= CPU_SETSIZE) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu_id, &set);
  sched_setaffinity(0, sizeof set, &set);
}

}  // namespace attn_offload

using attn_offload::now_ns;
using attn_offload::spin_until;

AoPool::AoPool(int num_threads, const int32_t* cpu_ids, int64_t spin_ns)
    : spin_ns_(spin_ns), scratch_(new attn_offload::Scratch[size_t(num_threads)]) {
  workers_.reserve(size_t(num_threads - 1));
  try {
    for (int i = 1; i < num_threads; ++i)
      workers_.emplace_back(&AoPool::work, this, i, cpu_ids ? cpu_ids[i] : -1);
  } catch (...) {  // the host has no more threads
    stop();
    throw;
  }
}

AoPool::~AoPool() { stop(); }

void AoPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
    generation_.fetch_add(1);
  }
  job_started_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void AoPool::run(Body body, void* context, int max_threads) {
  std::lock_guard<std::mutex> turn(callers_);
  if (workers_.empty() || max_threads <= 1) {
    body(context, 0, &scratch_[0]);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = body;
    context_ = context;
    max_workers_ = max_threads - 1;
    joined_ = 0;
    is_open_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  job_started_.notify_all();
  body(context, 0, &scratch_[0]);
  wait_for_workers();
}

void AoPool::expect_job() {
  if (workers_.empty() || spin_ns_ == 0) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++expected_;
  }
  job_started_.notify_all();
}

void AoPool::wait_for_workers() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = false;
  }
  const auto all_left = [this] { return active_.load(std::memory_order_acquire) == 0; };
  if (spin_until(spin_ns_, all_left)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  worker_left_.wait(lock, all_left);
}

// Spins only if the last job came within the spin time, or one is expected: an idle node
// never does.
bool AoPool::wait_for_job(uint64_t seen, uint64_t* seen_expected, bool may_spin) {
  const auto has_job = [this, seen] {
    return generation_.load(std::memory_order_acquire) != seen;
  };
  const int64_t started = now_ns();
  bool has_come = spin_until(may_spin ? spin_ns_ : 0, has_job);
  while (!has_come) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      job_started_.wait(lock,
                        [&] { return has_job() || expected_ != *seen_expected; });
      *seen_expected = expected_;
    }
    has_come = spin_until(spin_ns_, has_job);
  }
  return now_ns() - started <= spin_ns_;
}

void AoPool::work(int thread, int cpu_id) {
  if (cpu_id >= 0) attn_offload::pin_current_thread(cpu_id);
  uint64_t seen = 0;
  uint64_t seen_expected = 0;
  bool may_spin = false;
  while (true) {
    may_spin = wait_for_job(seen, &seen_expected, may_spin);
    Body body;
    void* context;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      seen = generation_.load(std::memory_order_relaxed);
      seen_expected = expected_;
      if (is_stopping_) return;
      if (!is_open_ || joined_ >= max_workers_) continue;
      ++joined_;
      active_.fetch_add(1, std::memory_order_relaxed);
      body = body_;
      context = context_;
    }
    body(context, thread, &scratch_[size_t(thread)]);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      active_.fetch_sub(1, std::memory_order_release);
    }
    worker_left_.notify_one();
  }
}

extern "C" {

AoPool* ao_pool_create(int32_t num_threads, const int32_t* cpu_ids, int64_t spin_ns) {
  if (num_threads < 1) return nullptr;
  try {
    return new AoPool(num_threads, cpu_ids, spin_ns);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void ao_pool_destroy(AoPool* pool) { delete pool; }
}
