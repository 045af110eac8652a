// Products of 16-token tiles on tensor cores for WKV-7's training: operands in shared memory as bfloat16 pairs.
//
// What is not exact in bfloat16 is kept as a sum hi + lo of two (16 bits of mantissa); a product then takes three
// multiplications, hi hi + hi lo + lo hi. bfloat16 serves float16 models too: gradients and scaled keys leave the range
// of float16.
#pragma once

#include "device.cuh"

namespace rwkv {
namespace wkv7_training {

constexpr int TILE = 16, HEAD = 64;  // tokens of a tile; the head size that tiles are for

// ROWS x COLUMNS numbers, two to a word. Rows are padded so that the eight rows that ldmatrix reads at a time lie in
// different banks.
template <int ROWS, int COLUMNS, bool LO> struct Operand {
  static constexpr bool HAS_LO = LO;
  static constexpr int PITCH = COLUMNS / 2 + 4;
  alignas(16) uint32_t hi[ROWS][PITCH];
  alignas(16) uint32_t lo[LO ? ROWS : 1][LO ? PITCH : 1];
};
template <bool LO = true> using TileOf = Operand<TILE, HEAD, LO>;  // [token][channel]
using Tile = TileOf<true>;
using Plane = Operand<HEAD, HEAD, true>;    // [value][key]
using Square = Operand<TILE, TILE, true>;   // [token][token]

__device__ __forceinline__ float2 unpack2(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

// Two neighbours, the first at an even column.
template <typename M> __device__ __forceinline__ void put(M& m, int row, int column, float x, float y) {
  const uint32_t hi = pack2<bf16>(x, y);
  m.hi[row][column / 2] = hi;
  if constexpr (M::HAS_LO) {
    const float2 rounded = unpack2(hi);
    m.lo[row][column / 2] = pack2<bf16>(x - rounded.x, y - rounded.y);
  }
}

template <typename M> __device__ __forceinline__ float2 get(const M& m, int row, int column) {
  float2 x = unpack2(m.hi[row][column / 2]);
  if constexpr (M::HAS_LO) {
    const float2 rest = unpack2(m.lo[row][column / 2]);
    x.x += rest.x, x.y += rest.y;
  }
  return x;
}

// The fragment of mma's left operand, 16 x 16 from (m0, k0), of m or of its transpose.
template <bool TRANSPOSED, int ROWS, int PITCH>
__device__ __forceinline__ void left(uint32_t (&f)[4], const uint32_t (&m)[ROWS][PITCH], int m0, int k0) {
  const int lane = threadIdx.x % 32;
  if (TRANSPOSED) ldmatrix_x4_trans(f, &m[k0 + lane % 8 + lane / 16 * 8][(m0 + lane / 8 % 2 * 8) / 2]);
  else ldmatrix_x4(f, &m[m0 + lane % 16][(k0 + lane / 16 * 8) / 2]);
}

// The fragments of two right operands, 16 x 8 each, side by side from (k0, n0), of m or of its transpose.
template <bool TRANSPOSED, int ROWS, int PITCH>
__device__ __forceinline__ void right(uint32_t (&f)[2][2], const uint32_t (&m)[ROWS][PITCH], int k0, int n0) {
  const int lane = threadIdx.x % 32;
  uint32_t four[4];
  if (TRANSPOSED) ldmatrix_x4(four, &m[n0 + lane % 8 + lane / 16 * 8][(k0 + lane / 8 % 2 * 8) / 2]);
  else ldmatrix_x4_trans(four, &m[k0 + lane % 16][(n0 + lane / 16 * 8) / 2]);
  f[0][0] = four[0], f[0][1] = four[1], f[1][0] = four[2], f[1][1] = four[3];
}

// d += a b: 16 rows of a from m0, 8 * COLUMNS columns of b from n0, over DEPTH. A_T, B_T: of the transpose of what is
// stored. Element e of d[n] is row lane / 4 + e / 2 * 8, column n * 8 + lane % 4 * 2 + e % 2.
template <bool A_T, bool B_T, int DEPTH, int COLUMNS, typename A, typename B>
__device__ __forceinline__ void multiply(float (&d)[COLUMNS][4], const A& a, int m0, const B& b, int n0) {
#pragma unroll
  for (int k0 = 0; k0 < DEPTH; k0 += 16) {
    uint32_t a_hi[4], a_lo[4];
    left<A_T>(a_hi, a.hi, m0, k0);
    if constexpr (A::HAS_LO) left<A_T>(a_lo, a.lo, m0, k0);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t b_hi[2][2], b_lo[2][2];
      right<B_T>(b_hi, b.hi, k0, n0 + n * 8);
      if constexpr (B::HAS_LO) right<B_T>(b_lo, b.lo, k0, n0 + n * 8);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if constexpr (A::HAS_LO) mma_16816<bf16>(d[n + i], a_lo, b_hi[i]);
        if constexpr (B::HAS_LO) mma_16816<bf16>(d[n + i], a_hi, b_lo[i]);
        mma_16816<bf16>(d[n + i], a_hi, b_hi[i]);
      }
    }
  }
}

// Calls f(n, i, row, column) for the pairs of neighbours of an accumulator: elements 2 i and 2 i + 1 of d[n].
template <int COLUMNS, typename F> __device__ __forceinline__ void each_pair(const F& f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) f(n, i, lane / 4 + i * 8, n * 8 + lane % 4 * 2);
}

// a b^T of two tiles, kept where row >= column + BELOW, else 0. One warp.
template <int BELOW, typename A, typename B>
__device__ __forceinline__ void lower_product(float (&d)[2][4], const A& a, const B& b) {
  multiply<false, true, HEAD, 2>(d, a, 0, b, 0);
  each_pair<2>([&](int n, int i, int row, int column) {
    if (row < column + BELOW) d[n][2 * i] = 0.0f;
    if (row < column + 1 + BELOW) d[n][2 * i + 1] = 0.0f;
  });
}

template <typename M, int COLUMNS> __device__ __forceinline__ void put_all(M& m, const float (&d)[COLUMNS][4]) {
  each_pair<COLUMNS>([&](int n, int i, int row, int column) { put(m, row, column, d[n][2 * i], d[n][2 * i + 1]); });
}

}  // namespace wkv7_training
}  // namespace rwkv
