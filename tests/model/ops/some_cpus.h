// In the place of libc's: CPUS of them, however many the machine has. To be included where that is defined.
#pragma once
#if defined(__linux__)
#include <sched.h>

extern "C" int sched_getaffinity(pid_t, size_t size, cpu_set_t* set) noexcept {
  CPU_ZERO_S(size, set);
  for (int cpu = 0; cpu < CPUS; cpu++) CPU_SET_S(cpu, size, set);
  return 0;
}
#endif
