// WKV-6 and WKV-5 for heads of 64: how the state advances through a tile of 16 tokens, four tokens at a time.
//
// With the decays between them multiplied out,
//   y_t = S (r_t W_t) + sum over s < t of (r_t . (k_s W_st)) v_s + (r_t . (u k_t)) v_t,
//   S <- S W_4 + sum over t of v_t (k_t W_t4),    W_st: the product of the decays of the tokens between s and t,
// an element costs 9 multiply-adds for four tokens instead of 12, and 9 operands are read instead of 12. No product of
// decays exceeds 1 and nothing is divided by one, so any decay from 0 to 1 will do.
#pragma once
#include "wkv6.cuh"

namespace rwkv {
namespace {
namespace heads_of_64 {

constexpr int N = 64, TILE = 16, GROUP = 4, GROUPS = TILE / GROUP;
constexpr int THREADS = 256, ADVANCING = 128;  // the first warps advance
constexpr int PITCH = N + 4;                   // rows start 16 bytes further round the banks
constexpr int PAIRS = GROUP * (GROUP + 1) / 2;
enum { HELPERS = 1, STEP };  // barriers

struct Operands {
  float r[TILE][PITCH], k[TILE][PITCH], v[TILE][PITCH];  // r and k with their decays
  float w[GROUPS][PITCH];                                // the product of a group's decays
  float pairs[TILE][GROUP];                              // token's weight of each v of its group; 0 for later ones
};
struct Shared {
  Operands operands[2];
  float y[2][TILE][PITCH];
  float w[TILE][PITCH];  // the decays while a tile is prepared
};

// Two rows of values by 16 keys of the state per lane: keys 4 * (lane % 4) + 16 * j + 0..3, so that a warp's read of an
// operand is 64 bytes of one row.
struct State {
  float s[2][16];
  __device__ static int64_t at(int row) {
    return (int64_t)(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2 + row) * N + threadIdx.x % 4 * 4;
  }
  __device__ void read(const float* p) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float4 x = *reinterpret_cast<const float4*>(p + at(i) + 16 * j);
        s[i][4 * j] = x.x, s[i][4 * j + 1] = x.y, s[i][4 * j + 2] = x.z, s[i][4 * j + 3] = x.w;
      }
  }
  __device__ void write(float* p) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        *reinterpret_cast<float4*>(p + at(i) + 16 * j) =
            make_float4(s[i][4 * j], s[i][4 * j + 1], s[i][4 * j + 2], s[i][4 * j + 3]);
  }
};

__device__ __forceinline__ void read4(float (&x)[4], const float* p) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
}

__device__ __forceinline__ void read2(float (&x)[2], const float* p) {
  const float2 q = *reinterpret_cast<const float2*>(p);
  x[0] = q.x, x[1] = q.y;
}
__device__ __forceinline__ void write2(float* p, const float (&x)[2]) {
  *reinterpret_cast<float2*>(p) = make_float2(x[0], x[1]);
}

// One tile. Issue slots per four tokens and warp: 288 of arithmetic, 36 + 5 reads, 24 + 8 for the sums: 90 per token.
__device__ __forceinline__ void advance(State& state, const Operands& x, float (*out)[PITCH]) {
  const int part = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 * 2;
#pragma unroll 1
  for (int g = 0; g < TILE; g += GROUP) {
    float y[GROUP][2] = {}, v[GROUP][2];
#pragma unroll
    for (int t = 0; t < GROUP; t++) read2(v[t], &x.v[g + t][row]);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int key = 16 * j + 4 * part;
      float r[GROUP][4], k[GROUP][4], w[4];
#pragma unroll
      for (int t = 0; t < GROUP; t++) read4(r[t], &x.r[g + t][key]);
#pragma unroll
      for (int t = 0; t < GROUP; t++) read4(k[t], &x.k[g + t][key]);
      read4(w, &x.w[g / GROUP][key]);
#pragma unroll
      for (int t = 0; t < GROUP; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) y[t][i] = fmaf(state.s[i][4 * j + e], r[t][e], y[t][i]);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float s = state.s[i][4 * j + e] * w[e];
#pragma unroll
          for (int t = 0; t < GROUP; t++) s = fmaf(v[t][i], k[t][e], s);
          state.s[i][4 * j + e] = s;
        }
    }
    // Over the four lanes of a row; the lane `part` ends with the group's token of that number.
    float sum[2];
    const bool high = part & 2, odd = part & 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float half[2];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const float given = high ? y[t][i] : y[t + 2][i], kept = high ? y[t + 2][i] : y[t][i];
        half[t] = kept + __shfl_xor_sync(0xffffffffu, given, 2);
      }
      const float given = odd ? half[0] : half[1], kept = odd ? half[1] : half[0];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, 1);
    }
    float pair[GROUP];
    read4(pair, x.pairs[g + part]);
#pragma unroll
    for (int s = 0; s < GROUP; s++)
#pragma unroll
      for (int i = 0; i < 2; i++) sum[i] = fmaf(pair[s], v[s][i], sum[i]);
    write2(&out[g + part][row], sum);
  }
}

// The sums over the warp's lanes of COUNT values: every step halves how many a lane holds. The lane ends with the sum
// number place().index, in the same order of additions wherever it lands.
template <int COUNT, int MASK> struct Sums {
  static constexpr int HALF = (COUNT + 1) / 2;
  static __device__ __forceinline__ float of(const float (&x)[COUNT], int lane) {
    float half[HALF];
    const bool high = lane & MASK;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const int j = i + HALF;
      const float given = j < COUNT && !high ? x[j < COUNT ? j : i] : x[i];
      const float kept = j < COUNT && high ? x[j < COUNT ? j : i] : x[i];
      half[i] = kept + __shfl_xor_sync(0xffffffffu, given, MASK);
    }
    return Sums<HALF, MASK / 2>::of(half, lane);
  }
  // The number of this lane's sum; -1 where another lane has it as well and writes it.
  static __device__ __forceinline__ int place(int lane) {
    const int i = Sums<HALF, MASK / 2>::place(lane);
    if (!(lane & MASK) || i < 0) return i;
    return i + HALF < COUNT ? i + HALF : -1;
  }
};
template <int COUNT> struct Sums<COUNT, 0> {
  static_assert(COUNT == 1, "more sums than lanes");
  static __device__ __forceinline__ float of(const float (&x)[1], int) { return x[0]; }
  static __device__ __forceinline__ int place(int) { return 0; }
};

}  // namespace heads_of_64
}  // namespace
}  // namespace rwkv
