// WKV-6 and WKV-5:  y = (S + v (u*k)^T) r,  S <- S diag(w) + v k^T.  They differ in the decay only: RWKV-6 has one per
// token, RWKV-5 the same for every token (a row stride of zero).
#include <initializer_list>

#include "parallel.h"
#include "wkv_state.h"

namespace rwkv {
namespace {

#if defined(__AVX512F__)
constexpr int MOST_REGISTERS = 4;
#else
constexpr int MOST_REGISTERS = 2;
#endif

struct Wkv6 {
  int64_t tokens, heads, n, decay_stride;
  Segments segments;
  const float *r, *w, *k, *v, *u, *state;
  float *y, *state_out;
};

template <int VECS, int N>
void run_block(const Wkv6& x, int64_t segment, int64_t head, int64_t value) {
  const int64_t n = N ? N : x.n;
  const int64_t values = n - value < VECS * LANES ? n - value : VECS * LANES;
  const int64_t stride = x.heads * n;
  const int64_t state_at = ((segment * x.heads + head) * n + value) * n;
  StateBlock<VECS, N> block;
  block.read(x.state + state_at, n, values);

  const float* u = x.u + head * n;
  const int64_t first = x.segments.first(segment);
  int64_t at = first * stride + head * n;
  const float* w = x.w + first * x.decay_stride + head * n;
  for (int64_t t = 0; t < x.segments.length(segment); t++, at += stride, w += x.decay_stride) {
    const float *r = x.r + at, *k = x.k + at;
    const int64_t ahead = at + PREFETCH_TOKENS * stride;
    for (const float* input : {x.r, x.k}) prefetch(input + ahead, n);
    if (x.decay_stride) prefetch(w + PREFETCH_TOKENS * stride, n);
    prefetch(x.v + ahead + value, values);
    vf v[VECS], y[VECS];
    load_values<VECS>(v, x.v + at + value, values);
    const vf bonus = splat(row_sum(n, [&](int64_t j, int64_t left) {
      return load(u + j, left) * load(k + j, left) * load(r + j, left);
    }));
    for (int c = 0; c < VECS; c++) y[c] = v[c] * bonus;
    for (int64_t j = 0; j < n; j++) {
      const vf wj = splat(w[j]), kj = splat(k[j]), rj = splat(r[j]);
      for (int c = 0; c < VECS; c++) {
        const vf s = block.at(j, c);
        y[c] = fma(s, rj, y[c]);
        block.set(j, c, fma(s, wj, v[c] * kj));
      }
    }
    store_values<VECS>(x.y + at + value, y, values);
  }
  block.write(x.state_out + state_at, n, values);
}

template <int VECS, int N> void run(const Wkv6& x, int threads) {
  const int64_t blocks = (x.n + VECS * LANES - 1) / (VECS * LANES);
  parallel_items(x.segments.count * x.heads * blocks, threads, [&](int64_t item) {
    const int64_t head = item / blocks;
    run_block<VECS, N>(x, head / x.heads, head % x.heads, item % blocks * VECS * LANES);
  });
}

template <int N> void dispatch(const Wkv6& x, int threads) {
  const int vecs = block_registers(x.segments.count * x.heads, x.n, threads, MOST_REGISTERS);
  if (vecs == 1) return run<1, N>(x, threads);
  if (vecs == 2) return run<2, N>(x, threads);
  run<MOST_REGISTERS, N>(x, threads);
}

}  // namespace
}  // namespace rwkv

// r, k, v, y: [tokens, heads, n]; w: the same, or [heads, n] when static_decay; u: [heads, n];
// state, state_out: [segments, heads, n(value), n(key)]; rows: [segments, 2].
RWKV_API void rwkvmpi_wkv6(const float* r, const float* w, const float* k, const float* v, const float* u,
                           const float* state, const int32_t* rows, float* y, float* state_out, int64_t tokens,
                           int64_t heads, int64_t n, int64_t segments, int static_decay, int threads) {
  const int64_t decay_stride = static_decay ? 0 : heads * n;
  const rwkv::Wkv6 x = {tokens, heads, n, decay_stride, {rows, segments}, r, w, k, v, u, state, y, state_out};
  x.segments.gaps(tokens, [&](int64_t begin, int64_t end) {
    std::memset(y + begin * heads * n, 0, (end - begin) * heads * n * sizeof(float));
  });
  if (n == 64) return rwkv::dispatch<64>(x, threads);
  if (n == 32) return rwkv::dispatch<32>(x, threads);
  rwkv::dispatch<0>(x, threads);
}
