// Whether a library runs on the machine that has loaded it. Compiled like the kernels, but needs nothing of what they do.
extern "C" int isthmus_runs_here() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool ok = true;
#ifdef __AVX2__
  ok = ok && __builtin_cpu_supports("avx2");
#endif
#ifdef __FMA__
  ok = ok && __builtin_cpu_supports("fma");
#endif
#ifdef __F16C__
  ok = ok && __builtin_cpu_supports("f16c");
#endif
#ifdef __AVX512F__
  ok = ok && __builtin_cpu_supports("avx512f");
#endif
#ifdef __AVX512BW__
  ok = ok && __builtin_cpu_supports("avx512bw");
#endif
#ifdef __AVX512VL__
  ok = ok && __builtin_cpu_supports("avx512vl");
#endif
#ifdef __AVX512VNNI__
  ok = ok && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef __AVX512BF16__
  ok = ok && __builtin_cpu_supports("avx512bf16");
#endif
  return ok;
#else
  return 1;
#endif
}
