#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jinn {
namespace {

constexpr int kSpins = 4'000;  // some 0.1 ms, less than a decoding step takes

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs' worth of time that the cgroup grants (version 2, then 1); 0 where there is no limit.
int cgroup_quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period && quota != "max") return std::max(1, static_cast<int>(std::stod(quota) / period));
  const std::string v1_quota = first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  const std::string v1_period = first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (v1_quota.empty() || v1_period.empty() || v1_quota[0] == '-') return 0;
  return std::max(1, static_cast<int>(std::stod(v1_quota) / std::stod(v1_period)));
}

}  // namespace

int default_num_threads() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const std::string siblings = first_line(topology + "thread_siblings_list");
    cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
  }
  const int num_cores = std::max(1, static_cast<int>(cores.size()));
  const int quota = cgroup_quota();
  return quota > 0 ? std::min(num_cores, quota) : num_cores;
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {
  for (int thread = 1; thread < num_threads_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) const {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;; ++seen) {
    wait_for_change(generation_, seen);
    if (stopping_) return;
    (*task_)(thread);
    num_done_.fetch_add(1, std::memory_order_release);
    num_done_.notify_one();
  }
}

void ThreadPool::run(const std::function<void(int)>& task) {
  const std::lock_guard<std::mutex> lock(one_run_);
  task_ = &task;
  num_done_.store(0, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  task(0);
  const uint32_t workers = static_cast<uint32_t>(num_threads_ - 1);
  for (uint32_t done = num_done_.load(std::memory_order_acquire); done != workers;
       done = num_done_.load(std::memory_order_acquire)) {
    wait_for_change(num_done_, done);
  }
}

void ThreadPool::for_each(int64_t count, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;
  run([&](int) {
    try {
      for (int64_t item = next++; item < count; item = next++) task(item);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_lock);
      if (!error) error = std::current_exception();
      next = count;
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace jinn
