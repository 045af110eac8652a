// WKV-6 and WKV-5 for any head size: a block is one head of one segment, a warp advances one row of values at a time
// through a tile of tokens, and the state stays in memory between the tiles.
#pragma once
#include "wkv6.cuh"

namespace rwkv {
namespace {
namespace heads_of_any_size {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int MOST_TOKENS = 16;

// The tile does not show in the results, so large heads take fewer tokens at a time: 82 KB at most, as every GPU has.
__host__ __device__ constexpr int tile_of(int64_t n) { return n <= 256 ? MOST_TOKENS : MOST_TOKENS / 2; }
constexpr int64_t shared_bytes(int64_t n) { return sizeof(float) * (5 * tile_of(n) * n + MOST_TOKENS); }

template <typename E, bool MIX> struct Head {
  const Wkv6<E>& x;
  const int n;
  float *const r, *const w, *const k, *const v, *const y, *const bonus;  // shared, [token][n]
  const int64_t channel;                                                 // the head's first

  __device__ Head(const Wkv6<E>& arguments, float* memory, int tile)
      : x(arguments), n((int)arguments.n), r(memory + MOST_TOKENS), w(r + tile * n), k(w + tile * n), v(k + tile * n),
        y(v + tile * n), bonus(memory), channel(blockIdx.x * arguments.n) {}

  __device__ int64_t at(int64_t t) const { return t * x.heads * n + channel; }

  // count tokens from row `first` on
  __device__ void read(int64_t first, int count) const {
    for (int i = threadIdx.x; i < count * n; i += THREADS) {
      const int64_t c = i % n, from = at(first + i / n) + c;
      r[i] = to_float(x.r[from]);
      k[i] = to_float(x.k[from]);
      v[i] = to_float(x.v[from]);
      if (!x.w)
        w[i] = x.decay[channel + c];
      else
        w[i] = MIX ? decay6(x.decay[channel + c] + to_float(x.w[from])) : to_float(x.w[from]);
    }
    __syncthreads();
    for (int t = threadIdx.x / 32; t < count; t += WARPS) {
      float sum = 0.0f;
      for (int i = threadIdx.x % 32; i < n; i += 32) sum = fmaf(r[t * n + i] * x.u[channel + i], k[t * n + i], sum);
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) bonus[t] = sum;
    }
    __syncthreads();
  }

  // KEYS per lane, 32 apart
  template <int KEYS> __device__ void advance(const float* from, float* to, float* stored, int count) const {
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < n; row += WARPS) {
      float s[KEYS];
#pragma unroll
      for (int j = 0; j < KEYS; j++) s[j] = lane + 32 * j < n ? from[(int64_t)row * n + lane + 32 * j] : 0.0f;
#pragma unroll
      for (int j = 0; j < KEYS; j++)
        if (stored && lane + 32 * j < n) stored[(int64_t)row * n + lane + 32 * j] = s[j];
      for (int t = 0; t < count; t++) {
        const float value = v[t * n + row];
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < KEYS; j++) {
          if (lane + 32 * j >= n) continue;
          const int i = t * n + lane + 32 * j;
          sum = fmaf(s[j], r[i], sum);
          s[j] = fmaf(s[j], w[i], value * k[i]);
        }
        sum = warp_sum(sum);
        if (lane == 0) y[t * n + row] = fmaf(bonus[t], value, sum);
      }
#pragma unroll
      for (int j = 0; j < KEYS; j++)
        if (lane + 32 * j < n) to[(int64_t)row * n + lane + 32 * j] = s[j];
    }
    __syncthreads();
  }

  __device__ void write(int64_t first, int count) const {
    const int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / 32; t < count; t += WARPS) {
      const float* own = y + t * n;
      const int64_t to = at(first + t);
      float mean = 0.0f, inverse = 1.0f;
      if (MIX) {
        for (int i = lane; i < n; i += 32) mean += own[i];
        mean = warp_sum(mean) / n;
        float squares = 0.0f;
        for (int i = lane; i < n; i += 32) squares = fmaf(own[i] - mean, own[i] - mean, squares);
        inverse = 1.0f / sqrtf(warp_sum(squares) / n + x.eps);
      }
      for (int i = lane; i < n; i += 32) {
        float out = own[i];
        if (MIX) {
          out = fmaf((out - mean) * inverse, x.ln_weight[channel + i], x.ln_bias[channel + i]);
          if (x.gate) {
            const float g = to_float(x.gate[to + i]);
            out *= g * sigmoid(g);
          }
        }
        x.out[to + i] = from_float<E>(out);
      }
    }
  }
};

template <typename E, bool MIX, int KEYS> __global__ void __launch_bounds__(THREADS, 2) kernel(const Wkv6<E> x) {
  if (blockIdx.y >= x.segments) return clear_gaps(x.out, x.heads * x.n, x.rows, x.segments, x.tokens);
  const Segment segment = segment_of(x.rows, blockIdx.y, x.segments, x.tokens);
  DYNAMIC_SHARED(float, memory);
  const int tile = tile_of(x.n);
  const Head<E, MIX> head(x, memory, tile);
  const int64_t size = x.n * x.n, tiles = (segment.count + tile - 1) / tile;
  const int64_t state = (blockIdx.y * x.heads + blockIdx.x) * size;
  if (segment.count == 0 && x.state_in != x.state_out)
    for (int64_t i = threadIdx.x; i < size; i += THREADS) x.state_out[state + i] = x.state_in[state + i];
  for (int64_t t = 0; t < segment.count; t += tile) {
    const int count = segment.count - t < tile ? (int)(segment.count - t) : tile;
    head.read(segment.first + t, count);
    float* const stored = x.stored ? x.stored + state * tiles + t / tile * size : nullptr;
    head.template advance<KEYS>((t == 0 ? x.state_in : x.state_out) + state, x.state_out + state, stored, count);
    head.write(segment.first + t, count);
  }
}

template <typename E, bool MIX> int launch(const Wkv6<E>& x, void* stream) {
  const auto run = [&](auto kernel) -> int {
    return LAUNCH(kernel, grid_of(x), dim3(THREADS), shared_bytes(x.n), stream, x);
  };
  if (x.n <= 32) return run(kernel<E, MIX, 1>);
  if (x.n <= 64) return run(kernel<E, MIX, 2>);
  if (x.n <= 128) return run(kernel<E, MIX, 4>);
  if (x.n <= 256) return run(kernel<E, MIX, 8>);
  return run(kernel<E, MIX, 16>);
}

}  // namespace heads_of_any_size
}  // namespace
}  // namespace rwkv
