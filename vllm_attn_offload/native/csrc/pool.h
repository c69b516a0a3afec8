// SPDX-License-Identifier: Apache-2.0
// A persistent thread pool that runs one job at a time; concurrent callers queue.
#ifndef ATTN_OFFLOAD_POOL_H_
#define ATTN_OFFLOAD_POOL_H_

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "types.h"

namespace attn_offload {

// std::condition_variable as far as the pool uses it. Since GCC 12 that one waits with
// a symbol that C++ runtimes of manylinux_2_28 lack.
class Condition {
 public:
  Condition() = default;
  ~Condition() { pthread_cond_destroy(&condition_); }
  Condition(const Condition&) = delete;
  Condition& operator=(const Condition&) = delete;

  template <class Predicate>
  void wait(std::unique_lock<std::mutex>& lock, Predicate is_done) {
    while (!is_done()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
  }
  void notify_one() { pthread_cond_signal(&condition_); }
  void notify_all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

}  // namespace attn_offload

// The calling thread is thread 0 of its own job, so a pool of one starts no thread. A
// worker that wakes up late is not waited for: the others take its share.
struct AoPool {
 public:
  using Body = void (*)(void* context, int thread, attn_offload::Scratch* scratch);

  AoPool(int num_threads, const int32_t* cpu_ids, int64_t spin_ns);
  ~AoPool();
  AoPool(const AoPool&) = delete;
  AoPool& operator=(const AoPool&) = delete;

  int num_threads() const { return int(workers_.size()) + 1; }

  // Says that a job will come soon: workers that sleep wake up and spin for it.
  void expect_job();

  // Runs body on the caller and on up to max_threads - 1 workers; body takes its share
  // from a counter in `context` and returns when nothing is left.
  void run(Body body, void* context, int max_threads);

 private:
  void work(int thread, int cpu_id);
  void stop();
  bool wait_for_job(uint64_t seen, uint64_t* seen_expected, bool may_spin);
  void wait_for_workers();

  const int64_t spin_ns_;
  std::mutex callers_;  // held for the length of a job
  std::mutex mutex_;    // guards what follows
  attn_offload::Condition job_started_;
  attn_offload::Condition worker_left_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};  // workers inside body
  uint64_t expected_ = 0;       // counts calls of expect_job
  bool is_open_ = false;        // whether workers may still join
  bool is_stopping_ = false;
  int max_workers_ = 0;
  int joined_ = 0;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::unique_ptr<attn_offload::Scratch[]> scratch_;  // one per thread
  std::vector<std::thread> workers_;
};

namespace attn_offload {

int64_t now_ns();
void pin_current_thread(int32_t cpu_id);

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls is_done until it holds or spin_ns have passed; returns whether it held.
template <class Predicate>
bool spin_until(int64_t spin_ns, Predicate is_done) {
  if (is_done()) return true;
  if (spin_ns <= 0) return false;
  const int64_t deadline = now_ns() + spin_ns;
  do {
    for (int i = 0; i < 16; ++i) {
      cpu_relax();
      if (is_done()) return true;
    }
  } while (now_ns() < deadline);
  return false;
}

}  // namespace attn_offload

#endif  // ATTN_OFFLOAD_POOL_H_
