// WKV-7 in tiles of 16 tokens on tensor cores, for heads of 64 and 16-bit types: the tile and how the state takes it.
//
// With c_t the product of a tile's decays up to token t, counted from the tile's middle so that all of them stay within
// 2^+-7, and the rows r~ = r c_t, a~ = a c_(t-1), k~ = k / c_t, b~ = b / c_t, the recurrence over a tile is
//   Y = R^ S + Z V,   S <- S + b~^T A^ S + K^^T V   (S: [key, value], scaled on entering and on leaving)
// where AB, AK (below the diagonal) and RB, RK (with it) are the products of a~ and r~ with b~ and k~, and
//   T = (1 - AB)^-1,  W = T AK,  A^ = T a~,  K^ = k~ + W^T b~,  R^ = r~ + RB T a~,  Z = RK + RB W.
// None of these depends on the state, so other warps, or another kernel, prepare them (time_mix7_prepare.cuh). What is
// left in sequence is two products, S -> A^ S -> S.
//
// Per tile, one of the four warps of `advance` (16 of the 64 values) issues 50 mma, 18 ldmatrix, 250 others (sm_90a).
// From state to state: scaling and splitting the first keys 40 cycles, 16 mma, rounding 20, 8 mma, and their latency of
// 33 twice; with 8 cycles for an mma and the others in between, 450 to 550 in all: 0.6 us per token of 32 layers.
#pragma once
#include <cstring>
#include <type_traits>

#include "functions.cuh"
#include "time_mix7.h"

namespace rwkv {
namespace tile7 {

constexpr int TOKENS = 16, SIZE = 64, MATRIX = TOKENS * SIZE;
constexpr int ADVANCE_WARPS = 4, PREPARE_WARPS = 4;
constexpr int Y_STRIDE = 68;  // floats; the lanes of a warp meet all banks

// Matrices in shared memory, token by token. Rows are whole multiples of 16 bytes without padding; their 16-byte pieces
// change places from row to row, so that neither ldmatrix nor the rows' own accesses meet a bank twice.
template <int WIDTH> __device__ __forceinline__ int place(int row, int column) {
  static_assert(WIDTH == SIZE || WIDTH == TOKENS, "no such matrix");
  const int turn = WIDTH == SIZE ? row & 7 : row >> 2 & 1;
  return row * WIDTH + (column ^ turn << 3);
}
// From a place in a matrix of SIZE columns: `columns`, of which the place's column has no bit, to the right; or i < 4
// rows on from a row that is a multiple of 4. One operation each, most of it done by the compiler.
__device__ __forceinline__ int right(int from, int columns) { return from ^ columns; }
__device__ __forceinline__ int down(int from, int i) { return (from ^ i << 3) + i * SIZE; }

template <class E> struct alignas(128) Tile {
  E a[MATRIX], b[MATRIX], k[MATRIX], r[MATRIX], v[MATRIX];  // A^, b~, K^, R^, v
  E z[TOKENS * TOKENS];
  float enter[SIZE], leave[SIZE];  // what the state is multiplied with before and after
  float bonus[TOKENS];
};
static_assert(sizeof(Tile<bf16>) % 16 == 0, "tiles are copied in pieces of 16 bytes");

__device__ __forceinline__ uint32_t word(const void* p) { return *static_cast<const uint32_t*>(p); }
__device__ __forceinline__ void put_word(void* p, uint32_t x) { *static_cast<uint32_t*>(p) = x; }
template <class E> __device__ __forceinline__ void unpack(uint32_t x, float& low, float& high) {
  E pair[2];
  memcpy(pair, &x, sizeof x);
  low = to_float(pair[0]);
  high = to_float(pair[1]);
}

// pack2 with the range of half kept by the conversion itself, not by comparisons.
template <class E> __device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<E, half_t>) {
    uint32_t packed;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
#endif
  return pack2<E>(low, high);
}

// Fragments of m16n8k16. A: 16 rows from `m` [m][k] or its transpose [k][m], from `column` on; B: two of 8 columns,
// from [n][k] or [k][n]. `column` is a multiple of 16. ldmatrix takes its four matrices rows or columns first.
template <int WIDTH> __device__ __forceinline__ int rows_first(int column) {
  const int lane = threadIdx.x & 31;
  return right(place<WIDTH>(lane & 15, lane >> 4 << 3), column);
}
template <int WIDTH> __device__ __forceinline__ int columns_first(int column) {
  const int lane = threadIdx.x & 31;
  return right(place<WIDTH>((lane & 7) + (lane >> 4 << 3), lane & 8), column);
}
template <class E, int WIDTH> __device__ __forceinline__ void a_fragment(uint32_t (&f)[4], const E* m, int column) {
  ldmatrix_x4(f, m + rows_first<WIDTH>(column));
}
template <class E, int WIDTH>
__device__ __forceinline__ void a_transposed(uint32_t (&f)[4], const E* m, int column) {
  ldmatrix_x4_trans(f, m + columns_first<WIDTH>(column));
}
__device__ __forceinline__ void pairs(uint32_t (&f)[2][2], const uint32_t (&x)[4]) {
  f[0][0] = x[0];
  f[0][1] = x[1];
  f[1][0] = x[2];
  f[1][1] = x[3];
}
template <class E, int WIDTH>
__device__ __forceinline__ void b_fragments(uint32_t (&f)[2][2], const E* m, int column) {
  uint32_t x[4];
  ldmatrix_x4(x, m + columns_first<WIDTH>(column));
  pairs(f, x);
}
template <class E, int WIDTH>
__device__ __forceinline__ void b_transposed(uint32_t (&f)[2][2], const E* m, int column) {
  uint32_t x[4];
  ldmatrix_x4_trans(x, m + rows_first<WIDTH>(column));
  pairs(f, x);
}

// The state of a head, [value, key], 16 values per warp, as accumulators: of two rows, two keys in each of 8 blocks.
struct State {
  float x[8][4];

  template <class Float> static __device__ __forceinline__ Float* own(Float* head) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    return head + (warp * 16 + lane / 4) * SIZE + lane % 4 * 2;
  }
  __device__ __forceinline__ void load(const float* head) {
    const float* p = own(head);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 two = *reinterpret_cast<const float2*>(p + half * 8 * SIZE + n * 8);
        x[n][2 * half] = two.x;
        x[n][2 * half + 1] = two.y;
      }
  }
  __device__ __forceinline__ void store(float* head) const {
    float* p = own(head);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<float2*>(p + half * 8 * SIZE + n * 8) = {x[n][2 * half], x[n][2 * half + 1]};
  }
  // Products that something is added to next are rounded first, here and elsewhere, whatever the compiler's settings
  // are: two kernels must give the same bits.
  __device__ __forceinline__ void scale(int n, const float* factors) {
    const float2 two = *reinterpret_cast<const float2*>(factors + n * 8 + (threadIdx.x & 3) * 2);
    x[n][0] = __fmul_rn(x[n][0], two.x);
    x[n][1] = __fmul_rn(x[n][1], two.y);
    x[n][2] = __fmul_rn(x[n][2], two.x);
    x[n][3] = __fmul_rn(x[n][3], two.y);
  }
};

// Two floats as the sum of two pairs of E: what is lost is below 2^-16 of them.
template <class E>
__device__ __forceinline__ void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack<E>(first, second);
  float a, b;
  unpack<E>(high, a, b);
  low = pack<E>(first - a, second - b);
}

// One warp's 16 values of the state over a tile; y: its part of [token][Y_STRIDE].
template <class E> __device__ __forceinline__ void advance(State& s, const Tile<E>& tile, float* y) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  uint32_t high[4][4], low[4][4], value[4], b[2][2];
  float removed[2][2][4] = {}, out[2][2][4] = {};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    s.scale(2 * j, tile.enter);
    s.scale(2 * j + 1, tile.enter);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* x = s.x[2 * j + i / 2] + i % 2 * 2;
      split<E>(x[0], x[1], high[j][i], low[j][i]);
    }
    b_fragments<E, SIZE>(b, tile.a, j * 16);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      mma_16816<E>(removed[0][n], high[j], b[n]);
      mma_16816<E>(removed[1][n], low[j], b[n]);
    }
  }
  a_transposed<E, SIZE>(value, tile.v, warp * 16);
#pragma unroll
  for (int j = 0; j < 4; j++) {  // while the removal is on its way
    b_transposed<E, SIZE>(b, tile.k, j * 16);
    mma_16816<E>(s.x[2 * j], value, b[0]);
    mma_16816<E>(s.x[2 * j + 1], value, b[1]);
  }
  uint32_t u[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float *x = removed[0][i / 2] + i % 2 * 2, *z = removed[1][i / 2] + i % 2 * 2;
    u[i] = pack<E>(x[0] + z[0], x[1] + z[1]);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    b_transposed<E, SIZE>(b, tile.b, j * 16);
    mma_16816<E>(s.x[2 * j], u, b[0]);
    mma_16816<E>(s.x[2 * j + 1], u, b[1]);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    b_fragments<E, SIZE>(b, tile.r, j * 16);
#pragma unroll
    for (int n = 0; n < 2; n++) {
      mma_16816<E>(out[0][n], high[j], b[n]);
      mma_16816<E>(out[1][n], low[j], b[n]);
    }
  }
  b_fragments<E, TOKENS>(b, tile.z, 0);
#pragma unroll
  for (int n = 0; n < 2; n++) mma_16816<E>(out[0][n], value, b[n]);
#pragma unroll
  for (int n = 0; n < 8; n++) s.scale(n, tile.leave);
  y += warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) y[(n * 8 + lane % 4 * 2 + i % 2) * Y_STRIDE + i / 2 * 8] = out[0][n][i] + out[1][n][i];
}

}  // namespace tile7
}  // namespace rwkv
