// WKV-7:  S <- S diag(w) + (S a) b^T + v k^T,  y = S r,  for several documents' segments of one chunk.
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

struct Wkv7 {
  int64_t tokens, heads, n;
  Segments segments;
  const float *r, *w, *k, *v, *a, *b, *state;
  float *y, *state_out;
};

// One value block of one head of one segment. The product S a of the NEXT token is gathered while this token's state
// is in registers, so the state is read and written once a token: five multiply-adds per element.
template <int VECS, int N>
void run_block(const Wkv7& x, int64_t segment, int64_t head, int64_t value) {
  const int64_t n = N ? N : x.n;
  const int64_t values = n - value < VECS * LANES ? n - value : VECS * LANES;
  const int64_t stride = x.heads * n;
  const int64_t state_at = ((segment * x.heads + head) * n + value) * n;
  StateBlock<VECS, N> block;
  block.read(x.state + state_at, n, values);

  int64_t at = x.segments.first(segment) * stride + head * n;
  const int64_t end = at + x.segments.length(segment) * stride;
  vf sa[VECS] = {};
  for (int64_t j = 0; at < end && j < n; j++)
    for (int c = 0; c < VECS; c++) sa[c] = fma(block.at(j, c), splat(x.a[at + j]), sa[c]);

  for (; at < end; at += stride) {
    const int64_t next = at + stride < end ? at + stride : at;  // after the last token the gathered product is dropped
    const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *b = x.b + at, *a_next = x.a + next;
    const int64_t ahead = at + PREFETCH_TOKENS * stride;
    for (const float* input : {x.r, x.w, x.k, x.b, x.a}) prefetch(input + ahead, n);
    prefetch(x.v + ahead + value, values);
    vf v[VECS], y[VECS] = {}, sa_next[VECS] = {};
    load_values<VECS>(v, x.v + at + value, values);
    for (int64_t j = 0; j < n; j++) {
      const vf wj = splat(w[j]), bj = splat(b[j]), kj = splat(k[j]), rj = splat(r[j]), aj = splat(a_next[j]);
      for (int c = 0; c < VECS; c++) {
        const vf s = fma(block.at(j, c), wj, fma(sa[c], bj, v[c] * kj));
        block.set(j, c, s);
        y[c] = fma(s, rj, y[c]);
        sa_next[c] = fma(s, aj, sa_next[c]);
      }
    }
    store_values<VECS>(x.y + at + value, y, values);
    for (int c = 0; c < VECS; c++) sa[c] = sa_next[c];
  }
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
  const int vecs = block_registers(x.segments.count * x.heads, x.n, threads, MOST_REGISTERS);
  if (vecs == 1) return run<1, N>(x, threads);
  if (vecs == 2) return run<2, N>(x, threads);
  run<MOST_REGISTERS, N>(x, threads);
}

}  // namespace
}  // namespace rwkv

// r, w, k, v, a, b, y: [tokens, heads, n]; state, state_out: [segments, heads, n(value), n(key)]; rows: [segments,
// 2].
RWKV_API void rwkvmpi_wkv7(const float* r, const float* w, const float* k, const float* v, const float* a, const float* b,
                           const float* state, const int32_t* rows, float* y, float* state_out, int64_t tokens,
                           int64_t heads, int64_t n, int64_t segments, int threads) {
  const rwkv::Wkv7 x = {tokens, heads, n, {rows, segments}, r, w, k, v, a, b, state, y, state_out};
  x.segments.gaps(tokens, [&](int64_t begin, int64_t end) {
    std::memset(y + begin * heads * n, 0, (end - begin) * heads * n * sizeof(float));
  });
  if (n == 64) return rwkv::dispatch<64>(x, threads);
  if (n == 32) return rwkv::dispatch<32>(x, threads);
  rwkv::dispatch<0>(x, threads);
}
