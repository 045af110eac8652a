// exp, sigmoid, tanh of registers: polynomials, the same bits in every lane, at most 2 units in the last place.
#pragma once
#include "vec.h"

namespace rwkv {

// Adding this to |x| < 2^22 leaves round-to-nearest(x) in the low bits of the sum.
constexpr float ROUND = 12582912.0f;

// Each function below works on K registers side by side, step by step: the steps of one depend on each other, and while
// one result is on its way the processor computes the others'. The bits are those of K calls for one register.
#define RWKV_EACH for (int c = 0; c < K; c++)

RWKV_INLINE vf power_of_2(vi n) { return as_float((n + 127) << 23); }

// e^x = 2^n (1 + p), for |x| < 128
template <int K> RWKV_INLINE void power_parts(const vf (&x)[K], vi (&n)[K], vf (&p)[K]) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, n times the first is exact
  vf shifted[K], whole[K], r[K], q[K];
  RWKV_EACH shifted[c] = fma(x[c], splat(1.44269504f), splat(ROUND));
  RWKV_EACH whole[c] = shifted[c] - splat(ROUND);
  RWKV_EACH n[c] = as_int(shifted[c]) - as_int(splat(ROUND));
  RWKV_EACH r[c] = fma(whole[c], splat(-0.693145751953125f), x[c]);
  RWKV_EACH r[c] = fma(whole[c], splat(-1.428606765330187e-06f), r[c]);
  // p = e^r - 1 = r + r^2 q(r), q by Remez exchange, relative error 5e-11
  RWKV_EACH q[c] = fma(splat(0.00019790242f), r[c], splat(0.0013944758f));
  RWKV_EACH q[c] = fma(q[c], r[c], splat(0.0083334977f));
  RWKV_EACH q[c] = fma(q[c], r[c], splat(0.041666295f));
  RWKV_EACH q[c] = fma(q[c], r[c], splat(0.16666667f));
  RWKV_EACH q[c] = fma(q[c], r[c], splat(0.5f));
  RWKV_EACH p[c] = fma(q[c], r[c] * r[c], r[c]);
}

// x <- e^x
template <int K> RWKV_INLINE void exps(vf (&x)[K]) {
  vi n[K];
  vf p[K];
  RWKV_EACH x[c] = clamp(x[c], -105.0f, 89.0f);  // 0 and Inf lie beyond; NaN passes
  power_parts(x, n, p);
  RWKV_EACH {
    const vi half = n[c] >> 1;  // in two steps, as n may be 128 or below -126
    x[c] = (p[c] + splat(1.0f)) * power_of_2(half) * power_of_2(n[c] - half);
  }
}

// x <- e^x for x <= 88: the same bits with less work. Below -88 it is less than any normal number, so 0.
template <int K> RWKV_INLINE void bounded_exps(vf (&x)[K]) {
  vi n[K];
  vf p[K];
  RWKV_EACH x[c] = larger(splat(-88.0f), x[c]);  // so n >= -127, where the power comes out as 0
  power_parts(x, n, p);
  RWKV_EACH x[c] = (p[c] + splat(1.0f)) * power_of_2(n[c]);
}

// x <- 1 / (1 + e^x), at most 2 units in the last place. Beyond the bounds it is 1, or less than any normal number.
template <int K> RWKV_INLINE void falling_sigmoids(vf (&x)[K]) {
  vi n[K];
  vf p[K];
  RWKV_EACH x[c] = clamp(x[c], -87.0f, 87.9f);
  power_parts(x, n, p);
  RWKV_EACH {
    const vf power = power_of_2(n[c]);
    x[c] = power + fma(power, p[c], splat(1.0f));
  }
  RWKV_EACH x[c] = splat(1.0f) / x[c];
}

template <int K> RWKV_INLINE void sigmoids(vf (&x)[K]) {
  RWKV_EACH x[c] = -x[c];
  falling_sigmoids(x);
}

#undef RWKV_EACH

RWKV_INLINE vf exp(vf x) {
  vf one[1] = {x};
  exps(one);
  return one[0];
}
RWKV_INLINE vf falling_sigmoid(vf x) {
  vf one[1] = {x};
  falling_sigmoids(one);
  return one[0];
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
