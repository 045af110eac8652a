// The time mix of RWKV-5 and 6 between its matrix products. They differ in the decay: RWKV-6 makes one for every token,
// RWKV-5 has the same for all.
#include <initializer_list>

#include "time_mix.h"

namespace rwkv {
namespace {

enum { R, W, K, V, Y, ARRAYS };  // the rows of a token in scratch memory

struct TimeMix6 {
  int64_t heads, n;
  Segments segments;
  const float *r, *k, *v, *w_lin, *gate;  // [tokens, heads, n]; w_lin null: static decay; gate may be null
  const float *decay, *u, *weight, *bias;  // [heads, n]; decay: time_decay, or with a static decay the decay itself
  float* state;
  Sink h;
  float eps;

  template <int N, class Scratch>
  RWKV_INLINE void prepare(const Scratch& s, int64_t at, int64_t p, int64_t count, float* bonus) const {
    const int64_t size = N ? N : n, stride = heads * size;
    for (int64_t t = 0; t < count; t++)
      bonus[t] = row_sum(size, [&](int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
        const int64_t o = at + t * stride + i, c = p + i;
        const vf receptance = load(r + o, left), key = load(k + o, left);
        store(s.row(t, R) + i, receptance);
        store(s.row(t, K) + i, key);
        store(s.row(t, V) + i, load(v + o, left));
        if (w_lin) store(s.row(t, W) + i, load(decay + c, left) + load(w_lin + o, left));
        return load(u + c, left) * key * receptance;
      });
    if (!w_lin) return;
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      load_group(x, s.row(t, W) + i);
      for (vf& sum : x) sum = smaller(splat(88.0f), sum);  // the decay is 0 long before
      bounded_exps(x);
      store_group(s.row(t, W) + i, x);
    });
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      load_group(x, s.row(t, W) + i);
      for (vf& rate : x) rate = -rate;
      bounded_exps(x);
      store_group(s.row(t, W) + i, x);
    });
  }

  // groupnorm(y) * silu(gate)
  template <int N, class Scratch>
  RWKV_INLINE void finish(const Scratch& s, int64_t at, int64_t p, int64_t count) const {
    const int64_t size = N ? N : n, stride = heads * size;
    BlockMoments m;
    block_moments<N>(s.row(0, Y), s.stride(), count, size, eps, m);
    each_group<N>(size, count, [&](auto& x, int64_t t, int64_t i) RWKV_INLINE_LAMBDA {
      const int64_t o = at + t * stride + i, left = N ? LANES : size - i;
      if (gate) {
        load_group(x, gate + o, left);
        sigmoids(x);
      }
      for (int c = 0; c < SIDE_BY_SIDE<N>; c++) {
        const int64_t j = c * LANES;
        const int64_t l = p + i + j;
        vf y = normalised(load(s.row(t, Y) + i + j), m.of(t), load(weight + l, left), load(bias + l, left));
        if (gate) y = y * (load(gate + o + j, left) * x[c]);
        h(o + j, y, left);
      }
    });
  }

  template <int VECS, int N> void run(int64_t segment, int64_t head) const {
    const int64_t size = N ? N : n, stride = heads * size, p = head * size;
    const int64_t first = segments.first(segment) * stride + p, length = segments.length(segment);
    const HeadScratch<VECS, N, ARRAYS> s(size);
    const float* w = w_lin ? s.row(0, W) : decay + p;
    const Wkv6Rows rows = {s.row(0, R), w, s.row(0, K), s.row(0, V), s.stride(), w_lin ? s.stride() : 0};
    float bonus[TOKENS];
    run_head(
        s, state + (segment * heads + head) * size * size, length,
        [&](int64_t t, int64_t count) { prepare<N>(s, first + t * stride, p, count, bonus); },
        [&](int64_t t, int64_t count, int64_t value, StateBlock<VECS> block) {
          const auto ahead = [&](int64_t i) {
            if (value || t + i + TOKENS >= length) return;
            for (const float* input : {r, k, v, w_lin, gate})
              if (input) prefetch(input + first + (t + i + TOKENS) * stride, size);
          };
          wkv6_tokens<VECS, N>(rows, count, size, value, s.row(0, Y), s.stride(), block,
                               [&](int64_t i) { return bonus[i]; }, ahead);
        },
        [&](int64_t t, int64_t count) { finish<N>(s, first + t * stride, p, count); });
  }
};

}  // namespace
}  // namespace rwkv

// From the products r, k, v, w_lin, gate [tokens, heads * n] to the output product's input h (float or bfloat16).
//   w = exp(-exp(decay + w_lin)), or decay itself where w_lin is null,  y = WKV-6(r, w, k, v, u),
//   h = groupnorm(y) * silu(gate), without the gate where it is null
// state: [segments, heads, n(value), n(key)], updated in place; rows: [segments, 2].
RWKV_API void rwkvmpi_v6_time_mix(const float* r, const float* k, const float* v, const float* w_lin, const float* gate,
                                  const float* decay, const float* u, const float* weight, const float* bias,
                                  float* state, const int32_t* rows, void* h, int h_bf16, int64_t tokens, int64_t heads,
                                  int64_t n, int64_t segments, float eps, int threads) {
  const rwkv::TimeMix6 x = {heads, n, {rows, segments}, r,     k,           v,  w_lin, gate,
                            decay, u, weight,           bias, state, {h, h_bf16}, eps};
  rwkv::clear_gaps(x.segments, tokens, heads * n, x.h);
  rwkv::run_heads(x, x.segments, heads, n, threads);
}
RWKV_RECORDABLE(rwkvmpi_v6_time_mix)
