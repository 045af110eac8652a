// What this library is, and what this processor can run.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "vec.h"

RWKV_API int rwkvmpi_lanes() { return rwkv::LANES; }
RWKV_API const char* rwkvmpi_compiler() { return __VERSION__; }

#if defined(__x86_64__)
// Whether the processor has AMX's products of bfloat16 and int8, and this process may use them: Linux grants the tiles'
// registers when asked.
static bool tiles_granted() {
#if defined(__linux__)
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, ALL = BF16 | TILE | INT8;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of arch_prctl, and the state's number in XSAVE
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// 0: portable only, 1: also x86-64-v3 (AVX2, FMA), 2: also x86-64-v4 (AVX-512), 3: also its products of bfloat16 and
// int8 (AVX512_BF16, AVX512_VNNI), 4: also products on tiles (AMX). Asks the operating system's support, too.
RWKV_API int rwkvmpi_processor_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return v3 ? (v4 ? (products ? (tiles_granted() ? 4 : 3) : 2) : 1) : 0;
#else
  return 0;
#endif
}
