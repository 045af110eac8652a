// The recurrences of RWKV-5, 6 and 7 over successive tokens of one head, for one block of its value rows. Every value
// row has an order of operations of its own, so its bits depend neither on the block nor on where tokens are cut.
#pragma once
#include "wkv_state.h"

namespace rwkv {

// How many of a head's n value rows lie in the block that begins at row `value`; known when compiling if N is.
template <int VECS, int N> RWKV_INLINE int64_t rows_of_block(int64_t n, int64_t value) {
  constexpr int64_t width = VECS * LANES;
  if (N && N % width == 0) return width;
  return n - value < width ? n - value : width;
}

// The same number. Without it GCC keeps a pointer into every operand up to date from token to token, has too few
// registers for them, and puts some into vector registers, where they queue behind the multiply-adds (measured: 20%).
RWKV_INLINE int64_t hidden(int64_t at) {
  asm("" : "+r"(at));
  return at;
}

// WKV-7's operands of a head's first token; `stride` floats further those of the next one.
struct Wkv7Rows {
  const float *r, *w, *k, *v, *a, *b;
  int64_t stride;
};

// One token:  S <- S diag(w) + (S a) b^T + v k^T,  y = S r.  The product S a of the NEXT token is gathered while this
// token's state is in registers, so the state is read and written once a token: five multiply-adds per element.
template <int VECS, int N, bool LAST>
RWKV_INLINE void wkv7_token(const Wkv7Rows& x, int64_t at, int64_t n, const vf (&v)[VECS], vf (&sa)[VECS],
                            vf (&y)[VECS], StateBlock<VECS> block) {
  const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *b = x.b + at, *a_next = x.a + at + x.stride;
  vf sa_next[VECS] = {};
  for (int64_t j = 0; j < (N ? N : n); j++) {
    const vf wj = splat(w[j]), bj = splat(b[j]), kj = splat(k[j]), rj = splat(r[j]);
    const vf aj = LAST ? vf{} : splat(a_next[j]);
    for (int c = 0; c < VECS; c++) {
      const vf s = fma(block.at(j, c), wj, fma(sa[c], bj, v[c] * kj));
      block.set(j, c, s);
      y[c] = fma(s, rj, y[c]);
      if (!LAST) sa_next[c] = fma(s, aj, sa_next[c]);
    }
  }
  for (int c = 0; c < VECS; c++) sa[c] = sa_next[c];
}

// `count` tokens for the value rows from `value` on; y: that of the first token, `y_stride` floats further the next.
// ahead(t) is called before token t.
template <int VECS, int N, class Ahead>
RWKV_INLINE void wkv7_tokens(const Wkv7Rows& x, int64_t count, int64_t n, int64_t value, float* y, int64_t y_stride,
                             StateBlock<VECS> block, Ahead ahead) {
  const int64_t values = rows_of_block<VECS, N>(n, value);
  if (!count) return;
  vf sa[VECS] = {};
  for (int64_t j = 0; j < (N ? N : n); j++)
    for (int c = 0; c < VECS; c++) sa[c] = fma(block.at(j, c), splat(x.a[j]), sa[c]);
  for (int64_t t = 0; t < count; t++) {
    ahead(t);
    const int64_t at = hidden(t * x.stride);
    vf v[VECS], out[VECS] = {};
    load_values<VECS>(v, x.v + at + value, values);
    if (t + 1 < count)
      wkv7_token<VECS, N, false>(x, at, n, v, sa, out, block);
    else
      wkv7_token<VECS, N, true>(x, at, n, v, sa, out, block);
    store_values<VECS>(y + t * y_stride + value, out, values);
  }
}

// WKV-6's, and WKV-5's with the decay of every token in one place: a w_stride of 0.
struct Wkv6Rows {
  const float *r, *w, *k, *v;
  int64_t stride, w_stride;
};

// y = (S + v (u*k)^T) r,  S <- S diag(w) + v k^T.  bonus(t): the sum over the head of u k r.
template <int VECS, int N, class Bonus, class Ahead>
RWKV_INLINE void wkv6_tokens(const Wkv6Rows& x, int64_t count, int64_t n, int64_t value, float* y, int64_t y_stride,
                             StateBlock<VECS> block, Bonus bonus, Ahead ahead) {
  const int64_t values = rows_of_block<VECS, N>(n, value);
  for (int64_t t = 0; t < count; t++) {
    ahead(t);
    const int64_t at = hidden(t * x.stride);
    const float *r = x.r + at, *k = x.k + at, *w = x.w + t * x.w_stride;
    vf v[VECS], out[VECS];
    load_values<VECS>(v, x.v + at + value, values);
    const vf now = splat(bonus(t));
    for (int c = 0; c < VECS; c++) out[c] = v[c] * now;
    for (int64_t j = 0; j < (N ? N : n); j++) {
      const vf wj = splat(w[j]), kj = splat(k[j]), rj = splat(r[j]);
      for (int c = 0; c < VECS; c++) {
        const vf s = block.at(j, c);
        out[c] = fma(s, rj, out[c]);
        block.set(j, c, fma(s, wj, v[c] * kj));
      }
    }
    store_values<VECS>(y + t * y_stride + value, out, values);
  }
}

}  // namespace rwkv
