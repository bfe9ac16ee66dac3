// A persistent pool of threads that run one function together.
//
// Workers claim items from shared counters, so who computes what never decides how it is computed. Between runs they
// spin briefly, then sleep. The calling thread takes part as thread 0.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace jinn {

// Physical cores of this process's affinity mask, at most the cgroup's CPU quota.
int default_num_threads();

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Calls task(thread) once on each thread and returns when all have returned. One caller at a time.
  void run(const std::function<void(int)>& task);

  // Calls task(item) for each item below `count`, whichever thread claims it. Rethrows the first exception.
  void for_each(int64_t count, const std::function<void(int64_t)>& task);

  // Inside run: returns once every thread has arrived, and the last of them has called alone(). The others call
  // meanwhile(), again and again until it returns false.
  template <class Alone, class Meanwhile>
  void barrier(Alone&& alone, Meanwhile&& meanwhile) {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      num_arrived_.store(0, std::memory_order_relaxed);
      alone();
      phase_.fetch_add(1, std::memory_order_release);
      phase_.notify_all();
    } else {
      while (phase_.load(std::memory_order_acquire) == phase && meanwhile()) {
      }
      wait_for_change(phase_, phase);
    }
  }

  // That its threads have met at so far.
  int64_t num_barriers() const { return phase_.load(std::memory_order_relaxed); }

 private:
  void work(int thread);
  void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) const;

  int num_threads_;
  std::mutex one_run_;
  const std::function<void(int)>* task_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::vector<std::thread> workers_;
};

}  // namespace jinn
