// WKV-4 for training: the forward pass that remembers, and the backward pass.
//
// The forward pass stores the state before every 16th token; the backward pass recomputes the states between two of
// them. With the gradients of aa and bb kept at the state's own scale, as if pp were a constant,
//   g = dy_t / denominator_t:  dv_t = g now + now' daa,  du += b,  dk_t = b + now' (daa v_t + dbb)
//   with b = g now (v_t - y_t),  dw += past' (daa aa + dbb bb),
//   daa <- past' daa + g past,  dbb <- past' dbb - g y_t past
// where past, now are the shares of the output and past', now' those of the update: all between 0 and 1. A scale
// shared by aa, bb and e^pp changes no later output, so no gradient flows through any pp but the last one, which is
// itself a result: what a loss asks of it beyond its being that scale goes back along the maximum.
//
// One thread has one channel of one sequence and sums dw and du over its tokens in one order: the bits are always the
// same.
#include <type_traits>

#include "wkv4.cuh"

namespace rwkv {
namespace {

template <typename E> struct Wkv4Backward {
  const E *k, *v;
  const float *w, *u, *stored;
  const E* dy;
  const float* dlast;
  E *dk, *dv;
  float *dw, *du, *dstate;  // dw, du: [sequences, channels]
  int64_t sequences, tokens, channels;
};

// AHEAD tokens with what it takes to recompute the states between them: with a whole EVERY of them in registers the
// next could not be on their way as well.
template <typename E> struct Tile4 {
  E k[AHEAD], v[AHEAD], k_before[AHEAD], v_before[AHEAD];  // before: from the stored state on
  State4 stored;
  static __device__ __forceinline__ bool begins(int64_t tile) { return tile % (EVERY / AHEAD) == 0; }

  __device__ __forceinline__ void fetch(const Wkv4Backward<E>& x, int64_t sequence, int64_t tile, int64_t channel) {
    const int64_t marks = (x.tokens + EVERY - 1) / EVERY, mark = tile / (EVERY / AHEAD);
    stored.read(x.stored + (sequence * marks + mark) * 3 * x.channels + channel, x.channels);
    const int64_t left = x.tokens - tile * AHEAD, at = (sequence * x.tokens + tile * AHEAD) * x.channels + channel;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (!begins(tile)) {
        k_before[i] = x.k[at + (i - AHEAD) * x.channels];
        v_before[i] = x.v[at + (i - AHEAD) * x.channels];
      }
      if (i >= left) continue;
      k[i] = x.k[at + i * x.channels];
      v[i] = x.v[at + i * x.channels];
    }
  }

  // The state before the first of the tokens.
  __device__ __forceinline__ State4 start(int64_t tile, float w) const {
    static_assert(EVERY == 2 * AHEAD, "one tile lies before this one at most");
    State4 s = stored;
    if (begins(tile)) return s;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) advance(s, update_of(s.pp, to_float(k_before[i]), w), to_float(v_before[i]));
    return s;
  }
};

// The gradient of the state on its way back; of pp only what does not flow through aa and bb.
struct Gradient4 {
  float aa, bb, pp, w, u;
};

// LAST: the tile with the last token, which may have fewer than AHEAD.
template <bool LAST, typename E>
__device__ __forceinline__ void tile_back(Gradient4& g, const Tile4<E>& x, const Wkv4Backward<E>& to, float w, float u,
                                          int64_t tile, int64_t at, int64_t left) {
  E dy[AHEAD];  // needed after the recomputation, which is time enough to fetch it
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (!LAST || i < left) dy[i] = to.dy[at + i * to.channels];
  State4 s[AHEAD + 1];
  s[0] = x.start(tile, w);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    s[i + 1] = s[i];
    if ((LAST && i >= left) || (!LAST && i + 1 == AHEAD)) continue;
    advance(s[i + 1], update_of(s[i].pp, to_float(x.k[i]), w), to_float(x.v[i]));
  }
  if (LAST) g.pp -= fmaf(s[AHEAD].aa, g.aa, s[AHEAD].bb * g.bb);
  float dw = 0.0f, du = 0.0f;
#pragma unroll
  for (int i = AHEAD - 1; i >= 0; i--) {
    if (LAST && i >= left) continue;
    const float k = to_float(x.k[i]), v = to_float(x.v[i]);
    const Update update = update_of(s[i].pp, k, w);
    const float past = update.e.past * fmaf(g.aa, s[i].aa, g.bb * s[i].bb), now = update.e.now * fmaf(g.aa, v, g.bb);
    dw += past + (update.past_led ? g.pp : 0.0f);
    const float through_state = now + (update.past_led ? 0.0f : g.pp);
    g.pp = update.past_led ? g.pp : 0.0f;
    const Shares e = output_shares(s[i], u + k);
    const float scale = reciprocal(fmaf(e.past, s[i].bb, e.now)), y = fmaf(e.past, s[i].aa, e.now * v) * scale;
    const float d = to_float(dy[i]) * scale, bonus = d * e.now * (v - y), dv = fmaf(d, e.now, update.e.now * g.aa);
    du += bonus;
    g.aa = fmaf(update.e.past, g.aa, d * e.past);
    g.bb = fmaf(update.e.past, g.bb, -(d * e.past * y));
    to.dk[at + i * to.channels] = from_float<E>(bonus + through_state);
    to.dv[at + i * to.channels] = from_float<E>(dv);
  }
  g.w += dw;
  g.u += du;
}

template <typename E> __global__ void __launch_bounds__(CHANNEL_THREADS, 3) backward_kernel(const Wkv4Backward<E> x) {
  const int64_t channel = (int64_t)blockIdx.x * CHANNEL_THREADS + threadIdx.x, sequence = blockIdx.y;
  if (channel >= x.channels) return;
  const float w = x.w[channel], u = x.u[channel];
  const int64_t state_at = sequence * 3 * x.channels + channel;
  Gradient4 g = {x.dlast[state_at], x.dlast[state_at + x.channels], x.dlast[state_at + 2 * x.channels], 0.0f, 0.0f};
  if (x.tokens > 0) {
    int64_t tile = (x.tokens - 1) / AHEAD, at = (sequence * x.tokens + tile * AHEAD) * x.channels + channel;
    Tile4<E> next;
    next.fetch(x, sequence, tile, channel);
    const auto step = [&](auto last) {
      const Tile4<E> now = next;
      if (tile > 0) next.fetch(x, sequence, tile - 1, channel);
      tile_back<decltype(last)::value>(g, now, x, w, u, tile, at, x.tokens - tile * AHEAD);
      if (tile == 0) g.pp += fmaf(now.stored.aa, g.aa, now.stored.bb * g.bb);
      tile--, at -= AHEAD * x.channels;
    };
    step(std::true_type{});
    while (tile >= 0) step(std::false_type{});
  }
  x.dstate[state_at] = g.aa;
  x.dstate[state_at + x.channels] = g.bb;
  x.dstate[state_at + 2 * x.channels] = g.pp;
  x.dw[sequence * x.channels + channel] = g.w;
  x.du[sequence * x.channels + channel] = g.u;
}

bool fits(int64_t batch, int64_t tokens, int64_t channels) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  return batch >= 0 && batch <= 65535 && tokens >= 0 && tokens < LIMIT / (batch + 1) && channels >= 0 &&
         channels < LIMIT;
}

}  // namespace
}  // namespace rwkv

// k, v, y: E [B, T, C]; w, u: float32 [C]; state, last: float32 [B, 3, C]; stored: float32 [B, ceil(T / every), 3, C],
// the states before every `every`-th token; every must be 16.
extern "C" int rwkvmpi_cuda_wkv4_train_forward(const void* k, const void* v, const float* w, const float* u,
                                               const float* state, void* y, float* last, float* stored,
                                               int64_t batch, int64_t tokens, int64_t channels, int64_t every,
                                               int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(fits(batch, tokens, channels), BAD_SIZE);
  CHECK(every == EVERY, UNSUPPORTED);
  if (batch == 0 || channels == 0) return OK;
  CHECK(stored || tokens == 0, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Wkv4<E> x = {nullptr, (const E*)k, (const E*)v, w,      u,        state,    last,
                       nullptr, (E*)y,       stored,      batch * tokens, channels, batch};
    return launch_wkv4(x, device, stream);
  });
}

// dy, dk, dv: as y, k, v; dlast, dstate: as last, state; dw, du: float32 [B, C], of every sequence by itself.
extern "C" int rwkvmpi_cuda_wkv4_train_backward(const void* k, const void* v, const float* w, const float* u,
                                                const float* stored, const void* dy, const float* dlast, void* dk,
                                                void* dv, float* dw, float* du, float* dstate, int64_t batch,
                                                int64_t tokens, int64_t channels, int64_t every, int dtype, int device,
                                                void* stream) {
  using namespace rwkv;
  CHECK(fits(batch, tokens, channels), BAD_SIZE);
  CHECK(every == EVERY, UNSUPPORTED);
  if (batch == 0 || channels == 0) return OK;
  CHECK(w && u && dlast && dw && du && dstate && (tokens == 0 || (k && v && stored && dy && dk && dv)), BAD_POINTER);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const dim3 grid((unsigned)channel_blocks(channels), (unsigned)batch);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Wkv4Backward<E> x = {(const E*)k, (const E*)v, w,  u,  stored, (const E*)dy, dlast,
                               (E*)dk,      (E*)dv,      dw, du, dstate, batch,    tokens, channels};
    CHECK(hold_elements(x.k, x.v, x.w, x.u, x.stored, x.dy, x.dlast, x.dk, x.dv, x.dw, x.du, x.dstate), MISALIGNED);
    return LAUNCH(backward_kernel<E>, grid, dim3(CHANNEL_THREADS), 0, stream, x);
  });
}
