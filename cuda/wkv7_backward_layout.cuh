// How a block shares one head's state in registers when WKV-7 is trained token by token: see wkv7_backward_tokens.cuh.
#pragma once

#include "wkv7_backward.cuh"

namespace rwkv {
namespace wkv7_training {

constexpr int KEY_GRADIENTS = 5;  // r w k a b

// How THREADS threads share a state of PADDED values x PADDED keys: ROWS x KEYS numbers each, GROUP rows at a time.
template <int PADDED, int HELD_ROWS> struct Layout {
  static constexpr int SIZE = PADDED, ROWS = HELD_ROWS, KEYS = PADDED == 256 ? 8 : 4;
  static constexpr int LANES = SIZE / KEYS;  // that share a row
  static constexpr int GROUP = THREADS / LANES * ROWS, GROUPS = SIZE / GROUP;
  static constexpr int FLUSH = SIZE <= 64 ? 2 : 1;  // tokens between two sums over the warps
  static constexpr int CHUNK = SIZE <= 64 ? 8 : SIZE == 128 ? 4 : 2, MARK = CHUNK / 2;  // Work within 99 KiB

  static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }
  static __device__ __forceinline__ int row() { return threadIdx.x / LANES * ROWS; }
  static __device__ __forceinline__ int key(int n) { return n / 4 * 128 + lane() * 4 + n % 4; }
};

template <int PADDED> using LayoutOf = Layout<PADDED, PADDED == 32 ? 1 : PADDED == 256 ? 2 : 4>;
using LayoutInTiles = Layout<64, 2>;  // for tiles that take this way; leaves registers to the kernel around

// The tokens of a chunk, as float32; what lies beyond the sequence or the head is 0.
template <typename L> struct Chunk {
  using Rows = float[L::CHUNK][L::SIZE];
  Rows r, w, k, v, a, b, dy;
};

template <typename L> struct Work {
  Chunk<L> chunk;
  float partial[WARPS][L::FLUSH][KEY_GRADIENTS][L::SIZE];
  float sums[L::CHUNK][KEY_GRADIENTS][L::SIZE];
  float4 marks[2][L::ROWS * L::KEYS / 4][THREADS];
};

template <typename L> using Part = float[L::ROWS][L::KEYS];

template <typename L, typename E>
__device__ __forceinline__ void read_chunk(Chunk<L>& chunk, const Tensors<E>& x, int item, int first, int count) {
  const int64_t begin = x.at(item, first), stride = (int64_t)x.heads * x.size;
#pragma unroll 1
  for (int i = threadIdx.x; i < L::CHUNK * L::SIZE; i += THREADS) {
    const int t = i / L::SIZE, n = i % L::SIZE;
    const bool there = t < count && n < x.size;
    const int64_t from = begin + t * stride + n;
    const auto get = [&](const E* p) { return there ? to_float(p[from]) : 0.0f; };
    chunk.r[t][n] = get(x.r);
    chunk.w[t][n] = get(x.w);
    chunk.k[t][n] = get(x.k);
    chunk.v[t][n] = get(x.v);
    chunk.a[t][n] = get(x.a);
    chunk.b[t][n] = get(x.b);
    chunk.dy[t][n] = x.dy ? get(x.dy) : 0.0f;
  }
}

template <typename L> __device__ __forceinline__ void read_state(Part<L>& s, const float* state, int size, int group) {
#pragma unroll
  for (int i = 0; i < L::ROWS; i++)
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) {
      const int row = group * L::GROUP + L::row() + i, key = L::key(n);
      s[i][n] = row < size && key < size ? state[row * size + key] : 0.0f;
    }
}

template <typename L>
__device__ __forceinline__ void write_state(float* state, const Part<L>& s, int size, int group) {
#pragma unroll
  for (int i = 0; i < L::ROWS; i++)
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) {
      const int row = group * L::GROUP + L::row() + i, key = L::key(n);
      if (row < size && key < size) state[row * size + key] = s[i][n];
    }
}

template <typename L> __device__ __forceinline__ void keys_of(float (&out)[L::KEYS], const float (&from)[L::SIZE]) {
#pragma unroll
  for (int n = 0; n < L::KEYS; n += 4) {
    const float4 four = *reinterpret_cast<const float4*>(&from[L::key(n)]);
    out[n] = four.x, out[n + 1] = four.y, out[n + 2] = four.z, out[n + 3] = four.w;
  }
}

// The sum over the lanes that share a row, the same in each of them.
template <typename L> __device__ __forceinline__ void sum_over_keys(float (&x)[L::ROWS]) {
#pragma unroll
  for (int distance = L::LANES / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) x[i] += __shfl_xor_sync(~0u, x[i], distance);
}

template <typename L>
__device__ __forceinline__ void removed(float (&sa)[L::ROWS], const Part<L>& s, const Chunk<L>& x, int t) {
  float a[L::KEYS];
  keys_of<L>(a, x.a[t]);
#pragma unroll
  for (int i = 0; i < L::ROWS; i++) {
    sa[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) sa[i] += s[i][n] * a[n];
  }
  sum_over_keys<L>(sa);
}

// s becomes the state after token t.
template <typename L>
__device__ __forceinline__ void step(Part<L>& s, const Chunk<L>& x, int t, int group) {
  float sa[L::ROWS], w[L::KEYS], k[L::KEYS], b[L::KEYS];
  removed<L>(sa, s, x, t);
  keys_of<L>(w, x.w[t]);
  keys_of<L>(k, x.k[t]);
  keys_of<L>(b, x.b[t]);
#pragma unroll
  for (int i = 0; i < L::ROWS; i++) {
    const float v = x.v[t][group * L::GROUP + L::row() + i];
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) s[i][n] = s[i][n] * w[n] + (sa[i] * b[n] + v * k[n]);
  }
}

}  // namespace wkv7_training
}  // namespace rwkv
