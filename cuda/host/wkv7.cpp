// WKV-7 by itself, for several documents' segments of one chunk: the public operator. The layers use v7_time_mix.
#include <initializer_list>

#include "tensors.h"
#include "wkv_tokens.h"

namespace rwkv {
namespace {

struct Wkv7 {
  int64_t heads, n;
  Segments segments;
  Wkv7Rows rows;
  const float* state;
  float *y, *state_out;
};

template <int VECS, int N> void run_block(const Wkv7& x, int64_t segment, int64_t head, int64_t value) {
  const int64_t n = N ? N : x.n, values = rows_of_block<VECS, N>(n, value);
  const int64_t stride = x.heads * n, at = x.segments.first(segment) * stride + head * n;
  const int64_t state_at = ((segment * x.heads + head) * n + value) * n;
  const StateBlock<VECS> block = {thread_scratch(n * VECS * LANES)};
  block.read(x.state + state_at, n, values);
  const Wkv7Rows& all = x.rows;
  const Wkv7Rows rows = {all.r + at, all.w + at, all.k + at, all.v + at, all.a + at, all.b + at, stride};
  wkv7_tokens<VECS, N>(rows, x.segments.length(segment), n, value, x.y + at, stride, block, [&](int64_t t) {
    const int64_t ahead = (t + PREFETCH_TOKENS) * stride;
    for (const float* input : {rows.r, rows.w, rows.k, rows.b, rows.a}) prefetch(input + ahead, n);
    prefetch(rows.v + ahead + value, values);
  });
  block.write(x.state_out + state_at, n, values);
}

template <int VECS, int N> void run(const Wkv7& x, int threads) {
  const int64_t blocks = (x.n + VECS * LANES - 1) / (VECS * LANES);
  parallel_items(x.segments.count * x.heads * blocks, threads, [&](int64_t item) {
    const int64_t head = item / blocks;
    run_block<VECS, N>(x, head / x.heads, head % x.heads, item % blocks * VECS * LANES);
  });
}

template <int N> void dispatch(const Wkv7& x, int threads) {
  const int vecs = block_registers(x.segments.count * x.heads, x.n, threads);
  if (vecs == 1) return run<1, N>(x, threads);
  if (vecs == 2) return run<2, N>(x, threads);
  run<MOST_REGISTERS, N>(x, threads);
}

}  // namespace
}  // namespace rwkv

// r, w, k, v, a, b, y: [tokens, heads, n]; state, state_out: [segments, heads, n(value), n(key)]; rows: [segments,
// 2].
RWKV_API void rwkvmpi_wkv7(const float* r, const float* w, const float* k, const float* v, const float* a,
                           const float* b, const float* state, const int32_t* rows, float* y, float* state_out,
                           int64_t tokens, int64_t heads, int64_t n, int64_t segments, int threads) {
  const rwkv::Wkv7 x = {heads, n, {rows, segments}, {r, w, k, v, a, b, 0}, state, y, state_out};
  rwkv::clear_gaps(x.segments, tokens, heads * n, y);
  if (n == 64) return rwkv::dispatch<64>(x, threads);
  if (n == 32) return rwkv::dispatch<32>(x, threads);
  rwkv::dispatch<0>(x, threads);
}
