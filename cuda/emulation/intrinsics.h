// The small functions that kernels take for granted: numbers, bits, cached loads, atomics.
#pragma once
#include <algorithm>
#include <cmath>

#include "block.h"

using std::max;
using std::min;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldca(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> void __stcg(T* p, T value) { *p = value; }
template <typename T> void __stcs(T* p, T value) { *p = value; }

// Vector accesses to other addresses fail on a GPU.
inline void check_vector_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) emulation::fail("a vector at %p, which is not a multiple of 16", p);
}

namespace emulation {

// As atomics to ThreadSanitizer too; relaxed, as on the device.
template <typename T, typename F>
T update(T* p, F change) {
  T before = __atomic_load_n(p, __ATOMIC_RELAXED), after;
  do {
    after = change(before);
  } while (!__atomic_compare_exchange_n(p, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <typename F>
float update(float* p, F change) {
  const auto bits = [&](uint32_t before) {
    return std::bit_cast<uint32_t>(float(change(std::bit_cast<float>(before))));
  };
  typedef uint32_t Bits __attribute__((may_alias));
  return std::bit_cast<float>(uint32_t(update(reinterpret_cast<Bits*>(p), bits)));
}

}  // namespace emulation

// The second argument takes the first one's type, as CUDA's overloads would make it.
template <typename T> T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return T(x + value); });
}
template <typename T> T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return x < value ? value : x; });
}
template <typename T> T atomicMin(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return value < x ? value : x; });
}
template <typename T> T atomicOr(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return T(x | value); });
}
template <typename T> T atomicAnd(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return T(x & value); });
}
template <typename T> T atomicExch(T* p, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T) { return value; });
}
template <typename T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::update(p, [=](T x) { return x == expected ? value : x; });
}
