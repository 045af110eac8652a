// WKV-4, every channel by itself:  y = (e^pp aa + e^(u+k) v) / (e^pp bb + e^(u+k)),  then aa <- e^w aa + e^k v and bb
// likewise. aa and bb are kept divided by e^pp, so nothing overflows. Of each pair of exponentials the larger is 1,
// so two are computed.
#include "functions.h"
#include "parallel.h"
#include "record.h"
#include "tensors.h"

namespace rwkv {
namespace {

constexpr int64_t PREFETCH_TOKENS = 8;
constexpr int VECS = 2;  // independent registers, to hide the latency of exp

// Of e^(a - max(a, b)) and e^(b - max(a, b)) one is 1 and the other is this, for either the exponent; NaN stays.
RWKV_INLINE vf exponent(vf a, vf b) { return -magnitude(a - b); }

// What the rounding of s = a + b left out, exactly; 0 where it is too large to be a small correction of e^s.
RWKV_INLINE vf left_out(vf a, vf b, vf s) {
  const vf from_b = s - a;
  const vf rest = (a - (s - from_b)) + (b - from_b);
  return magnitude(rest) < splat(0.02f) ? rest : vf{};
}

struct Wkv4 {
  int64_t channels;
  Segments segments;
  const float *r, *k, *v, *w, *u, *state;  // r may be null
  Sink y;                                  // times sigmoid(r) where r is given
  float* state_out;                        // may be the state itself
};

// FULL: all lanes of the block's registers are channels.
template <bool FULL> void run_block(const Wkv4& x, int64_t segment, int64_t channel) {
  const int64_t channels = x.channels, left = channels - channel;
  vf w[VECS], u[VECS], aa[VECS], bb[VECS], pp[VECS];
  const float* state = x.state + segment * 3 * channels + channel;
  const auto lanes = [&](int c) { return FULL ? (int64_t)LANES : left - c * LANES; };
  const auto get = [&](const float* p, int c) { return lanes(c) > 0 ? load(p + c * LANES, lanes(c)) : vf{}; };
  const auto put = [&](float* p, int c, vf value) {
    if (lanes(c) > 0) store(p + c * LANES, value, lanes(c));
  };
  for (int c = 0; c < VECS; c++) {
    w[c] = get(x.w + channel, c);
    u[c] = get(x.u + channel, c);
    aa[c] = get(state, c);
    bb[c] = get(state + channels, c);
    pp[c] = get(state + 2 * channels, c);
  }
  const vf one = splat(1.0f);
  const int64_t first = x.segments.first(segment);
  for (int64_t t = first; t < first + x.segments.length(segment); t++) {
    const int64_t at = t * channels + channel;
    for (const float* input : {x.k, x.v, x.r})
      if (input) prefetch(input + at + PREFETCH_TOKENS * channels, VECS * LANES);
    vf k[VECS], v[VECS], now[VECS], decayed[VECS], rest[VECS], e[2 * VECS], gate[VECS];
    for (int c = 0; c < VECS; c++) {
      k[c] = get(x.k + at, c);
      v[c] = get(x.v + at, c);
      now[c] = u[c] + k[c];
      // pp + w is rounded, always to the same side for a small w; a thousand tokens would shift the past by 1e-3.
      // What is left out of pp goes into aa and bb.
      decayed[c] = pp[c] + w[c];
      rest[c] = left_out(pp[c], w[c], decayed[c]);
      e[c] = exponent(pp[c], now[c]);
      e[VECS + c] = exponent(decayed[c], k[c]);
    }
    bounded_exps(e);
    if (x.r) {
      for (int c = 0; c < VECS; c++) gate[c] = get(x.r + at, c);
      sigmoids(gate);
    }
    for (int c = 0; c < VECS; c++) {
      vf e_past = pp[c] >= now[c] ? one : e[c], e_now = pp[c] >= now[c] ? e[c] : one;
      vf y = fma(e_past, aa[c], e_now * v[c]) / fma(e_past, bb[c], e_now);
      if (x.r) y = gate[c] * y;
      if (lanes(c) > 0) x.y(at + c * LANES, y, lanes(c));
      e_past = decayed[c] >= k[c] ? one : e[VECS + c];
      e_now = decayed[c] >= k[c] ? e[VECS + c] : one;
      aa[c] = fma(e_past, fma(aa[c], rest[c], aa[c]), e_now * v[c]);
      bb[c] = fma(e_past, fma(bb[c], rest[c], bb[c]), e_now);
      pp[c] = decayed[c] >= k[c] ? decayed[c] : k[c];
    }
  }
  float* state_out = x.state_out + segment * 3 * channels + channel;
  for (int c = 0; c < VECS; c++) {
    put(state_out, c, aa[c]);
    put(state_out + channels, c, bb[c]);
    put(state_out + 2 * channels, c, pp[c]);
  }
}

void run(const Wkv4& x, int64_t tokens, int threads) {
  clear_gaps(x.segments, tokens, x.channels, x.y);
  constexpr int64_t width = VECS * LANES;
  const int64_t blocks = (x.channels + width - 1) / width;
  parallel_items(x.segments.count * blocks, threads, [&](int64_t item) {
    const int64_t channel = item % blocks * width;
    if (channel + width <= x.channels)
      run_block<true>(x, item / blocks, channel);
    else
      run_block<false>(x, item / blocks, channel);
  });
}

}  // namespace
}  // namespace rwkv

// k, v, y: [tokens, channels]; w (below 0), u: [channels]; state, state_out: [segments, 3 (aa, bb, pp), channels].
RWKV_API void rwkvmpi_wkv4(const float* k, const float* v, const float* w, const float* u, const float* state,
                           const int32_t* rows, float* y, float* state_out, int64_t tokens, int64_t channels,
                           int64_t segments, int threads) {
  rwkv::run({channels, {rows, segments}, nullptr, k, v, w, u, state, {y, 0}, state_out}, tokens, threads);
}

// RWKV-4's time mix between its matrix products: h = sigmoid(r) * wkv4, float or bfloat16; the state in place.
RWKV_API void rwkvmpi_v4_time_mix(const float* r, const float* k, const float* v, const float* w, const float* u,
                                  float* state, const int32_t* rows, void* h, int h_bf16, int64_t tokens,
                                  int64_t channels, int64_t segments, int threads) {
  rwkv::run({channels, {rows, segments}, r, k, v, w, u, state, {h, h_bf16}, state}, tokens, threads);
}
RWKV_RECORDABLE(rwkvmpi_v4_time_mix)
