// The vectors of every CPU kernel: one native register of floats, 16, 8 or 4 lanes by what this library is compiled
// for. A lane never looks at its neighbours, and a tail is a full register padded with zeros, so the bits of an
// element do not depend on where in a row it stands. Sums over a row always run over 16 virtual lanes in one fixed
// order; with a hardware FMA (AVX-512, AVX2, NEON) the bits are therefore the same at every width.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define RWKV_API extern "C" __attribute__((visibility("default")))
#define RWKV_INLINE inline __attribute__((always_inline))
#define RWKV_INLINE_LAMBDA __attribute__((always_inline))  // [&](...) RWKV_INLINE_LAMBDA { ... }

namespace rwkv {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int WIDE = 16;             // virtual lanes of a row sum
constexpr int PARTS = WIDE / LANES;  // registers that hold them

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef float vf4 __attribute__((vector_size(16)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

RWKV_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 is x with its sign, also for -0
RWKV_INLINE vi as_int(vf x) { return (vi)x; }
RWKV_INLINE vf as_float(vi x) { return (vf)x; }

RWKV_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger or smaller of two; the second one when either is NaN.
RWKV_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
RWKV_INLINE vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
// Keeps NaN in x.
RWKV_INLINE vf clamp(vf x, float lo, float hi) { return smaller(splat(hi), larger(splat(lo), x)); }
RWKV_INLINE vf magnitude(vf x) { return as_float(as_int(x) & 0x7fffffff); }
RWKV_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// bfloat16 -> float is exact; float -> bfloat16 rounds to nearest even, and a NaN becomes the quiet NaN 0x7fc0.
RWKV_INLINE vf widen(vh x) { return as_float((vi)(__builtin_convertvector(x, vu) << 16)); }
RWKV_INLINE vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);  // as below, but for the bits of a NaN, and denormal numbers become 0
#else
  const vu bits = (vu)as_int(x);
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi is_nan = x != x;
  return __builtin_convertvector(is_nan ? vu{} + 0x7fc0 : rounded, vh);
#endif
}

// float16 -> float is exact, also where the result is normal and float16's own number was not.
RWKV_INLINE vf widen_half(vh x) {
  const vi bits = (vi)__builtin_convertvector(x, vu), size = bits & 0x7fff;
  const vi rebias = (vi{} + 112) << 23;
  vi result = (size << 13) + rebias;
  result += size >= 0x7c00 ? rebias : vi{};  // infinity and NaN
  const vf small = __builtin_convertvector(size, vf) * (vf{} + 0x1p-24f);
  result = size < 0x400 ? as_int(small) : result;
  return as_float(result | (bits & 0x8000) << 16);
}

RWKV_INLINE vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RWKV_INLINE vf load(const bf16* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return widen(x);
}
RWKV_INLINE vf load(const fp16* p) {
  vh x;
  std::memcpy(&x, p, sizeof x);
  return widen_half(x);
}
RWKV_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
RWKV_INLINE void store(bf16* p, vf x) {
  const vh h = narrow(x);
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes (n >= 1, at most LANES are used); the other lanes are zero, or are not written.
template <class T> RWKV_INLINE vf load(const T* p, int64_t n) {
  if (__builtin_expect(n >= LANES, 1)) return load(p);
  T padded[LANES] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T> RWKV_INLINE void store(T* p, vf x, int64_t n) {
  if (__builtin_expect(n >= LANES, 1)) return store(p, x);
  T padded[LANES];
  store(padded, x);
  std::memcpy(p, padded, n * sizeof(T));
}

// Asks for n floats that are needed soon. An address past the end does no harm.
RWKV_INLINE void prefetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
  asm volatile("");  // else GCC takes a function that only prefetches for one without effects, and drops its calls
}

// Two registers, one behind the other.
RWKV_INLINE void store_pair(float* p, vf a, vf b) {
  store(p, a);
  store(p + LANES, b);
}
RWKV_INLINE void store_pair(bf16* p, vf a, vf b) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
  store(p, a);
  store(p + LANES, b);
#endif
}

// The 16 virtual lanes of a row sum.
struct Wide {
  vf part[PARTS];
};
// Adds the 16 lanes: i with i + 8, then i + 4, i + 2, i + 1, at every register width.
RWKV_INLINE float sum(const Wide& w) {
  vf4 q[4];
  std::memcpy(q, &w, sizeof q);
  const vf4 s = (q[0] + q[2]) + (q[1] + q[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
RWKV_INLINE float largest(const Wide& w) {
  float t[WIDE];
  std::memcpy(t, &w, sizeof t);
  for (int half = WIDE / 2; half; half /= 2)
    for (int i = 0; i < half; i++) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
  return t[0];
}

// sum over i < n of f(i, lanes left): f returns one register beginning at element i, its lanes past the end being
// zero.
template <class F> RWKV_INLINE float row_sum(int64_t n, F f) {
  Wide acc = {};
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE)
    for (int p = 0; p < PARTS; p++) acc.part[p] += f(i + p * LANES, (int64_t)LANES);
  for (int p = 0; i < n; p++, i += LANES) acc.part[p] += f(i, n - i);
  return sum(acc);
}

// The same for ROWS rows at a time, f(row, i, lanes left): one row's additions wait for each other, those of several
// rows do not.
template <int ROWS, class F> RWKV_INLINE void row_sums(int64_t n, float (&sums)[ROWS], F f) {
  Wide acc[ROWS] = {};
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE)
    for (int p = 0; p < PARTS; p++)
      for (int row = 0; row < ROWS; row++) acc[row].part[p] += f(row, i + p * LANES, (int64_t)LANES);
  for (int p = 0; i < n; p++, i += LANES)
    for (int row = 0; row < ROWS; row++) acc[row].part[p] += f(row, i, n - i);
  for (int row = 0; row < ROWS; row++) sums[row] = sum(acc[row]);
}

}  // namespace rwkv
