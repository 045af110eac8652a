// What the fused time mixes of RWKV-5, 6 and 7 share. Everything between the first matrix products and the output
// product happens in one pass over the tokens: an item of work is one head of one segment; a few tokens at a time, its
// operands are prepared in the first-level cache, the recurrence runs over them with the state beside them, and the
// results are normalised and gated. Nothing in between is ever written to memory.
#pragma once
#include "functions.h"
#include "record.h"
#include "tensors.h"
#include "wkv_tokens.h"

namespace rwkv {

constexpr int64_t TOKENS = 16;  // prepared at a time: with the state of a head of 64 they fill the cache

// Room for a head's row in scratch memory: whole registers at every width.
constexpr int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

// f(i, lanes left) for each register of a head; without tails where the head size is known when compiling.
template <int N, class F> RWKV_INLINE void each_register(int64_t n, F f) {
  static_assert(N % WIDE == 0, "a known head size has no tail");
  for (int64_t i = 0; i < (N ? N : n); i += LANES) f(i, N ? (int64_t)LANES : n - i);
}

// The registers of a head row that are computed side by side, see functions.h.
template <int N> constexpr int SIDE_BY_SIDE = N == 0 ? 1 : N / LANES < 4 ? N / LANES : 4;
template <int N> using Group = vf[SIDE_BY_SIDE<N>];

// f(group, t, i) for every group of registers of the rows t < count; i: the group's first element in its row.
template <int N, class F> RWKV_INLINE void each_group(int64_t n, int64_t count, F f) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t i = 0; i < (N ? N : n); i += SIDE_BY_SIDE<N> * LANES) {
      Group<N> x;
      f(x, t, i);
    }
}
template <int K> RWKV_INLINE void load_group(vf (&x)[K], const float* p, int64_t left = LANES) {
  for (int c = 0; c < K; c++) x[c] = load(p + c * LANES, left);
}
template <int K> RWKV_INLINE void load_sums(vf (&x)[K], const float* p, const float* q, int64_t left) {
  for (int c = 0; c < K; c++) x[c] = load(p + c * LANES, left) + load(q + c * LANES, left);
}
template <int K> RWKV_INLINE void store_group(float* p, const vf (&x)[K]) {
  for (int c = 0; c < K; c++) store(p + c * LANES, x[c]);
}

// The scratch memory of one item: the state's value blocks, and ARRAYS rows for each of the tokens.
template <int VECS, int N, int ARRAYS> struct HeadScratch {
  static constexpr int64_t WIDTH = VECS * LANES;
  const int64_t size;
  float *const state, *const rows;
  explicit HeadScratch(int64_t n)
      : size(n), state(thread_scratch(state_size() + TOKENS * stride())), rows(state + state_size()) {}
  RWKV_INLINE int64_t n() const { return N ? N : size; }
  RWKV_INLINE int64_t state_size() const { return (n() + WIDTH - 1) / WIDTH * WIDTH * n(); }
  RWKV_INLINE int64_t stride() const { return ARRAYS * padded(n()); }
  RWKV_INLINE float* row(int64_t t, int64_t array) const { return rows + t * stride() + array * padded(n()); }
  RWKV_INLINE StateBlock<VECS> block(int64_t value) const { return {state + value * n()}; }
};

// Runs one head of one segment. memory: its state [n, n]; prepare(t, count), advance(t, count, value, block) and
// finish(t, count) treat `count` tokens from the segment's t-th on.
template <int VECS, int N, int ARRAYS, class Prepare, class Advance, class Finish>
RWKV_INLINE void run_head(const HeadScratch<VECS, N, ARRAYS>& scratch, float* memory, int64_t length, Prepare prepare,
                          Advance advance, Finish finish) {
  constexpr int64_t WIDTH = VECS * LANES;
  const int64_t n = scratch.n();
  for (int64_t value = 0; value < n; value += WIDTH)
    scratch.block(value).read(memory + value * n, n, rows_of_block<VECS, N>(n, value));
  for (int64_t t = 0; t < length; t += TOKENS) {
    const int64_t count = length - t < TOKENS ? length - t : TOKENS;
    prepare(t, count);
    for (int64_t value = 0; value < n; value += WIDTH) advance(t, count, value, scratch.block(value));
    finish(t, count);
  }
  for (int64_t value = 0; value < n; value += WIDTH)
    scratch.block(value).write(memory + value * n, n, rows_of_block<VECS, N>(n, value));
}

// Means and inverse standard deviations of the rows y, y + stride, ...: `moments`, with the divisions and the roots of
// many rows at once.
struct BlockMoments {
  alignas(64) float mean[TOKENS] = {}, inverse[TOKENS] = {};
  RWKV_INLINE Moments of(int64_t t) const { return {mean[t], inverse[t]}; }
};
template <int N>
RWKV_INLINE void block_moments(const float* y, int64_t stride, int64_t count, int64_t head_size, float eps,
                               BlockMoments& m) {
  const int64_t n = N ? N : head_size;
  const vf size = splat((float)n);
  for (int64_t t = 0; t < count; t++)
    m.mean[t] = row_sum(n, [&](int64_t i, int64_t left) RWKV_INLINE_LAMBDA { return load(y + t * stride + i, left); });
  for (int64_t t = 0; t < count; t += LANES) store(m.mean + t, load(m.mean + t) / size);
  for (int64_t t = 0; t < count; t++)
    m.inverse[t] = row_sum(n, [&](int64_t i, int64_t left) RWKV_INLINE_LAMBDA {
      const vf d = first_lanes(load(y + t * stride + i, left) - splat(m.mean[t]), left);
      return d * d;
    });
  for (int64_t t = 0; t < count; t += LANES)
    store(m.inverse + t, splat(1.0f) / sqrt(load(m.inverse + t) / size + splat(eps)));
}

// item.run<VECS, N>(segment, head) for all of them, compiled for the usual head sizes.
template <class Item>
void run_heads(const Item& item, const Segments& segments, int64_t heads, int64_t n, int threads) {
  const auto all = [&](auto run) {
    parallel_items(segments.count * heads, threads, [&](int64_t i) { run(i / heads, i % heads); });
  };
  if (n == 64)
    all([&](int64_t d, int64_t head) { item.template run<MOST_REGISTERS, 64>(d, head); });
  else if (n == 32)
    all([&](int64_t d, int64_t head) { item.template run<2, 32>(d, head); });
  else
    all([&](int64_t d, int64_t head) { item.template run<MOST_REGISTERS, 0>(d, head); });
}

}  // namespace rwkv
