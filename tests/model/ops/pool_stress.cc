// Calls the kernels' pool from several threads: every task must run exactly once, and what it writes, which no atomic
// guards, must be seen by its caller. Exits with 1 otherwise.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void call_often(unsigned seed) {
  for (int call = 0; call < 2000; call++) {
    seed = seed * 1664525 + 1013904223;
    int64_t count = (seed >> 16) % 37;
    if (call % 500 == 0) count = 20000;
    std::vector<int> done(count);
    isthmus::Pool::get().run(count, [&](int64_t i) { done[i]++; });
    for (int times : done) check(times == 1, "a task ran never or more than once");
    if (call % 100 == 0) std::this_thread::sleep_for(std::chrono::microseconds(seed % 400));  // workers fall asleep
  }
}

}  // namespace

int main() {
  isthmus::Pool::use(4);
  check(isthmus::Pool::get().threads() == 4, "expected as many threads as it was told");
  int64_t sum = 0;
  isthmus::Pool::get().run(0, [&](int64_t) { sum++; });
  check(sum == 0, "a task of none ran");
  constexpr int64_t kMany = 600000;  // more than the pool counts: the caller does them alone, in order
  isthmus::Pool::get().run(kMany, [&](int64_t i) { sum += i; });
  check(sum == kMany * (kMany - 1) / 2, "a task of very many didn't run once");
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < 6; i++) callers.emplace_back(call_often, i);
  for (std::thread& caller : callers) caller.join();
  std::_Exit(0);  // the pool's threads never end
}
