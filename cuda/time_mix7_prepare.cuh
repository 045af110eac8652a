// WKV-7 in tiles: from the tokens to a tile (time_mix7_tile.cuh has the algebra), by four warps. A thread has two
// neighbouring channels of its warp's four tokens until the tile's operands are there; then the warps share out the
// matrices.
//
// Instructions of one warp per tile (sm_90a): 55 to fetch, 460 for the operands and their sums, 135 to scale them, 60
// for a product, 135 to complete; 240 more for the inverse in one of them; 250 to finish y. With `advance` 6,000 issue
// slots per tile and block of eight warps, 1,500 cycles of a multiprocessor's four quarters, during which the special
// functions are busy for 560, the tensor cores for 520 and shared memory for about 800.
#pragma once
#include "time_mix7_tile.cuh"

namespace rwkv {
namespace tile7 {

constexpr int MOST_INPUTS = 7, STAGED_TILES = 2, INVERSE_STRIDE = 20;  // floats; keeps the lanes' banks apart
enum Barrier : int { PREPARE = 1, INVERSE = 2, FULL = 3, DONE = 7 };   // FULL and DONE: one for each tile in flight
__device__ __forceinline__ void sync_prepare() { bar_sync(PREPARE, PREPARE_WARPS * 32); }

// Of the four warps that prepare.
template <class E> struct alignas(128) Workspace {
  E staged[STAGED_TILES][MOST_INPUTS][MATRIX];  // inputs; each warp's tokens are its own business
  float totals[PREPARE_WARPS][SIZE];            // logarithms of the decay over a warp's tokens
  float ab[TOKENS * INVERSE_STRIDE];            // transposed
  float ak[TOKENS * TOKENS];
  E inverse[TOKENS * TOKENS], w[TOKENS * TOKENS], rb[TOKENS * TOKENS];  // inverse: T - 1
};

// A thread's place: among the preparing warps, in the tile, in a row of all heads.
struct Place {
  int warp, lane;
  __device__ __forceinline__ Place() : warp(threadIdx.x / 32 % PREPARE_WARPS), lane(threadIdx.x & 31) {}
  __device__ __forceinline__ int token(int i) const { return warp * 4 + i; }
  __device__ __forceinline__ int channel() const { return lane * 2; }
  // Place in a matrix of the thread's channels of its i-th token.
  __device__ __forceinline__ int operator()(int i) const { return down(place<SIZE>(token(0), channel()), i); }
};

// What the tokens come down to, for the recurrence.
struct Operands {
  float r[4][2], k[4][2], a[4][2], b[4][2], log_decay[4][2];
};

template <class E> __device__ __forceinline__ void put(E* p, float low, float high) {
  put_word(p, pack<E>(low, high));
}

// Copies the warp's tokens of an input, from `at` in the tile's first row on; tokens from `count` on are 0.
template <class E>
__device__ __forceinline__ void copy_rows(E* matrix, const E* input, int64_t at, int columns, int count) {
  const Place p;
  const int token = p.token(p.lane / 8), column = p.lane % 8 * 8;
  const bool valid = token < count;
  cp_async16(matrix + token * SIZE + column, input + (valid ? at + token * columns + column : 0), valid);
}
template <class E, class Inputs>
__device__ __forceinline__ void stage(const Inputs& inputs, E (&staged)[MOST_INPUTS][MATRIX], int64_t at, int columns,
                                      int count) {
#pragma unroll
  for (int i = 0; i < Inputs::ALWAYS; i++) copy_rows(staged[i], inputs.input(i), at, columns, count);
  if constexpr (Inputs::ALWAYS < Inputs::COUNT) {
    if (!inputs.all()) return;
#pragma unroll
    for (int i = Inputs::ALWAYS; i < Inputs::COUNT; i++) copy_rows(staged[i], inputs.input(i), at, columns, count);
  }
}

// The tile's rows a~, b~, k~, r~ from the operands, and the state's factors. The barrier within is the only one.
template <class E>
__device__ __forceinline__ void scale_operands(const Operands& x, Workspace<E>& work, Tile<E>& tile) {
  const Place p;
#pragma unroll
  for (int e = 0; e < 2; e++)
    work.totals[p.warp][p.channel() + e] =
        (x.log_decay[0][e] + x.log_decay[1][e]) + (x.log_decay[2][e] + x.log_decay[3][e]);
  sync_prepare();
  float past[2], decay[2], before[2];  // logarithm and decay counted from the tile's middle, and the token before's
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float* total = &work.totals[0][p.channel() + e];
    const float first_half = total[0] + total[SIZE], second_half = total[2 * SIZE] + total[3 * SIZE];
    if (p.warp == 0) tile.enter[p.channel() + e] = power_of_2(first_half);
    if (p.warp == 3) tile.leave[p.channel() + e] = power_of_2(second_half);
    past[e] = p.warp == 0 ? -first_half : p.warp == 1 ? -total[SIZE] : p.warp == 2 ? 0.0f : total[2 * SIZE];
    before[e] = power_of_2(past[e]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float growth[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      past[e] += x.log_decay[i][e];
      decay[e] = power_of_2(past[e]);
      growth[e] = power_of_2(-past[e]);
    }
    put(tile.a + p(i), x.a[i][0] * before[0], x.a[i][1] * before[1]);
    put(tile.b + p(i), x.b[i][0] * growth[0], x.b[i][1] * growth[1]);
    put(tile.k + p(i), x.k[i][0] * growth[0], x.k[i][1] * growth[1]);
    put(tile.r + p(i), x.r[i][0] * decay[0], x.r[i][1] * decay[1]);
    before[0] = decay[0];
    before[1] = decay[1];
  }
}

// A product of rows of two matrices, [token][token], 0 where the second token is `beyond` the first.
template <class E, class Beyond>
__device__ __forceinline__ void token_product(const E* x, const E* y, float (&d)[2][4], Beyond beyond) {
  const int lane = threadIdx.x & 31;
  uint32_t a[4], b[2][2];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    a_fragment<E, SIZE>(a, x, j * 16);
    b_fragments<E, SIZE>(b, y, j * 16);
    mma_16816<E>(d[0], a, b[0]);
    mma_16816<E>(d[1], a, b[1]);
  }
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (beyond(lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2)) d[n][i] = 0.0f;
}
// Calls f(row, column, value) or f(row, column, two values) for a lane's elements.
template <class F> __device__ __forceinline__ void each_pair(const float (&d)[2][4], F f) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      f(lane / 4 + half * 8, n * 8 + lane % 4 * 2, d[n][2 * half], d[n][2 * half + 1]);
}

// T - 1 and W by forward substitution in float32: lane j has column j of T, lane 16 + j column j of W.
template <class E> __device__ __forceinline__ void invert(Workspace<E>& work) {
  const int lane = threadIdx.x & 31, column = lane & 15;
  float x[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) x[t] = lane >= 16 ? work.ak[t * TOKENS + column] : t == column ? 1.0f : 0.0f;
#pragma unroll
  for (int s = 0; s < TOKENS - 1; s++)
#pragma unroll
    for (int block = (s + 1) / 4 * 4; block < TOKENS; block += 4) {
      const float4 four = *reinterpret_cast<const float4*>(work.ab + s * INVERSE_STRIDE + block);
      const float ab[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int t = block > s ? block : s + 1; t < block + 4; t++) x[t] = fmaf(ab[t - block], x[s], x[t]);
    }
  E* out = lane < 16 ? work.inverse : work.w;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) out[place<TOKENS>(t, column)] = from_float<E>(t > column ? x[t] : 0.0f);
}

// d: 16 channels of all tokens as accumulators; column: a multiple of 16.
template <class F> __device__ __forceinline__ void each_row_pair(float (&d)[2][4], int column, F f) {
  const int lane = threadIdx.x & 31, own = right(place<SIZE>(lane / 4, lane % 4 * 2), column);
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) f(right(own, n * 8) + half * 8 * SIZE, d[n][2 * half], d[n][2 * half + 1]);
}
template <class E> __device__ __forceinline__ void load_rows(float (&d)[2][4], const E* m, int column) {
  each_row_pair(d, column, [&](int at, float& low, float& high) { unpack<E>(word(m + at), low, high); });
}
template <class E> __device__ __forceinline__ void store_rows(float (&d)[2][4], E* m, int column) {
  each_row_pair(d, column, [&](int at, float low, float high) { put(m + at, low, high); });
}

// A^ = a~ + (T - 1) a~, K^ = k~ + W^T b~, R^ = r~ + M a~ with M = RB T, in place; a warp has 16 channels.
template <class E> __device__ __forceinline__ void complete(const Workspace<E>& work, Tile<E>& tile, int column) {
  uint32_t inverse[4], w[4], rb[4], m[4], t[2][2], a[2][2], b[2][2];
  a_fragment<E, TOKENS>(inverse, work.inverse, 0);
  b_transposed<E, TOKENS>(t, work.inverse, 0);
  a_fragment<E, TOKENS>(rb, work.rb, 0);
  a_transposed<E, TOKENS>(w, work.w, 0);
  b_transposed<E, SIZE>(a, tile.a, column);
  b_transposed<E, SIZE>(b, tile.b, column);
  float product[2][4], rows_a[2][4], rows_k[2][4], rows_r[2][4];
  load_rows(rows_a, tile.a, column);
  load_rows(rows_k, tile.k, column);
  load_rows(rows_r, tile.r, column);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) unpack<E>(rb[i], product[i / 2][i % 2 * 2], product[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int n = 0; n < 2; n++) mma_16816<E>(product[n], rb, t[n]);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    mma_16816<E>(rows_a[n], inverse, a[n]);
    mma_16816<E>(rows_k[n], w, b[n]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) m[i] = pack<E>(product[i / 2][i % 2 * 2], product[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int n = 0; n < 2; n++) mma_16816<E>(rows_r[n], m, a[n]);
  store_rows(rows_a, tile.a, column);
  store_rows(rows_k, tile.k, column);
  store_rows(rows_r, tile.r, column);
}

// From the rows a~, b~, k~, r~ in the tile to the finished tile. role: a warp's part in it; they take turns, as one of
// them has more to do and always keeps the same quarter of the multiprocessor busy. Starts with a barrier; the caller
// ends with one.
template <class E> __device__ __forceinline__ void multiply(Workspace<E>& work, Tile<E>& tile, int role) {
  float d[2][4] = {};
  sync_prepare();
  if (role == 0) {
    token_product(tile.a, tile.b, d, [](int t, int s) { return s >= t; });
    each_pair(d, [&](int t, int s, float low, float high) {
      work.ab[s * INVERSE_STRIDE + t] = low;
      work.ab[(s + 1) * INVERSE_STRIDE + t] = high;
    });
    bar_sync(INVERSE, 64);
    invert(work);
  } else if (role == 1) {
    token_product(tile.a, tile.k, d, [](int t, int s) { return s >= t; });
    each_pair(d, [&](int t, int s, float low, float high) {
      *reinterpret_cast<float2*>(work.ak + t * TOKENS + s) = {low, high};
    });
    bar_sync(INVERSE, 64);
  } else if (role == 2) {
    token_product(tile.r, tile.b, d, [](int t, int s) { return s > t; });
    each_pair(d, [&](int t, int s, float low, float high) {
      put_word(work.rb + place<TOKENS>(t, s), pack<E>(low, high));
    });
  } else {
    token_product(tile.r, tile.k, d, [](int t, int s) { return s > t; });
  }
  sync_prepare();
  complete(work, tile, Place().warp * 16);
  if (role == 3) {  // Z
    uint32_t rb[4], w[2][2];
    a_fragment<E, TOKENS>(rb, work.rb, 0);
    b_transposed<E, TOKENS>(w, work.w, 0);
#pragma unroll
    for (int n = 0; n < 2; n++) mma_16816<E>(d[n], rb, w[n]);
    each_pair(d, [&](int t, int s, float low, float high) {
      put_word(tile.z + place<TOKENS>(t, s), pack<E>(low, high));
    });
  }
}

}  // namespace tile7
}  // namespace rwkv
