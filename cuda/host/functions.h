// exp, sigmoid, tanh of a register: polynomials, the same bits in every lane, at most 2 units in the last place.
#pragma once
#include "vec.h"

namespace rwkv {

// Adding this to |x| < 2^22 leaves round-to-nearest(x) in the low bits of the sum.
constexpr float ROUND = 12582912.0f;

// e^x = 2^n (1 + p), for |x| < 128
struct PowerParts {
  vi n;
  vf p;
};
RWKV_INLINE PowerParts power_parts(vf x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, n times the first is exact
  const vf shifted = fma(x, splat(1.44269504f), splat(ROUND));
  const vf n = shifted - splat(ROUND);
  vf r = fma(n, splat(-0.693145751953125f), x);
  r = fma(n, splat(-1.428606765330187e-06f), r);
  // p = e^r - 1 = r + r^2 q(r), q by Remez exchange, relative error 5e-11
  vf q = fma(splat(0.00019790242f), r, splat(0.0013944758f));
  q = fma(q, r, splat(0.0083334977f));
  q = fma(q, r, splat(0.041666295f));
  q = fma(q, r, splat(0.16666667f));
  q = fma(q, r, splat(0.5f));
  return {as_int(shifted) - as_int(splat(ROUND)), fma(q, r * r, r)};
}
RWKV_INLINE vf power_of_2(vi n) { return as_float((n + 127) << 23); }

RWKV_INLINE vf exp(vf x) {
  const PowerParts e = power_parts(clamp(x, -105.0f, 89.0f));  // 0 and Inf lie beyond; NaN passes
  const vi half = e.n >> 1;                                    // in two steps, as n may be 128 or below -126
  return (e.p + splat(1.0f)) * power_of_2(half) * power_of_2(e.n - half);
}

// 1 / (1 + e^x), at most 2 units in the last place. Beyond the bounds it is 1, or less than any normal number.
RWKV_INLINE vf falling_sigmoid(vf x) {
  const PowerParts e = power_parts(clamp(x, -87.0f, 87.9f));
  const vf power = power_of_2(e.n);
  return splat(1.0f) / (power + fma(power, e.p, splat(1.0f)));
}

RWKV_INLINE vf sigmoid(vf x) { return falling_sigmoid(-x); }

RWKV_INLINE vf tanh(vf x) {
  const vf a = magnitude(x);
  const vf far = fma(splat(-2.0f), falling_sigmoid(a + a), splat(1.0f));
  // near 0: x + x^3 q(x^2)
  const vf z = x * x;
  vf q = fma(splat(0.0020977214f), z, splat(-0.008129001f));
  q = fma(q, z, splat(0.021681642f));
  q = fma(q, z, splat(-0.0539434f));
  q = fma(q, z, splat(0.1333318f));
  q = fma(q, z, splat(-0.3333333f));
  const vf near = fma(z * q, x, x);
  const vf signed_far = as_float(as_int(far) | (as_int(x) & INT32_MIN));
  return a < splat(0.625f) ? near : signed_far;
}

RWKV_INLINE vf silu(vf x) { return x * sigmoid(x); }

RWKV_INLINE vf relu_squared(vf x) {
  const vf p = x < splat(0.0f) ? splat(0.0f) : x;  // NaN stays
  return p * p;
}

}  // namespace rwkv
