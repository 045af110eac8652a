// WKV-6 and WKV-5 by themselves: the public operators. The layers use v6_time_mix and v5_time_mix.
#include <initializer_list>

#include "tensors.h"
#include "wkv_tokens.h"

namespace rwkv {
namespace {

struct Wkv6 {
  int64_t heads, n, decay_stride;
  Segments segments;
  const float *r, *w, *k, *v, *u, *state;
  float *y, *state_out;
};

template <int VECS, int N> void run_block(const Wkv6& x, int64_t segment, int64_t head, int64_t value) {
  const int64_t n = N ? N : x.n, values = rows_of_block<VECS, N>(n, value);
  const int64_t stride = x.heads * n, first = x.segments.first(segment), at = first * stride + head * n;
  const int64_t state_at = ((segment * x.heads + head) * n + value) * n;
  const StateBlock<VECS> block = {thread_scratch(n * VECS * LANES)};
  block.read(x.state + state_at, n, values);
  const float* w = x.w + first * x.decay_stride + head * n;
  const Wkv6Rows rows = {x.r + at, w, x.k + at, x.v + at, stride, x.decay_stride};
  const float* u = x.u + head * n;
  const auto bonus = [&](int64_t t) {
    const float *r = rows.r + t * stride, *k = rows.k + t * stride;
    return row_sum(n, [&](int64_t j, int64_t left) RWKV_INLINE_LAMBDA {
      return load(u + j, left) * load(k + j, left) * load(r + j, left);
    });
  };
  wkv6_tokens<VECS, N>(rows, x.segments.length(segment), n, value, x.y + at, stride, block, bonus, [&](int64_t t) {
    const int64_t ahead = (t + PREFETCH_TOKENS) * stride;
    for (const float* input : {rows.r, rows.k}) prefetch(input + ahead, n);
    if (x.decay_stride) prefetch(rows.w + ahead, n);
    prefetch(rows.v + ahead + value, values);
  });
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
  const int vecs = block_registers(x.segments.count * x.heads, x.n, threads);
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
  const rwkv::Wkv6 x = {heads, n, decay_stride, {rows, segments}, r, w, k, v, u, state, y, state_out};
  rwkv::clear_gaps(x.segments, tokens, heads * n, y);
  if (n == 64) return rwkv::dispatch<64>(x, threads);
  if (n == 32) return rwkv::dispatch<32>(x, threads);
  rwkv::dispatch<0>(x, threads);
}
