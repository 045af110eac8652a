// RWKV-7's time mix between its matrix products.
#include <initializer_list>

#include "time_mix.h"

namespace rwkv {
namespace {

enum { R, W, K_, V, A, B, Y, ARRAYS };  // the rows of a token in scratch memory

struct TimeMix7 {
  int64_t heads, n;
  Segments segments;
  const float *r, *k, *v, *w_lin, *a_lin, *v_lin, *g, *v_first;  // [tokens, heads, n]
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *weight, *bias;   // [heads, n]
  float* state;
  Sink h;
  float* v_out;
  float eps;

  // The operands of WKV-7 for `count` tokens; `at`: the first one's place in the inputs, p the head's in the vectors.
  template <int N, class Scratch>
  RWKV_INLINE void prepare(const Scratch& s, int64_t at, int64_t p, int64_t count, float* bonus) const {
    const int64_t size = N ? N : n, stride = heads * size;
    alignas(64) float inverse[TOKENS] = {};
    for (int64_t t = 0; t < count; t++)
      inverse[t] = row_sum(size, [&](int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
        const vf kk = load(k + at + t * stride + i, left) * load(k_k + p + i, left);
        return kk * kk;
      });
    const vf one = splat(1.0f), least = splat(1e-12f), decay = splat(-0.6065306597126334f);
    for (int64_t t = 0; t < count; t += LANES) {
      const vf length = sqrt(load(inverse + t));
      store(inverse + t, one / (length < least ? least : length));  // NaN stays
    }
    // One pass for each function: in a longer one the processor does not see far enough ahead to fill waiting times.
    constexpr int K = SIDE_BY_SIDE<N>;
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      load_sums(x, w0 + p + i, w_lin + at + t * stride + i, N ? LANES : size - i);
      sigmoids(x);
      for (int c = 0; c < K; c++) x[c] = decay * x[c];
      store_group(s.row(t, W) + i, x);
    });
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      load_group(x, s.row(t, W) + i);
      bounded_exps(x);
      store_group(s.row(t, W) + i, x);
    });
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      const int64_t o = at + t * stride + i, left = N ? LANES : size - i;
      Group<N> own;
      load_group(own, v + o, left);
      if (v_first) {
        load_sums(x, v0 + p + i, v_lin + o, left);
        sigmoids(x);
        for (int c = 0; c < K; c++) own[c] = fma(load(v_first + o + c * LANES, left) - own[c], x[c], own[c]);
      } else {
        for (int c = 0; c < K; c++) store(v_out + o + c * LANES, own[c], left);
      }
      store_group(s.row(t, V) + i, own);
    });
    Wide sum = {};
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      const int64_t o = at + t * stride + i, left = N ? LANES : size - i;
      load_sums(x, a0 + p + i, a_lin + o, left);
      sigmoids(x);
      for (int c = 0; c < K; c++) {
        const int64_t j = c * LANES, l = p + i + j;
        const vf key = load(k + o + j, left), kk = key * load(k_k + l, left) * splat(inverse[t]);
        const vf new_key = key * fma(x[c] - one, load(k_a + l, left), one), receptance = load(r + o + j, left);
        store(s.row(t, R) + i + j, receptance);
        store(s.row(t, K_) + i + j, new_key);
        store(s.row(t, A) + i + j, -kk);
        store(s.row(t, B) + i + j, kk * x[c]);
        sum.part[(i / LANES + c) % PARTS] += receptance * new_key * load(r_k + l, left);
      }
      if (i + K * LANES >= size) {
        bonus[t] = rwkv::sum(sum);
        sum = {};
      }
    });
  }

  // (groupnorm(y) + bonus v) * g
  template <int N, class Scratch>
  RWKV_INLINE void finish(const Scratch& s, int64_t at, int64_t p, int64_t count, const float* bonus) const {
    const int64_t size = N ? N : n, stride = heads * size;
    BlockMoments m;
    block_moments<N>(s.row(0, Y), s.stride(), count, size, eps, m);
    for (int64_t t = 0; t < count; t++)
      each_register<N>(size, [&](int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
        const int64_t o = at + t * stride + i, c = p + i;
        const vf normal = normalised(load(s.row(t, Y) + i), m.of(t), load(weight + c, left), load(bias + c, left));
        h(o, fma(splat(bonus[t]), load(s.row(t, V) + i), normal) * load(g + o, left), left);
      });
  }

  template <int VECS, int N> void run(int64_t segment, int64_t head) const {
    const int64_t size = N ? N : n, stride = heads * size, p = head * size;
    const int64_t first = segments.first(segment) * stride + p, length = segments.length(segment);
    const HeadScratch<VECS, N, ARRAYS> s(size);
    const Wkv7Rows rows = {s.row(0, R), s.row(0, W), s.row(0, K_), s.row(0, V), s.row(0, A), s.row(0, B), s.stride()};
    float bonus[TOKENS];
    run_head(
        s, state + (segment * heads + head) * size * size, length,
        [&](int64_t t, int64_t count) { prepare<N>(s, first + t * stride, p, count, bonus); },
        [&](int64_t t, int64_t count, int64_t value, StateBlock<VECS> block) {
          wkv7_tokens<VECS, N>(rows, count, size, value, s.row(0, Y), s.stride(), block, [&](int64_t i) {
            if (value || t + i + TOKENS >= length) return;
            const int64_t ahead = first + (t + i + TOKENS) * stride;
            for (const float* input : {r, k, v, w_lin, a_lin, g}) prefetch(input + ahead, size);
            if (v_first) {
              prefetch(v_lin + ahead, size);
              prefetch(v_first + ahead, size);
            }
          });
        },
        [&](int64_t t, int64_t count) { finish<N>(s, first + t * stride, p, count, bonus); });
  }
};

}  // namespace
}  // namespace rwkv

// From the products r, k, v, w_lin, a_lin, v_lin, g [tokens, heads * n] to the output product's input h (float or
// bfloat16). v_first, v_lin and v0 are null in the first layer, which writes v_out instead.
//   w = exp(-e^(-1/2) sigmoid(w0 + w_lin)),  a = sigmoid(a0 + a_lin),  kk = k*k_k of length 1 per head,
//   k' = k (1 + (a-1) k_a),  v' = v + (v_first - v) sigmoid(v0 + v_lin),  y = WKV-7(r, w, k', v', -kk, kk*a),
//   h = (groupnorm(y) + (sum over head of r k' r_k) v') * g
// state: [segments, heads, n(value), n(key)], updated in place; rows: [segments, 2].
RWKV_API void rwkvmpi_v7_time_mix(const float* r, const float* k, const float* v, const float* w_lin,
                                  const float* a_lin, const float* v_lin, const float* g, const float* v_first,
                                  const float* w0, const float* a0, const float* v0, const float* k_k,
                                  const float* k_a, const float* r_k, const float* weight, const float* bias,
                                  float* state, const int32_t* rows, void* h, int h_bf16, float* v_out, int64_t tokens,
                                  int64_t heads, int64_t n, int64_t segments, float eps, int threads) {
  const rwkv::TimeMix7 x = {heads, n,  {rows, segments},
                            r,     k,  v,   w_lin, a_lin, v_lin,  g,    v_first,
                            w0,    a0, v0,  k_k,   k_a,   r_k,    weight, bias,
                            state, {h, h_bf16}, v_out, eps};
  rwkv::clear_gaps(x.segments, tokens, heads * n, x.h);
  if (!v_first) rwkv::clear_gaps(x.segments, tokens, heads * n, v_out);
  rwkv::run_heads(x, x.segments, heads, n, threads);
}
RWKV_RECORDABLE(rwkvmpi_v7_time_mix)
