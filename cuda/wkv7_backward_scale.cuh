// The tokens of a tile on their way from memory to the operands of its products: fetched ahead, scaled by the
// cumulative decay, and the triangular systems.
#pragma once

#include <type_traits>

#include "functions.cuh"
#include "wkv7_backward.cuh"
#include "wkv7_backward_mma.cuh"

namespace rwkv {
namespace wkv7_training {

// Tiles with a smaller decay go token by token: the gradient of w is found times w, and must still be divided by it.
constexpr float SMALLEST_DECAY = 0.125f;

template <typename E> struct alignas(4) Pair {
  E x, y;
};

template <typename E> constexpr bool NEEDS_LO = !std::is_same<E, bf16>::value;

template <typename E> __device__ __forceinline__ void write_pair(E* to, float x, float y) {
  *reinterpret_cast<Pair<E>*>(to) = Pair<E>{from_float<E>(x), from_float<E>(y)};
}

// A warp's share of a state as an accumulator: 16 rows from row0, 8 * COLUMNS keys from key0.
template <int COLUMNS>
__device__ __forceinline__ void read_rows(float (&d)[COLUMNS][4], const float* state, int row0, int key0) {
  each_pair<COLUMNS>([&](int n, int i, int row, int key) {
    const float2 pair = *reinterpret_cast<const float2*>(state + (row0 + row) * HEAD + key0 + key);
    d[n][2 * i] = pair.x, d[n][2 * i + 1] = pair.y;
  });
}

template <int COLUMNS>
__device__ __forceinline__ void write_rows(float* state, const float (&d)[COLUMNS][4], int row0, int key0) {
  each_pair<COLUMNS>([&](int n, int i, int row, int key) {
    *reinterpret_cast<float2*>(state + (row0 + row) * HEAD + key0 + key) = make_float2(d[n][2 * i], d[n][2 * i + 1]);
  });
}

// COUNT inputs of a tile as they come; what lies beyond the sequence is 0.
template <typename E, int COUNT> struct Raw {
  static constexpr int PITCH = HEAD / 2 + 4;
  alignas(16) Pair<E> rows[COUNT][TILE][PITCH];

  __device__ __forceinline__ float2 get(int input, int token, int column) const {
    const Pair<E> pair = rows[input][token][column / 2];
    return make_float2(to_float(pair.x), to_float(pair.y));
  }
};

// Begins to fetch the tile that starts at token `first`; wait with cp_async_wait<0>. All THREADS take part.
template <typename E, int COUNT>
__device__ __forceinline__ void fetch(Raw<E, COUNT>& raw, const Tensors<E>& x, int item, int first) {
  const E* const inputs[7] = {x.r, x.w, x.k, x.v, x.a, x.b, x.dy};
  const int64_t begin = x.at(item, first), stride = (int64_t)x.heads * HEAD;
  constexpr int VECTORS = HEAD / 8;
  const int token = threadIdx.x / VECTORS % TILE, part = threadIdx.x % VECTORS;
  const bool there = first + token < x.tokens;
  const int64_t from = begin + (there ? token * stride : 0) + part * 8;
#pragma unroll
  for (int n = 0; n < COUNT; n++)
    if ((int)threadIdx.x / (TILE * VECTORS) == n % 2)
      cp_async16(&raw.rows[n][token][part * 4], inputs[n] + from, there);
  cp_async_commit();
}

// With c_t the decay from the tile's first token up to t, c_0 = 1 before it.
template <bool LO> struct Scaled {
  Tile r, a, k, b;  // r_t c_t, a_t c_{t-1}, k_t / c_t, b_t / c_t
  TileOf<LO> v;     // float16 values need lo, bfloat16 ones are exact
};

// Fills `to` and the cumulative decay through write_decay(token, key, float2), and calls rest(token, key) for what
// else goes by pairs of channels. The first four warps; true in a warp that met a decay too small for tiles.
template <bool LO, typename E, int COUNT, typename WriteDecay, typename Rest>
__device__ __forceinline__ bool scale(Scaled<LO>& to, const Raw<E, COUNT>& raw, int count,
                                      const WriteDecay& write_decay, const Rest& rest) {
  const int lane = threadIdx.x % 32, key = (threadIdx.x / 32 * 8 + lane % 8) * 2, first = lane / 8 * 4;
  float2 w[4], whole = make_float2(1.0f, 1.0f);
  bool small = false;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    w[i] = first + i < count ? raw.get(1, first + i, key) : make_float2(1.0f, 1.0f);
    small = small || !(w[i].x >= SMALLEST_DECAY && w[i].y >= SMALLEST_DECAY);
    whole.x *= w[i].x, whole.y *= w[i].y;
  }
#pragma unroll
  for (int distance = 8; distance < 32; distance *= 2) {
    const float x = __shfl_up_sync(~0u, whole.x, distance), y = __shfl_up_sync(~0u, whole.y, distance);
    if (lane >= distance) whole.x *= x, whole.y *= y;
  }
  float2 c = make_float2(__shfl_up_sync(~0u, whole.x, 8), __shfl_up_sync(~0u, whole.y, 8));
  if (lane < 8) c = make_float2(1.0f, 1.0f);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int t = first + i;
    const float2 r = raw.get(0, t, key), k = raw.get(2, t, key), v = raw.get(3, t, key), a = raw.get(4, t, key),
                 b = raw.get(5, t, key);
    put(to.a, t, key, a.x * c.x, a.y * c.y);
    c.x *= w[i].x, c.y *= w[i].y;
    const float2 up = make_float2(reciprocal(c.x), reciprocal(c.y));
    put(to.r, t, key, r.x * c.x, r.y * c.y);
    put(to.k, t, key, k.x * up.x, k.y * up.y);
    put(to.b, t, key, b.x * up.x, b.y * up.y);
    put(to.v, t, key, v.x, v.y);
    write_decay(t, key, c);
    rest(t, key);
  }
  return __ballot_sync(~0u, small) != 0;
}

// Strictly lower triangle of A B^T, and its transpose.
struct Triangle {
  static constexpr int PITCH = TILE + 4;
  alignas(16) float rows[TILE][PITCH], columns[TILE][PITCH];
};

__device__ __forceinline__ void put_triangle(Triangle& to, const float (&d)[2][4]) {
  each_pair<2>([&](int n, int i, int row, int column) {
#pragma unroll
    for (int e = 0; e < 2; e++) to.rows[row][column + e] = to.columns[column + e][row] = d[n][2 * i + e];
  });
}

// Solves (I - triangle) X = d, or with its transpose if BACKWARDS, for the warp's 16 columns from n0, and puts X.
// `room` [token][columns] is the warp's own between the two synchronisations.
template <bool BACKWARDS, int PITCH>
__device__ __forceinline__ void solve(Tile& to, const float (&d)[2][4], const Triangle& triangle,
                                      float (&room)[TILE][PITCH], int room0, int n0) {
  each_pair<2>([&](int n, int i, int row, int column) {
    room[row][room0 + column] = d[n][2 * i];
    room[row][room0 + column + 1] = d[n][2 * i + 1];
  });
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (lane < TILE) {
    float x[TILE];
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      const int t = BACKWARDS ? TILE - 1 - i : i;
      x[t] = room[t][room0 + lane];
#pragma unroll
      for (int four = 0; four < TILE; four += 4) {
        if (BACKWARDS ? four + 3 <= t : four >= t) continue;
        const float* const row = BACKWARDS ? triangle.columns[t] : triangle.rows[t];
        const float4 m = *reinterpret_cast<const float4*>(row + four);
        const float values[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (BACKWARDS ? four + e > t : four + e < t) x[t] += values[e] * x[four + e];
      }
      room[t][room0 + lane] = x[t];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < TILE / 4; i++) {
    const int t = i * 4 + lane / 8, column = lane % 8 * 2;
    put(to, t, n0 + column, room[t][room0 + column], room[t][room0 + column + 1]);
  }
}

}  // namespace wkv7_training
}  // namespace rwkv
