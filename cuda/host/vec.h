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

// The larger of two; the second one when either is NaN.
RWKV_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
// Keeps NaN in x.
RWKV_INLINE vf clamp(vf x, float lo, float hi) {
  x = x < splat(lo) ? splat(lo) : x;
  return x > splat(hi) ? splat(hi) : x;
}
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
  const vu bits = (vu)as_int(x);
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vi is_nan = x != x;
  return __builtin_convertvector(is_nan ? vu{} + 0x7fc0 : rounded, vh);
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

}  // namespace rwkv
