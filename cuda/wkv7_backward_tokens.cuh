// WKV-7 for training, token by token in float32: any head size up to 256, any decay, 0 included.
//
// A thread holds ROWS x KEYS numbers of the state in registers; the lanes that share its rows are in its warp, so the
// sums over keys (S a, S r and their like) are shuffles, and only the five gradients indexed by key need a sum over
// the warps. The rows of a state do not depend on each other: where 256 threads cannot hold them all, they go group
// by group and the sums over rows add up in shared memory.
//
// The backward pass takes CHUNK tokens at a time. It notes the state at their beginning and middle in shared memory and
// walks again from there for each token, so nothing is ever divided by a decay.
#pragma once

#include "wkv7_backward_layout.cuh"

namespace rwkv {
namespace wkv7_training {

// One token backwards. s: the state before it; g: the gradient of the state after it, becomes that of s. Leaves the
// warp's sums over its rows in `partial`, and dv through `write_dv(row, value)`.
template <typename L, typename WriteDv>
__device__ __forceinline__ void step_back(Part<L>& g, const Part<L>& s, Work<L>& work, int t, int group,
                                          const WriteDv& write_dv) {
  const Chunk<L>& x = work.chunk;
  float sa[L::ROWS], dv[L::ROWS] = {}, dsa[L::ROWS] = {}, sums[KEY_GRADIENTS][L::KEYS] = {};
  removed<L>(sa, s, x, t);
  float w[L::KEYS];
  keys_of<L>(w, x.w[t]);
  {
    float r[L::KEYS], k[L::KEYS], b[L::KEYS];
    keys_of<L>(r, x.r[t]);
    keys_of<L>(k, x.k[t]);
    keys_of<L>(b, x.b[t]);
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) {
      const int row = group * L::GROUP + L::row() + i;
      const float v = x.v[t][row], dy = x.dy[t][row];
#pragma unroll
      for (int n = 0; n < L::KEYS; n++) {
        const float now = g[i][n] + dy * r[n], after = s[i][n] * w[n] + (sa[i] * b[n] + v * k[n]);
        g[i][n] = now;
        dv[i] += now * k[n];
        dsa[i] += now * b[n];
        sums[0][n] += after * dy;
        sums[1][n] += s[i][n] * now;
        sums[2][n] += now * v;
        sums[4][n] += now * sa[i];
      }
    }
  }
  sum_over_keys<L>(dv);
  sum_over_keys<L>(dsa);
  float a[L::KEYS];
  keys_of<L>(a, x.a[t]);
#pragma unroll
  for (int i = 0; i < L::ROWS; i++) {
    if (L::lane() == 0) write_dv(group * L::GROUP + L::row() + i, dv[i]);
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) {
      sums[3][n] += s[i][n] * dsa[i];
      g[i][n] = g[i][n] * w[n] + dsa[i] * a[n];
    }
  }
#pragma unroll
  for (int q = 0; q < KEY_GRADIENTS; q++)
#pragma unroll
    for (int n = 0; n < L::KEYS; n++) {
#pragma unroll
      for (int distance = L::LANES; distance < 32; distance *= 2)
        sums[q][n] += __shfl_xor_sync(~0u, sums[q][n], distance);
      if (threadIdx.x % 32 < L::LANES) work.partial[threadIdx.x / 32][t % L::FLUSH][q][L::key(n)] = sums[q][n];
    }
}

// Adds what the warps left in `partial` for tokens t .. up to `sums`, which the first group of rows begins.
template <typename L> __device__ __forceinline__ void flush(Work<L>& work, int t, int group) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < L::FLUSH * KEY_GRADIENTS * L::SIZE; i += THREADS) {
    const int slot = i / (KEY_GRADIENTS * L::SIZE), q = i / L::SIZE % KEY_GRADIENTS, n = i % L::SIZE;
    float total = group ? work.sums[t + slot][q][n] : 0.0f;
    for (int warp = 0; warp < WARPS; warp++) total += work.partial[warp][slot][q][n];
    work.sums[t + slot][q][n] = total;
  }
  __syncthreads();
}

template <typename L> __device__ __forceinline__ void note(Work<L>& work, const Part<L>& s, int mark) {
#pragma unroll
  for (int i = 0; i < L::ROWS; i++)
#pragma unroll
    for (int n = 0; n < L::KEYS; n += 4) {
      const float4 four = make_float4(s[i][n], s[i][n + 1], s[i][n + 2], s[i][n + 3]);
      work.marks[mark][(i * L::KEYS + n) / 4][threadIdx.x] = four;
    }
}

template <typename L> __device__ __forceinline__ void recall(Part<L>& s, const Work<L>& work, int mark) {
#pragma unroll
  for (int i = 0; i < L::ROWS; i++)
#pragma unroll
    for (int n = 0; n < L::KEYS; n += 4) {
      const float4 four = work.marks[mark][(i * L::KEYS + n) / 4][threadIdx.x];
      s[i][n] = four.x, s[i][n + 1] = four.y, s[i][n + 2] = four.z, s[i][n + 3] = four.w;
    }
}

// A chunk of `count` tokens backwards, for one group of rows. s: the state before it (lost); g: the gradient of the
// state after it, becomes that of s. The gradients indexed by key are left in work.sums.
template <typename L, typename E>
__device__ __forceinline__ void chunk_back(Part<L>& g, Part<L>& s, Work<L>& work, const Tensors<E>& x,
                                           int item, int first, int count, int group) {
  const int last_mark = (count - 1) / L::MARK;
#pragma unroll 1
  for (int t = 0; t <= last_mark * L::MARK; t++) {
    if (t % L::MARK == 0) note<L>(work, s, t / L::MARK);
    if (t < last_mark * L::MARK) step<L>(s, work.chunk, t, group);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < L::FLUSH * WARPS * KEY_GRADIENTS * L::SIZE; i += THREADS)
    (&work.partial[0][0][0][0])[i] = 0.0f;  // the slot of a token that an odd count leaves out
  __syncthreads();
#pragma unroll 1
  for (int t = count - 1; t >= 0; t--) {
    recall<L>(s, work, t / L::MARK);
#pragma unroll 1
    for (int earlier = t / L::MARK * L::MARK; earlier < t; earlier++) step<L>(s, work.chunk, earlier, group);
    E* const dv = x.dv + x.at(item, first + t);
    step_back<L>(g, s, work, t, group, [&](int row, float value) {
      if (row < x.size) dv[row] = from_float<E>(value);
    });
    if (t % L::FLUSH == 0) flush<L>(work, t, group);
  }
}

// The gradients of a chunk in work.sums to global memory.
template <typename L, typename E>
__device__ __forceinline__ void write_sums(const Work<L>& work, const Tensors<E>& x, int item, int first,
                                           int count) {
  const int64_t begin = x.at(item, first), stride = (int64_t)x.heads * x.size;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * L::SIZE; i += THREADS) {
    const int t = i / L::SIZE, n = i % L::SIZE;
    if (n >= x.size) continue;
    const int64_t to = begin + t * stride + n;
    x.dr[to] = from_float<E>(work.sums[t][0][n]);
    x.dw[to] = from_float<E>(work.sums[t][1][n]);
    x.dk[to] = from_float<E>(work.sums[t][2][n]);
    x.da[to] = from_float<E>(work.sums[t][3][n]);
    x.db[to] = from_float<E>(work.sums[t][4][n]);
  }
}

// The tokens from `begin` up to `end` backwards; `before` is the state before the first of them. g: the gradient of the
// state after them, becomes that of `before`; it lives in x.dstate instead where the rows go group by group.
template <typename L, typename E>
__device__ __forceinline__ void stretch_back(Part<L>& g, Work<L>& work, const Tensors<E>& x, int item,
                                             int begin, int end, const float* before) {
  float* const dstate = x.dstate + x.state_at(item);
#pragma unroll 1
  for (int first = begin + (end - begin - 1) / L::CHUNK * L::CHUNK; first >= begin; first -= L::CHUNK) {
    const int count = lesser(L::CHUNK, end - first);
#pragma unroll 1
    for (int group = 0; group < L::GROUPS; group++) {
      Part<L> s;
      read_state<L>(s, before, x.size, group);
      if (L::GROUPS > 1) read_state<L>(g, dstate, x.size, group);
#pragma unroll 1
      for (int now = begin; now < first; now += L::CHUNK) {
        read_chunk<L>(work.chunk, x, item, now, L::CHUNK);
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < L::CHUNK; t++) step<L>(s, work.chunk, t, group);
        __syncthreads();
      }
      read_chunk<L>(work.chunk, x, item, first, count);
      __syncthreads();
      chunk_back<L>(g, s, work, x, item, first, count, group);
      if (L::GROUPS > 1) write_state<L>(dstate, g, x.size, group);
    }
    write_sums<L>(work, x, item, first, count);
    __syncthreads();
  }
}

template <typename E, typename L> __global__ void __launch_bounds__(THREADS) backward_tokens(const Tensors<E> x) {
  DYNAMIC_SHARED(Work<L>, work);
  const int item = blockIdx.x;
  Part<L> g;
  for (int group = 0; group < L::GROUPS; group++) {
    read_state<L>(g, x.dlast + x.state_at(item), x.size, group);
    write_state<L>(x.dstate + x.state_at(item), g, x.size, group);
  }
  for (int mark = x.marks - 1; mark >= 0; mark--) {
    const int begin = mark * x.every, end = lesser(begin + x.every, x.tokens);
    stretch_back<L>(g, *work, x, item, begin, end, x.stored + x.mark_at(item, mark));
  }
  if (L::GROUPS == 1) write_state<L>(x.dstate + x.state_at(item), g, x.size, 0);
}

// The tokens from `begin` up to `end`; s: one group of rows of the state before them, becomes that of the state after.
template <typename L, typename E>
__device__ __forceinline__ void stretch(Part<L>& s, Chunk<L>& chunk, const Tensors<E>& x, int item, int begin,
                                        int end, int group) {
  for (int first = begin; first < end; first += L::CHUNK) {
    const int count = lesser(L::CHUNK, end - first);
    read_chunk<L>(chunk, x, item, first, count);
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < count; t++) {
      if ((first + t) % x.every == 0)
        write_state<L>(x.stored + x.mark_at(item, (first + t) / x.every), s, x.size, group);
      step<L>(s, chunk, t, group);
      float r[L::KEYS], y[L::ROWS] = {};
      keys_of<L>(r, chunk.r[t]);
#pragma unroll
      for (int i = 0; i < L::ROWS; i++)
#pragma unroll
        for (int n = 0; n < L::KEYS; n++) y[i] += s[i][n] * r[n];
      sum_over_keys<L>(y);
#pragma unroll
      for (int i = 0; i < L::ROWS; i++) {
        const int row = group * L::GROUP + L::row() + i;
        if (L::lane() == 0 && row < x.size) x.y[x.at(item, first + t) + row] = from_float<E>(y[i]);
      }
    }
    __syncthreads();
  }
}

// Block (head of a sequence, group of rows).
template <typename E, typename L> __global__ void __launch_bounds__(THREADS) forward_tokens(const Tensors<E> x) {
  DYNAMIC_SHARED(Chunk<L>, chunk);
  const int item = blockIdx.x, group = blockIdx.y;
  Part<L> s;
  read_state<L>(s, x.state + x.state_at(item), x.size, group);
  stretch<L>(s, *chunk, x, item, 0, x.tokens, group);
  write_state<L>(x.last + x.state_at(item), s, x.size, group);
}

}  // namespace wkv7_training
}  // namespace rwkv
