// Inputs and outputs that are float or bfloat16, decided at run time. All arithmetic is in float.
#pragma once
#include "vec.h"

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
// Of n values from p; the variance is that of the differences from the mean, in a second pass.
RWKV_INLINE Moments moments(const float* p, int64_t n, float eps) {
  const float mean = row_sum(n, [&](int64_t i, int64_t left) { return load(p + i, left); }) / (float)n;
  const float squares = row_sum(n, [&](int64_t i, int64_t left) {
    const vf d = first_lanes(load(p + i, left) - splat(mean), left);
    return d * d;
  });
  return {mean, 1.0f / __builtin_sqrtf(squares / (float)n + eps)};
}

RWKV_INLINE vf normalised(vf x, Moments m, vf weight, vf bias) {
  return fma((x - splat(m.mean)) * splat(m.inverse), weight, bias);
}

}  // namespace rwkv
