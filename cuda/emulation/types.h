// CUDA's qualifiers and types as plain C++: a kernel becomes a function, a shared array a variable of the host thread
// that runs the blocks.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Uninitialised on purpose: what starts as zero lies together, and shared.h fills exactly that with NaN before a block.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define EMULATION_VECTORS(base, name)                                                                  \
  struct alignas(2 * sizeof(base)) name##2 {                                                           \
    base x, y;                                                                                         \
  };                                                                                                   \
  struct alignas(4 * sizeof(base)) name##4 {                                                           \
    base x, y, z, w;                                                                                   \
  };                                                                                                   \
  constexpr name##2 make_##name##2(base x, base y) { return {x, y}; }                                  \
  constexpr name##4 make_##name##4(base x, base y, base z, base w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float)
EMULATION_VECTORS(int, int)
EMULATION_VECTORS(unsigned, uint)
#undef EMULATION_VECTORS

struct bf16 {
  uint16_t bits;
};
struct half_t {
  uint16_t bits;
};

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }

inline float to_float(half_t x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, also for what is denormal in fp16
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

// float -> E, to nearest even as the processor does it; fp16 takes what is too large for it as +-65504.
template <typename E>
E from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};  // the one NaN that the device writes
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477fe000) return {(uint16_t)(sign | 0x7bff)};  // 65504 and more
  if (magnitude < 0x38800000) {                                     // denormal: 2^-24 becomes the float's last bit
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;   // which 0.5 does with nearest even
    return {(uint16_t)(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {(uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

// Two E in one register, the first in the low half.
template <typename E>
uint32_t pack2(float low, float high) {
  static_assert(sizeof(E) == 2);
  return from_float<E>(low).bits | (uint32_t)from_float<E>(high).bits << 16;
}
