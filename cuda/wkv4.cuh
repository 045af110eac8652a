// WKV-4 over the segments of a chunk, alone, as the time mix between its matrix products, or remembering for training.
//
// Every channel is by itself:  y = (e^pp aa + e^(u+k) v) / (e^pp bb + e^(u+k)),  then aa <- e^w aa + e^k v, bb likewise
// with 1. aa and bb are kept divided by e^pp, so nothing overflows; of each pair of exponentials the larger is 1.
// One thread has one channel. From token to token only pp (an addition and a maximum) and aa, bb (two multiply-adds)
// depend on each other; the exponentials of several tokens are computed at a time and hide each other's latency.
#pragma once
#include "wkv6_decay.cuh"
#include "wkv6_segments.cuh"

namespace rwkv {
namespace {

template <typename E> struct Wkv4 {
  const E *r, *k, *v;  // [tokens, channels]; r may be null
  const float *w, *u, *state_in;
  float* state_out;     // [segments, 3 (aa, bb, pp), channels], may be state_in
  const int32_t* rows;  // null: equal parts
  E* y;                 // times sigmoid(r) where r is given
  float* stored;        // [segments, ceil(tokens of a segment / EVERY), 3, channels] or null: states between the tokens
  int64_t tokens, channels, segments;
};

constexpr int CHANNEL_THREADS = 128;
constexpr int AHEAD = 8;   // tokens on their way from memory
constexpr int EVERY = 16;  // tokens between two stored states
static_assert(EVERY % AHEAD == 0, "states are stored between the groups of tokens");

struct State4 {
  float aa, bb, pp;
  __device__ __forceinline__ void read(const float* p, int64_t channels) {
    aa = p[0], bb = p[channels], pp = p[2 * channels];
  }
  __device__ __forceinline__ void write(float* p, int64_t channels) const {
    p[0] = aa, p[channels] = bb, p[2 * channels] = pp;
  }
};

// e^(a - max(a, b)) and e^(b - max(a, b)).
struct Shares {
  float past, now;
};
__device__ __forceinline__ Shares shares_of(float a, float b, float smaller) {
  return a >= b ? Shares{1.0f, smaller} : Shares{smaller, 1.0f};
}

// The weights of a token's output.
__device__ __forceinline__ Shares output_shares(const State4& s, float bonus_key) {
  return shares_of(s.pp, bonus_key, power_of_2(fabsf(s.pp - bonus_key) * -1.4426950408889634f));
}

// What a token does to the state: aa <- past aa + now v.
struct Update {
  Shares e;
  float pp;       // afterwards
  bool past_led;  // whether it comes from the state and not from the token
};
__device__ __forceinline__ Update update_of(float pp, float k, float w) {
  const float decayed = pp + w;
  // The sum is rounded, always to the same side for a small w: a thousand tokens would shift the past by 1e-3. What the
  // rounding left out, exactly, goes into the share of the past; where it is large, the past is none.
  const float from_w = decayed - pp, rest = (pp - (decayed - from_w)) + (w - from_w);
  const float correction = fabsf(rest) < 0.02f ? rest : 0.0f;
  Update x;
  x.past_led = decayed >= k;
  x.e = shares_of(decayed, k, falling_power(fabsf(decayed - k)));
  x.e.past = fmaf(x.e.past, correction, x.e.past);
  x.pp = x.past_led ? decayed : k;
  return x;
}
__device__ __forceinline__ void advance(State4& s, const Update& x, float v) {
  s.aa = fmaf(x.e.past, s.aa, x.e.now * v);
  s.bb = fmaf(x.e.past, s.bb, x.e.now);
  s.pp = x.pp;
}

template <typename E> struct Tokens4 {
  E r[AHEAD], k[AHEAD], v[AHEAD];
  __device__ __forceinline__ void fetch(const Wkv4<E>& x, int64_t at, int64_t left) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (i >= left) continue;
      k[i] = x.k[at + i * x.channels];
      v[i] = x.v[at + i * x.channels];
      if (x.r) r[i] = x.r[at + i * x.channels];
    }
  }
};

// FULL: all AHEAD tokens are there, so nothing is asked between them and the compiler interleaves their work.
template <bool FULL, typename E>
__device__ __forceinline__ void run_tokens(State4& s, const Tokens4<E>& tokens, const Wkv4<E>& x, float w, float u,
                                           int64_t at, int64_t left) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (!FULL && i >= left) break;
    const float k = to_float(tokens.k[i]), v = to_float(tokens.v[i]);
    const Shares e = output_shares(s, u + k);
    float y = fmaf(e.past, s.aa, e.now * v) * reciprocal(fmaf(e.past, s.bb, e.now));
    if (x.r) y *= sigmoid(to_float(tokens.r[i]));
    x.y[at + i * x.channels] = from_float<E>(y);
    advance(s, update_of(s.pp, k, w), v);
  }
}

template <typename E> __global__ void __launch_bounds__(CHANNEL_THREADS) wkv4_kernel(const Wkv4<E> x) {
  if (blockIdx.y >= x.segments) return clear_gaps(x.y, x.channels, x.rows, x.segments, x.tokens);
  const Segment segment = segment_of(x.rows, blockIdx.y, x.segments, x.tokens);
  const int64_t channel = (int64_t)blockIdx.x * CHANNEL_THREADS + threadIdx.x;
  if (channel >= x.channels || (segment.count == 0 && x.state_in == x.state_out)) return;
  const int64_t state_at = blockIdx.y * 3 * x.channels + channel;
  const float w = x.w[channel], u = x.u[channel];
  State4 s;
  s.read(x.state_in + state_at, x.channels);
  int64_t at = segment.first * x.channels + channel;
  const int64_t marks = (segment.count + EVERY - 1) / EVERY;
  float* mark = x.stored ? x.stored + blockIdx.y * marks * 3 * x.channels + channel : nullptr;
  Tokens4<E> next;
  next.fetch(x, at, segment.count);
  for (int64_t t = 0; t < segment.count; t += AHEAD, at += AHEAD * x.channels) {
    const Tokens4<E> now = next;
    const int64_t left = segment.count - t;
    next.fetch(x, at + AHEAD * x.channels, left - AHEAD);
    if (mark && t % EVERY == 0) {
      s.write(mark, x.channels);
      mark += 3 * x.channels;
    }
    if (left >= AHEAD)
      run_tokens<true>(s, now, x, w, u, at, left);
    else
      run_tokens<false>(s, now, x, w, u, at, left);
  }
  s.write(x.state_out + state_at, x.channels);
}

inline int64_t channel_blocks(int64_t channels) { return (channels + CHANNEL_THREADS - 1) / CHANNEL_THREADS; }

template <typename E> int launch_wkv4(const Wkv4<E>& x, int device, void* stream) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  CHECK(x.tokens >= 0 && x.channels >= 0 && x.segments >= 0, BAD_SIZE);
  CHECK(x.tokens < LIMIT && x.channels < LIMIT && x.segments < LIMIT, BAD_SIZE);
  if (x.channels == 0) return OK;
  const int64_t blocks = channel_blocks(x.channels);
  const int64_t parts = x.segments + gap_parts(x.rows, x.segments, x.tokens, blocks);
  CHECK(parts <= 65535, BAD_SIZE);
  if (parts == 0) return OK;
  CHECK(x.w && x.u && (x.tokens == 0 || (x.k && x.v && x.y)), BAD_POINTER);
  CHECK(x.segments == 0 || (x.state_in && x.state_out), BAD_POINTER);
  CHECK(hold_elements(x.r, x.k, x.v, x.w, x.u, x.state_in, x.state_out, x.rows, x.y, x.stored), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return LAUNCH(wkv4_kernel<E>, dim3((unsigned)blocks, (unsigned)parts), dim3(CHANNEL_THREADS), 0, stream, x);
}

}  // namespace
}  // namespace rwkv
