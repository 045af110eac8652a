// Inputs and outputs that are float or bfloat16, decided at run time. All arithmetic is in float.
#pragma once
#include "parallel.h"

namespace rwkv {

struct Source {
  const void* data;
  int is_bf16;
  RWKV_INLINE vf operator()(int64_t at, int64_t lanes) const {
    return is_bf16 ? load((const bf16*)data + at, lanes) : load((const float*)data + at, lanes);
  }
};

struct Sink {
  void* data;
  int is_bf16;
  RWKV_INLINE void operator()(int64_t at, vf x, int64_t lanes) const {
    if (is_bf16)
      store((bf16*)data + at, x, lanes);
    else
      store((float*)data + at, x, lanes);
  }
};

// Lanes from n on become zero.
RWKV_INLINE vf first_lanes(vf x, int64_t n) {
  if (__builtin_expect(n >= LANES, 1)) return x;
  float padded[LANES] = {};
  std::memcpy(padded, &x, n * sizeof(float));
  return load(padded);
}

struct Moments {
  float mean, inverse;  // inverse of the standard deviation
};
// Of ROWS rows of n values from p, `stride` apart; the variance is that of the differences from the mean, in a second
// pass. A row's bits do not depend on the number of rows.
template <int ROWS>
RWKV_INLINE void moments(const float* p, int64_t stride, int64_t n, float eps, Moments (&m)[ROWS]) {
  float sums[ROWS];
  row_sums(n, sums, [&](int row, int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
    return load(p + row * stride + i, left);
  });
  for (int row = 0; row < ROWS; row++) m[row].mean = sums[row] / (float)n;
  row_sums(n, sums, [&](int row, int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
    const vf d = first_lanes(load(p + row * stride + i, left) - splat(m[row].mean), left);
    return d * d;
  });
  for (int row = 0; row < ROWS; row++) m[row].inverse = 1.0f / __builtin_sqrtf(sums[row] / (float)n + eps);
}
RWKV_INLINE Moments moments(const float* p, int64_t n, float eps) {
  Moments one[1];
  moments(p, 0, n, eps, one);
  return one[0];
}

RWKV_INLINE vf normalised(vf x, Moments m, vf weight, vf bias) {
  return fma((x - splat(m.mean)) * splat(m.inverse), weight, bias);
}

// Rows of no segment become 0.
template <class T> inline void clear_gaps(const Segments& segments, int64_t tokens, int64_t channels, T* rows) {
  segments.gaps(tokens, [&](int64_t begin, int64_t end) {
    std::memset(rows + begin * channels, 0, (end - begin) * channels * sizeof(T));
  });
}
inline void clear_gaps(const Segments& segments, int64_t tokens, int64_t channels, Sink rows) {
  if (rows.is_bf16)
    clear_gaps(segments, tokens, channels, (bf16*)rows.data);
  else
    clear_gaps(segments, tokens, channels, (float*)rows.data);
}

}  // namespace rwkv
