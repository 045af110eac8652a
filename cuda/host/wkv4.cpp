// WKV-4, every channel by itself:  y = (e^pp aa + e^(u+k) v) / (e^pp bb + e^(u+k)),  then aa <- e^w aa + e^k v and bb
// likewise. aa and bb are kept divided by e^pp, so nothing overflows. Of each pair of exponentials the larger is 1,
// so two are computed.
#include "functions.h"
#include "parallel.h"

namespace rwkv {
namespace {

constexpr int VECS = 2;  // independent registers, to hide the latency of exp

// e^(a - max(a, b)) and e^(b - max(a, b)); both NaN-preserving
RWKV_INLINE void exp_pair(vf a, vf b, vf& ea, vf& eb) {
  const vf e = exp(-magnitude(a - b)), one = splat(1.0f);
  ea = a >= b ? one : e;
  eb = a >= b ? e : one;
}

// What the rounding of s = a + b left out, exactly; 0 where it is too large to be a small correction of e^s.
RWKV_INLINE vf left_out(vf a, vf b, vf s) {
  const vf from_b = s - a;
  const vf rest = (a - (s - from_b)) + (b - from_b);
  return magnitude(rest) < splat(0.02f) ? rest : vf{};
}

struct Wkv4 {
  int64_t tokens, channels;
  Segments segments;
  const float *k, *v, *w, *u, *state;
  float *y, *state_out;
};

void run_block(const Wkv4& x, int64_t segment, int64_t channel) {
  const int64_t channels = x.channels, left = channels - channel;
  vf w[VECS], u[VECS], aa[VECS], bb[VECS], pp[VECS];
  const float* state = x.state + segment * 3 * channels + channel;
  const auto lanes = [&](int c) { return left - c * LANES; };
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
  const int64_t first = x.segments.first(segment);
  for (int64_t t = first; t < first + x.segments.length(segment); t++) {
    const int64_t at = t * channels + channel;
    for (int c = 0; c < VECS; c++) {
      const vf k = get(x.k + at, c), v = get(x.v + at, c);
      vf e_past, e_now;
      exp_pair(pp[c], u[c] + k, e_past, e_now);
      put(x.y + at, c, fma(e_past, aa[c], e_now * v) / fma(e_past, bb[c], e_now));
      // pp + w is rounded, always to the same side for a small w; a thousand tokens would shift the past by 1e-3.
      // What is left out of pp goes into aa and bb.
      const vf decayed = pp[c] + w[c], rest = left_out(pp[c], w[c], decayed);
      exp_pair(decayed, k, e_past, e_now);
      aa[c] = fma(e_past, fma(aa[c], rest, aa[c]), e_now * v);
      bb[c] = fma(e_past, fma(bb[c], rest, bb[c]), e_now);
      pp[c] = decayed >= k ? decayed : k;
    }
  }
  float* state_out = x.state_out + segment * 3 * channels + channel;
  for (int c = 0; c < VECS; c++) {
    put(state_out, c, aa[c]);
    put(state_out + channels, c, bb[c]);
    put(state_out + 2 * channels, c, pp[c]);
  }
}

}  // namespace
}  // namespace rwkv

// k, v, y: [tokens, channels]; w (below 0), u: [channels]; state, state_out: [segments, 3 (aa, bb, pp), channels].
RWKV_API void rwkvmpi_wkv4(const float* k, const float* v, const float* w, const float* u, const float* state,
                           const int32_t* rows, float* y, float* state_out, int64_t tokens, int64_t channels,
                           int64_t segments, int threads) {
  const rwkv::Wkv4 x = {tokens, channels, {rows, segments}, k, v, w, u, state, y, state_out};
  x.segments.gaps(tokens, [&](int64_t begin, int64_t end) {
    std::memset(y + begin * channels, 0, (end - begin) * channels * sizeof(float));
  });
  constexpr int64_t width = rwkv::VECS * rwkv::LANES;
  const int64_t blocks = (channels + width - 1) / width;
  rwkv::parallel_items(segments * blocks, threads,
                       [&](int64_t item) { rwkv::run_block(x, item / blocks, item % blocks * width); });
}
