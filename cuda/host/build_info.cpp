// What this library is, and what this processor can run.
#include "vec.h"

RWKV_API int rwkvmpi_lanes() { return rwkv::LANES; }
RWKV_API const char* rwkvmpi_compiler() { return __VERSION__; }

// 0: portable only, 1: also x86-64-v3 (AVX2, FMA), 2: also x86-64-v4 (AVX-512). Asks the operating system's support,
// too.
RWKV_API int rwkvmpi_processor_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v3 ? (v4 ? 2 : 1) : 0;
#else
  return 0;
#endif
}
