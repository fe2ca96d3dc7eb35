// The threads of all kernels, the caller being one of them. How many is the loader's to say (library.py).
//
// A model's step is many short kernels with short operations of XLA between them, so a worker watches for the next one for
// a while before it sleeps. It never waits for XLA's threads, nor they for it: a caller does what no worker has taken.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

namespace isthmus {

class Pool {
 public:
  // How many threads the pool will have; to be said before the first get().
  static void use(int threads);

  // The process's pool; its threads start here and end with the process.
  static Pool& get();

  int threads() const { return workers_ + 1; }

  // Calls task(i) once for every i in [0, count), on any thread, and returns when all have returned. XLA may run several
  // kernels at once; they go one after the other, each with all threads. A task must not call run.
  void run(int64_t count, const std::function<void(int64_t)>& task);

 private:
  Pool();
  void work();
  bool take(uint64_t seen);

  // The state of the current job in one word, so that a thread takes a task and learns whose it is in one step:
  // its number (24 bits), how many tasks it has (20), how many are taken (20).
  static constexpr int kBits = 20;
  static constexpr uint64_t kMask = (1u << kBits) - 1;
  static bool has_task(uint64_t state) { return (state & kMask) < (state >> kBits & kMask); }
  static constexpr uint64_t kLimit = kMask / 2;  // threads that come too late count on past the last task

  int workers_ = 0;
  std::mutex caller_;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  const std::function<void(int64_t)>* task_ = nullptr;
};

}  // namespace isthmus
