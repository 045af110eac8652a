// The backward pass of WKV-6, token by token in float32, from the states that the forward pass stored.
//
// With G the gradient of the state after the token, b = sum of r u k and c = dy . v:
//   dr = S^T dy + u k c,  dw = sum over values of G S,  dk = G^T v + u r c,  dv = G k + b dy,  du += r k c,
//   G <- G diag(w) + dy r^T.
// A block is one head of one sequence. Its state is worked on in parts of 64 values by 64 keys; a thread has one key
// and 16 values of a part, so of the sums over values, three, most is in the thread, and only the one over keys, dv,
// crosses warps. Four tokens at a time, the states before them are recomputed from the stored one; nothing is divided
// by a decay. The order of every sum is fixed.
#pragma once
#include "wkv6_decay.cuh"

namespace rwkv {
namespace {

template <typename E> struct Wkv6Backward {
  const E *r, *w, *k, *v;  // [batch, tokens, heads, n]
  const float *u, *stored;
  const E* dy;
  const float* dlast;
  E *dr, *dw, *dk, *dv;
  float *du, *dstate;  // du: [batch, heads, n]; dstate also keeps G between the tiles
  int64_t batch, tokens, heads, n;
};

constexpr int BACK_THREADS = 256, BACK_WARPS = BACK_THREADS / 32;
constexpr int BACK_TILE = 16;  // tokens between two stored states
constexpr int BACK_GROUP = 4, PART = 64, VALUES = PART / 4;
constexpr int MOST_TRAINED_KEYS = 256;

__host__ __device__ constexpr int padded_to_part(int64_t n) { return (int)((n + PART - 1) / PART * PART); }

// The tile in shared memory: rows of `width` float32, WIDTH where that is not 0; tokens beyond the end and channels
// beyond the head are neutral. Of the gradients it holds what are sums over the state.
enum BackArray { R, W, K, V, DY, DR, DW, DK, DV, BACK_ARRAYS };
template <int WIDTH> struct BackTile {
  float* memory;
  int chosen_width;
  __device__ __forceinline__ int width() const { return WIDTH ? WIDTH : chosen_width; }
  __device__ __forceinline__ float* row(BackArray array, int t) const {
    return memory + (array * BACK_TILE + t) * width();
  }
  __device__ __forceinline__ float* bonus() const { return row(BACK_ARRAYS, 0); }    // [BACK_TILE]: b
  __device__ __forceinline__ float* product() const { return bonus() + BACK_TILE; }  // [BACK_TILE]: c
  // [BACK_WARPS][BACK_GROUP][PART]: of dv
  __device__ __forceinline__ float* partial() const { return product() + BACK_TILE; }
};
constexpr int64_t back_tile_bytes(int width) {
  return sizeof(float) * (BACK_ARRAYS * BACK_TILE * width + 2 * BACK_TILE + BACK_WARPS * BACK_GROUP * PART);
}

template <int WIDTH, typename E>
__device__ void read_tile(const BackTile<WIDTH>& to, const Wkv6Backward<E>& x, int64_t first, int count) {
  for (int i = threadIdx.x; i < BACK_TILE * to.width(); i += BACK_THREADS) {
    const int t = i / to.width(), c = i % to.width();
    const bool there = t < count && c < x.n;
    const int64_t from = first + t * x.heads * x.n + c;
    to.row(R, 0)[i] = there ? to_float(x.r[from]) : 0.0f;
    to.row(W, 0)[i] = there ? to_float(x.w[from]) : 1.0f;
    to.row(K, 0)[i] = there ? to_float(x.k[from]) : 0.0f;
    to.row(V, 0)[i] = there ? to_float(x.v[from]) : 0.0f;
    to.row(DY, 0)[i] = there ? to_float(x.dy[from]) : 0.0f;
  }
  __syncthreads();
  for (int t = threadIdx.x / 32; t < BACK_TILE; t += BACK_WARPS) {
    float bonus = 0.0f, product = 0.0f;
    for (int c = threadIdx.x % 32; c < x.n; c += 32) {
      bonus = fmaf(to.row(R, t)[c] * x.u[blockIdx.x * x.n + c], to.row(K, t)[c], bonus);
      product = fmaf(to.row(DY, t)[c], to.row(V, t)[c], product);
    }
    bonus = warp_sum(bonus);
    product = warp_sum(product);
    if (threadIdx.x % 32 == 0) to.bonus()[t] = bonus, to.product()[t] = product;
  }
}

// One thread's share of a part: key threadIdx.x / 4, values 16 * (i / 4) + 4 * (threadIdx.x % 4) + i % 4.
using Share = float[VALUES];
__device__ __forceinline__ int value_of(int i) { return i / 4 * 16 + threadIdx.x % 4 * 4 + i % 4; }

__device__ __forceinline__ void read_share(Share& s, const float* p, int n, int first_value, int key) {
#pragma unroll
  for (int i = 0; i < VALUES; i++) {
    const int value = first_value + value_of(i);
    s[i] = value < n && key < n ? p[value * n + key] : 0.0f;
  }
}
__device__ __forceinline__ void read_values(Share& x, const float* row) {
#pragma unroll
  for (int i = 0; i < VALUES; i += 4) {
    const float4 q = *reinterpret_cast<const float4*>(row + value_of(i));
    x[i] = q.x, x[i + 1] = q.y, x[i + 2] = q.z, x[i + 3] = q.w;
  }
}
template <int WIDTH>
__device__ __forceinline__ void advance_share(Share& s, const BackTile<WIDTH>& x, int t, int first_value, int key) {
  Share v;
  read_values(v, x.row(V, t) + first_value);
  const float w = x.row(W, t)[key], k = x.row(K, t)[key];
#pragma unroll
  for (int i = 0; i < VALUES; i++) s[i] = fmaf(s[i], w, v[i] * k);
}

// The first half of x, summed with the lane across MASK; the lanes on its high side take the second half.
template <int COUNT, int MASK> __device__ __forceinline__ void fold(float* x) {
  const bool high = threadIdx.x & MASK;
#pragma unroll
  for (int i = 0; i < COUNT / 2; i++) {
    const float given = high ? x[i] : x[i + COUNT / 2], kept = high ? x[i + COUNT / 2] : x[i];
    x[i] = kept + __shfl_xor_sync(0xffffffffu, given, MASK);
  }
}

// A group of tokens of one part, backwards. first: the group's first token in the tile.
template <int WIDTH>
__device__ __forceinline__ void group_back(Share& g, const Share& start, const BackTile<WIDTH>& x, int first,
                                           int first_value, int first_key) {
  const int key = first_key + threadIdx.x / 4, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Share s[BACK_GROUP];
#pragma unroll
  for (int i = 0; i < VALUES; i++) s[0][i] = start[i];
#pragma unroll
  for (int t = 1; t < BACK_GROUP; t++) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) s[t][i] = s[t - 1][i];
    advance_share(s[t], x, first + t - 1, first_value, key);
  }
  float dr[BACK_GROUP] = {}, dw[BACK_GROUP] = {}, dk[BACK_GROUP] = {};
#pragma unroll
  for (int t = BACK_GROUP - 1; t >= 0; t--) {
    const float r = x.row(R, first + t)[key], w = x.row(W, first + t)[key], k = x.row(K, first + t)[key];
    Share v, dy, dv;
    read_values(v, x.row(V, first + t) + first_value);
    read_values(dy, x.row(DY, first + t) + first_value);
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      dr[t] = fmaf(s[t][i], dy[i], dr[t]);
      dw[t] = fmaf(s[t][i], g[i], dw[t]);
      dk[t] = fmaf(g[i], v[i], dk[t]);
      dv[i] = g[i] * k;
      g[i] = fmaf(g[i], w, dy[i] * r);
    }
    fold<16, 16>(dv);
    fold<8, 8>(dv);
    fold<4, 4>(dv);
    const int slot = lane / 16 * 8 + lane / 8 % 2 * 4 + lane / 4 % 2 * 2;
    float* const to = x.partial() + (warp * BACK_GROUP + t) * PART;
    to[value_of(slot)] = dv[0];
    to[value_of(slot + 1)] = dv[1];
  }
  // Over the four lanes of a key; lane number t of them ends with token t.
  const auto add = [&](float(&sums)[BACK_GROUP], BackArray array) {
    fold<4, 2>(sums);
    fold<2, 1>(sums);
    float& sum = x.row(array, first + threadIdx.x % 4)[key];
    sum = first_value == 0 ? sums[0] : sum + sums[0];
  };
  add(dr, DR);
  add(dw, DW);
  add(dk, DK);
  __syncthreads();
  static_assert(BACK_THREADS == BACK_GROUP * PART, "a thread per sum");
  float dv = 0.0f;
#pragma unroll
  for (int i = 0; i < BACK_WARPS; i++) dv += x.partial()[i * BACK_GROUP * PART + threadIdx.x];
  float& sum = x.row(DV, first + threadIdx.x / PART)[first_value + threadIdx.x % PART];
  sum = first_key == 0 ? dv : sum + dv;
  __syncthreads();
}

template <int WIDTH, typename E>
__device__ void write_tile(const BackTile<WIDTH>& from, const Wkv6Backward<E>& x, int64_t first, int count) {
  for (int i = threadIdx.x; i < count * x.n; i += BACK_THREADS) {
    const int t = i / (int)x.n, c = i % (int)x.n;
    const int64_t to = first + t * x.heads * x.n + c;
    const float weight = x.u[blockIdx.x * x.n + c] * from.product()[t];
    x.dr[to] = from_float<E>(fmaf(weight, from.row(K, t)[c], from.row(DR, t)[c]));
    x.dw[to] = from_float<E>(from.row(DW, t)[c]);
    x.dk[to] = from_float<E>(fmaf(weight, from.row(R, t)[c], from.row(DK, t)[c]));
    x.dv[to] = from_float<E>(fmaf(from.bonus()[t], from.row(DY, t)[c], from.row(DV, t)[c]));
  }
}

template <typename E, int WIDTH>
__global__ void __launch_bounds__(BACK_THREADS, 1) wkv6_backward_kernel(const Wkv6Backward<E> x) {
  DYNAMIC_SHARED(float, memory);
  const BackTile<WIDTH> tile = {memory, padded_to_part(x.n)};
  const int64_t item = blockIdx.y * x.heads + blockIdx.x, size = x.n * x.n;
  const int64_t tiles = (x.tokens + BACK_TILE - 1) / BACK_TILE;
  float* const gradient = x.dstate + item * size;
  const int n = (int)x.n;
  float du = 0.0f;  // of key threadIdx.x
  for (int64_t mark = tiles - 1; mark >= 0; mark--) {
    const int64_t left = x.tokens - mark * BACK_TILE;
    const int64_t first = ((blockIdx.y * x.tokens + mark * BACK_TILE) * x.heads + blockIdx.x) * x.n;
    const int count = left < BACK_TILE ? (int)left : BACK_TILE;
    read_tile(tile, x, first, count);
    const float* const after = mark == tiles - 1 ? x.dlast + item * size : gradient;
    const float* const stored = x.stored + (item * tiles + mark) * size;
    for (int value = 0; value < tile.width(); value += PART)
      for (int key = 0; key < tile.width(); key += PART) {
        const int own = key + threadIdx.x / 4;
        Share g;
        read_share(g, after, n, value, own);
#pragma unroll 1
        for (int t = BACK_TILE - BACK_GROUP; t >= 0; t -= BACK_GROUP) {
          Share s;
          read_share(s, stored, n, value, own);
#pragma unroll 1
          for (int i = 0; i < t; i++) advance_share(s, tile, i, value, own);
          group_back(g, s, tile, t, value, key);
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++)
          if (value + value_of(i) < n && own < n) gradient[(value + value_of(i)) * n + own] = g[i];
      }
    write_tile(tile, x, first, count);
    if (threadIdx.x < x.n)
      for (int t = count - 1; t >= 0; t--)
        du = fmaf(tile.row(R, t)[threadIdx.x] * tile.row(K, t)[threadIdx.x], tile.product()[t], du);
    __syncthreads();
  }
  if (tiles == 0)
    for (int64_t i = threadIdx.x; i < size; i += BACK_THREADS) gradient[i] = x.dlast[item * size + i];
  if (threadIdx.x < x.n) x.du[item * x.n + threadIdx.x] = du;
}

}  // namespace
}  // namespace rwkv
