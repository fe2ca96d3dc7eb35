#include "pool.h"

#include <chrono>
#include <thread>

namespace isthmus {
namespace {

constexpr auto kWatch = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int wanted_threads = 1;

}  // namespace

void Pool::use(int threads) { wanted_threads = threads; }

Pool& Pool::get() {
  static Pool* pool = new Pool;  // never deleted: its threads outlive main
  return *pool;
}

Pool::Pool() {
  workers_ = wanted_threads > 1 ? wanted_threads - 1 : 0;
  for (int i = 0; i < workers_; i++) std::thread([this] { work(); }).detach();
}

// Takes one task of the current job and does it; false when there is none. `seen`: a state that had one.
bool Pool::take(uint64_t seen) {
  if (!has_task(seen)) return false;
  uint64_t state = state_.fetch_add(1, std::memory_order_acq_rel);
  uint64_t index = state & kMask;
  if (!has_task(state)) return false;
  // The job that this task belongs to can't end before it is done, so task_ is its own.
  (*task_)(int64_t(index));
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Pool::work() {
  for (;;) {
    auto until = std::chrono::steady_clock::now() + kWatch;
    int idle = 0;
    while (std::chrono::steady_clock::now() < until) {
      if (take(state_.load(std::memory_order_acquire))) {
        until = std::chrono::steady_clock::now() + kWatch;
        continue;
      }
      for (idle = 0; idle < 32; idle++) pause();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [this] { return has_task(state_.load()); });
    asleep_.fetch_sub(1);
  }
}

void Pool::run(int64_t count, const std::function<void(int64_t)>& task) {
  if (workers_ == 0 || count <= 1 || count > int64_t(kLimit)) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  std::lock_guard<std::mutex> lock(caller_);
  task_ = &task;
  done_.store(0, std::memory_order_relaxed);
  uint64_t number = (state_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
  state_.store(number << 2 * kBits | uint64_t(count) << kBits);
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> awake(sleep_);
    wake_.notify_all();
  }
  while (take(state_.load(std::memory_order_acquire))) {
  }
  while (done_.load(std::memory_order_acquire) < count) pause();
}

}  // namespace isthmus

extern "C" void isthmus_use_threads(int threads) { isthmus::Pool::use(threads); }
