// WKV-6 and WKV-5 for heads of 64.
//
// A block is one head of one segment, and works in tiles of 16 tokens counted from the segment's first; the last is
// padded with tokens that change nothing. Half of its warps advance the state (wkv6_advance.cuh); the other half
// prepares the next tile and finishes the one before, so that the latencies of either hide behind the other's work.
// Issue slots per token and scheduler: 90 + 35, so a head takes 125 cycles.
#pragma once
#include "wkv6_advance.cuh"

namespace rwkv {
namespace {
namespace heads_of_64 {

template <typename E> struct alignas(16) Channels {
  E x[8];
};

// The other warps: 128 threads, each with one token of the tile and 8 neighbouring channels.
template <typename E, bool MIX> struct Helper {
  const Wkv6<E>& x;
  Shared& shared;
  const int64_t stride, count;
  const int lane, token, channel;
  const int64_t at;                   // of this thread's channels and token in the first tile
  Channels<E> r, k, v, w, gate;       // on their way from memory
  const int place = Sums<PAIRS, 16>::place(threadIdx.x % 32);

  __device__ __forceinline__ Helper(const Wkv6<E>& arguments, Shared& memory, const Segment& segment)
      : x(arguments), shared(memory), stride(arguments.heads * N), count(segment.count), lane(threadIdx.x % 32),
        token((threadIdx.x - ADVANCING) / 8), channel(threadIdx.x % 8 * 8),
        at((segment.first + token) * stride + blockIdx.x * N + channel) {
    for (int i = threadIdx.x - ADVANCING; i < 2 * TILE * GROUP; i += THREADS - ADVANCING)
      shared.operands[i / (TILE * GROUP)].pairs[i / GROUP % TILE][i % GROUP] = 0.0f;
  }

  __device__ __forceinline__ bool holds(int64_t tile) const { return tile * TILE + token < count; }
  __device__ __forceinline__ Channels<E> of(const E* p, int64_t tile) const {
    return *reinterpret_cast<const Channels<E>*>(p + at + tile * TILE * stride);
  }
  __device__ __forceinline__ void fetch(int64_t tile) {
    if (!holds(tile)) return;
    r = of(x.r, tile), k = of(x.k, tile), v = of(x.v, tile);
    if (x.w) w = of(x.w, tile);
  }
  __device__ __forceinline__ void fetch_gate(int64_t tile) {
    if (MIX && x.gate && holds(tile)) gate = of(x.gate, tile);
  }

  // A tile's operands from what `fetch` brought. Tokens beyond the end: r = k = v = 0, w = 1.
  __device__ __forceinline__ void prepare(int64_t tile) {
    Operands& to = shared.operands[tile % 2];
    const bool real = holds(tile);
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = real ? to_float(r.x[i]) : 0.0f;
    store8(&to.r[token][channel], q);
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = real ? to_float(k.x[i]) : 0.0f;
    store8(&to.k[token][channel], q);
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = real ? to_float(v.x[i]) : 0.0f;
    store8(&to.v[token][channel], q);
    if (MIX || !x.w) load8(x.decay + blockIdx.x * N + channel, q);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (x.w) q[i] = MIX ? decay6(q[i] + to_float(w.x[i])) : to_float(w.x[i]);
      q[i] = real ? q[i] : 1.0f;
    }
    store8(&shared.w[token][channel], q);
    fetch(tile + 1);
    bar_sync(HELPERS, THREADS - ADVANCING);
    multiply_out(to);
  }

  // One group of four tokens per warp, two channels per lane.
  __device__ __forceinline__ void multiply_out(Operands& to) {
    const int group = (threadIdx.x - ADVANCING) / 32, first = group * GROUP, c = 2 * lane;
    const float2 bonus = *reinterpret_cast<const float2*>(x.u + blockIdx.x * N + c);
    float pairs[PAIRS] = {}, r[GROUP][2], k[GROUP][2], w[GROUP][2], all[2];
#pragma unroll
    for (int t = 0; t < GROUP; t++) {
      read2(r[t], &to.r[first + t][c]);
      read2(k[t], &to.k[first + t][c]);
      read2(w[t], &shared.w[first + t][c]);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        float& own = pairs[t * (t + 1) / 2 + t];
        own = fmaf(r[t][e] * (e ? bonus.y : bonus.x), k[t][e], own);
#pragma unroll
        for (int s = t - 1; s >= 0; s--) {
          float& pair = pairs[t * (t + 1) / 2 + s];
          pair = fmaf(r[t][e], k[s][e], pair);
          r[t][e] *= w[s][e];
        }
      }
      all[e] = w[GROUP - 1][e];
#pragma unroll
      for (int s = GROUP - 2; s >= 0; s--) {
        k[s][e] *= all[e];
        all[e] *= w[s][e];
      }
    }
#pragma unroll
    for (int t = 1; t < GROUP; t++) write2(&to.r[first + t][c], r[t]);
#pragma unroll
    for (int t = 0; t < GROUP - 1; t++) write2(&to.k[first + t][c], k[t]);
    write2(&to.w[group][c], all);
    const float sum = Sums<PAIRS, 16>::of(pairs, lane);
    if (place < 0) return;
    const int t = (place >= 1) + (place >= 3) + (place >= 6);
    to.pairs[first + t][place - t * (t + 1) / 2] = sum;
  }

  // The outputs of a tile; of the time mix groupnorm(y) * silu(gate).
  __device__ __forceinline__ void finish(int64_t tile) {
    float y[8];
    load8(&shared.y[tile % 2][token][channel], y);
    if (MIX) {
      float weight[8], bias[8], sum = 0.0f, squares = 0.0f;
      load8(x.ln_weight + blockIdx.x * N + channel, weight);
      load8(x.ln_bias + blockIdx.x * N + channel, bias);
#pragma unroll
      for (int i = 0; i < 8; i++) sum += y[i];
      const float mean = group_sum<8>(sum) / N;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        y[i] -= mean;
        squares = fmaf(y[i], y[i], squares);
      }
      const float inverse = 1.0f / sqrtf(group_sum<8>(squares) / N + x.eps);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        y[i] = fmaf(y[i] * inverse, weight[i], bias[i]);
        if (x.gate) {
          const float g = to_float(gate.x[i]);
          y[i] *= g * sigmoid(g);
        }
      }
    }
    if (holds(tile)) store8(x.out + at + tile * TILE * stride, y);
  }
};

template <typename E, bool MIX> __global__ void __launch_bounds__(THREADS, 2) kernel(const Wkv6<E> x) {
  if (blockIdx.y >= x.segments) return clear_gaps(x.out, x.heads * N, x.rows, x.segments, x.tokens);
  const Segment segment = segment_of(x.rows, blockIdx.y, x.segments, x.tokens);
  if (segment.count == 0 && x.state_in == x.state_out) return;
  DYNAMIC_SHARED(Shared, shared);
  const int64_t state_at = (blockIdx.y * x.heads + blockIdx.x) * N * N, tiles = (segment.count + TILE - 1) / TILE;
  // Step i prepares tile i, advances tile i - 1 and finishes tile i - 2.
  if (threadIdx.x < ADVANCING) {
    State state;
    state.read(x.state_in + state_at);
    for (int64_t i = 0; i < tiles + 2; i++) {
      if (x.stored && i >= 1 && i <= tiles)
        state.write(x.stored + ((blockIdx.y * x.heads + blockIdx.x) * tiles + i - 1) * N * N);
      if (i >= 1 && i <= tiles) advance(state, shared->operands[(i - 1) % 2], shared->y[(i - 1) % 2]);
      bar_sync(STEP, THREADS);
    }
    state.write(x.state_out + state_at);
  } else {
    Helper<E, MIX> helper(x, *shared, segment);
    helper.fetch(0);
    for (int64_t i = 0; i < tiles + 2; i++) {
      if (i >= 2) helper.finish(i - 2);
      if (i >= 1) helper.fetch_gate(i - 1);
      if (i < tiles) helper.prepare(i);
      bar_sync(STEP, THREADS);
    }
  }
}

}  // namespace heads_of_64
}  // namespace
}  // namespace rwkv
