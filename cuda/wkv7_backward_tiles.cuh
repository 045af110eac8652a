// WKV-7's backward pass in tiles of 16 tokens on tensor cores, N = 64 and 16-bit inputs. Derivation: wkv7_backward.md.
//
// A block walks over the tiles of one head from the last to the first. Its first four warps, the front, find what
// belongs to the reads of the state (U, the gradients of r, a and w); the other four, the back, hold the state's
// gradient and find what belongs to the writes (dU, the gradients of v, k and b). A warp owns 16 columns.
#pragma once

#include "wkv7_backward_scale.cuh"
#include "wkv7_backward_tokens.cuh"

namespace rwkv {
namespace wkv7_training {

template <typename E> struct BackwardRoom {
  static constexpr bool LO = NEEDS_LO<E>;
  Scaled<LO> in;
  TileOf<LO> dy;
  Tile u, du;
  Plane s, g;                                // the state before the tile; the gradient after it, times the tile's decay
  Square ak, rk, rb, dab, dak, drk, drb;     // products of a and r with k and b, token by token, and their gradients
  Triangle ab;
  Raw<E, 7> raw;
  alignas(16) float decay[TILE][HEAD + 8];   // cumulative
  alignas(16) float room[TILE][8 * TILE + 4];
  float ends[4][HEAD];                       // by warp: sums over values of gradient times state, at the tile's end
  int small[4];
};

// The sum over the lanes with the same columns.
__device__ __forceinline__ float sum_over_rows(float x) {
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 8);
  return x + __shfl_xor_sync(~0u, x, 16);
}

// The front's half of a tile; the synchronisations pair up with those of `back_of_tile`.
template <typename E>
__device__ __forceinline__ void front_of_tile(BackwardRoom<E>& at, const Tensors<E>& x, int64_t begin, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column0 = warp * TILE;
  const auto& in = at.in;
  {
    float d[2][4] = {};
    if (warp == 0) lower_product<1>(d, in.a, in.b), put_triangle(at.ab, d);
    if (warp == 1) lower_product<1>(d, in.a, in.k), put_all(at.ak, d);
    if (warp == 2) lower_product<0>(d, in.r, in.k), put_all(at.rk, d);
    if (warp == 3) lower_product<0>(d, in.r, in.b), put_all(at.rb, d);
  }
  float u[2][4] = {};
  multiply<false, true, HEAD>(u, in.a, 0, at.s, column0);
  __syncthreads();
  multiply<false, false, TILE>(u, at.ak, 0, in.v, column0);
  solve<false>(at.u, u, at.ab, at.room, column0, column0);
  __syncthreads();
  {
    float d[2][4] = {};
    if (warp == 0) lower_product<1>(d, at.du, at.u), put_all(at.dab, d);
    if (warp == 1) lower_product<1>(d, at.du, in.v), put_all(at.dak, d);
    if (warp == 2) lower_product<0>(d, at.dy, in.v), put_all(at.drk, d);
    if (warp == 3) lower_product<0>(d, at.dy, at.u), put_all(at.drb, d);
  }
  float dr[2][4] = {}, da[2][4] = {};
  multiply<false, false, HEAD>(dr, at.dy, 0, at.s, column0);
  multiply<false, false, HEAD>(da, at.du, 0, at.s, column0);
  __syncthreads();
  multiply<false, false, TILE>(dr, at.drk, 0, in.k, column0);
  multiply<false, false, TILE>(dr, at.drb, 0, in.b, column0);
  multiply<false, false, TILE>(da, at.dak, 0, in.k, column0);
  multiply<false, false, TILE>(da, at.dab, 0, in.b, column0);
  __syncthreads();

  const int64_t stride = (int64_t)x.heads * HEAD;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int key = column0 + n * 8 + lane % 4 * 2;
    float2 after[2], own[2];  // dlog of the cumulative decay, from the token's own and later rows; of its own a alone
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = lane / 4 + i * 8;
      const float2 r = get(in.r, t, key), a = get(in.a, t, key);
      own[i] = make_float2(a.x * da[n][2 * i], a.y * da[n][2 * i + 1]);
      after[i].x = own[i].x + r.x * dr[n][2 * i] + at.room[t][key];
      after[i].y = own[i].y + r.y * dr[n][2 * i + 1] + at.room[t][key + 1];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        const float right = __shfl_down_sync(~0u, after[i].x, distance);
        const float right_y = __shfl_down_sync(~0u, after[i].y, distance);
        if (lane + distance < 32) after[i].x += right, after[i].y += right_y;
      }
    }
    after[0].x += __shfl_sync(~0u, after[1].x, lane % 4);
    after[0].y += __shfl_sync(~0u, after[1].y, lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = lane / 4 + i * 8;
      if (t >= count) continue;
      const float2 now = *reinterpret_cast<const float2*>(&at.decay[t][key]);
      float2 before = make_float2(1.0f, 1.0f);
      if (t > 0) before = *reinterpret_cast<const float2*>(&at.decay[t - 1][key]);
      const int64_t to = begin + t * stride + key;
      write_pair(x.dr + to, dr[n][2 * i] * now.x, dr[n][2 * i + 1] * now.y);
      write_pair(x.da + to, da[n][2 * i] * before.x, da[n][2 * i + 1] * before.y);
      const float up = before.x * reciprocal(now.x), up_y = before.y * reciprocal(now.y);
      write_pair(x.dw + to, (after[i].x - own[i].x) * up, (after[i].y - own[i].y) * up_y);
    }
  }
}

// The back's half. s: the warp's rows of the state before the tile; g: of the gradient of the state after it, becomes
// that of s.
template <typename E>
__device__ __forceinline__ void back_of_tile(float (&g)[8][4], const float (&s)[8][4], BackwardRoom<E>& at,
                                             const Tensors<E>& x, int64_t begin, int count) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, column0 = warp * TILE;
  const auto& in = at.in;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const int key = n * 8 + lane % 4 * 2;
    const float2 c = *reinterpret_cast<const float2*>(&at.decay[TILE - 1][key]);
    g[n][0] *= c.x, g[n][1] *= c.y, g[n][2] *= c.x, g[n][3] *= c.y;
    put(at.g, column0 + lane / 4, key, g[n][0], g[n][1]);
    put(at.g, column0 + lane / 4 + 8, key, g[n][2], g[n][3]);
    const float end = sum_over_rows(g[n][0] * s[n][0] + g[n][2] * s[n][2]);
    const float end_y = sum_over_rows(g[n][1] * s[n][1] + g[n][3] * s[n][3]);
    if (lane < 4) at.ends[warp][key] = end, at.ends[warp][key + 1] = end_y;
  }
  __syncwarp();  // a warp multiplies with its own rows first
  float du[2][4] = {}, dv[2][4] = {};
  multiply<false, true, HEAD>(du, in.b, 0, at.g, column0);
  multiply<false, true, HEAD>(dv, in.k, 0, at.g, column0);
  __syncthreads();
  multiply<true, false, TILE>(du, at.rb, 0, at.dy, column0);
  solve<true>(at.du, du, at.ab, at.room, HEAD + column0, column0);
  __syncthreads();
  const int64_t stride = (int64_t)x.heads * HEAD;
  multiply<true, false, TILE>(dv, at.rk, 0, at.dy, column0);
  multiply<true, false, TILE>(dv, at.ak, 0, at.du, column0);
  each_pair<2>([&](int n, int i, int t, int column) {
    if (t < count) write_pair(x.dv + begin + t * stride + column0 + column, dv[n][2 * i], dv[n][2 * i + 1]);
  });
  float dk[2][4] = {}, db[2][4] = {}, ends[2][2];
  multiply<false, false, HEAD>(dk, in.v, 0, at.g, column0);
  multiply<false, false, HEAD>(db, at.u, 0, at.g, column0);
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int t = lane / 4, key = column0 + n * 8 + lane % 4 * 2;
      const auto side = [&](float2 pair) { return e ? pair.y : pair.x; };
      const float upper = side(get(in.k, t, key)) * dk[n][e] + side(get(in.b, t, key)) * db[n][e];
      const float lower = side(get(in.k, t + 8, key)) * dk[n][2 + e] + side(get(in.b, t + 8, key)) * db[n][2 + e];
      ends[n][e] = sum_over_rows(upper + lower);
      for (int from = 0; from < 4; from++) ends[n][e] += at.ends[from][key + e];
    }
  multiply<true, false, TILE>(g, at.dy, column0, in.r, 0);
  multiply<true, false, TILE>(g, at.du, column0, in.a, 0);
  __syncthreads();
  multiply<true, false, TILE>(dk, at.drk, 0, in.r, column0);
  multiply<true, false, TILE>(dk, at.dak, 0, in.a, column0);
  multiply<true, false, TILE>(db, at.drb, 0, in.r, column0);
  multiply<true, false, TILE>(db, at.dab, 0, in.a, column0);
  each_pair<2>([&](int n, int i, int t, int column) {
    const int key = column0 + column;
    const float2 k = get(in.k, t, key), b = get(in.b, t, key);
    const float dk_x = dk[n][2 * i], dk_y = dk[n][2 * i + 1], db_x = db[n][2 * i], db_y = db[n][2 * i + 1];
    at.room[t][key] = (t == TILE - 1 ? ends[n][0] : 0.0f) - k.x * dk_x - b.x * db_x;
    at.room[t][key + 1] = (t == TILE - 1 ? ends[n][1] : 0.0f) - k.y * dk_y - b.y * db_y;
    if (t >= count) return;
    const float2 c = *reinterpret_cast<const float2*>(&at.decay[t][key]);
    const float up = reciprocal(c.x), up_y = reciprocal(c.y);
    write_pair(x.dk + begin + t * stride + key, dk_x * up, dk_y * up_y);
    write_pair(x.db + begin + t * stride + key, db_x * up, db_y * up_y);
  });
  __syncthreads();
}

// Whether the tile whose scaling has just been synchronised has a decay too small for tiles.
template <typename E> __device__ __forceinline__ bool too_small(const BackwardRoom<E>& at) {
  return at.small[0] || at.small[1] || at.small[2] || at.small[3];
}

// The tiles from `tile` down to the first one, or to one with a decay too small for tiles, which is returned (else -1).
// Front and back have a loop each, for the sake of registers: what one holds is none of the other's. They synchronise
// together, and both fetch.
template <typename E>
__device__ __forceinline__ int front_tiles(BackwardRoom<E>& at, const Tensors<E>& x, int item, int tile) {
#pragma unroll 1
  for (; tile >= 0; tile--) {
    const int first = tile * TILE, count = lesser(TILE, x.tokens - first);
    cp_async_wait<0>();
    __syncthreads();
    const bool small = scale(
        at.in, at.raw, count,
        [&](int t, int key, float2 c) { *reinterpret_cast<float2*>(&at.decay[t][key]) = c; },
        [&](int t, int key) {
          const float2 dy = at.raw.get(6, t, key);
          put(at.dy, t, key, dy.x, dy.y);
        });
    if (threadIdx.x % 32 == 0) at.small[threadIdx.x / 32] = small;
    __syncthreads();
    if (too_small(at)) break;
    if (tile > 0) fetch(at.raw, x, item, first - TILE);
    front_of_tile(at, x, x.at(item, first), count);
  }
  return tile;
}

// The gradient of the state comes from `gradient` and is left in x.dstate.
template <typename E>
__device__ __forceinline__ int back_tiles(BackwardRoom<E>& at, const Tensors<E>& x, int item, int tile,
                                          const float* gradient) {
  const int row0 = threadIdx.x / 32 % 4 * TILE;
  float g[8][4];
  read_rows(g, gradient, row0, 0);
#pragma unroll 1
  for (; tile >= 0; tile--) {
    const int first = tile * TILE, count = lesser(TILE, x.tokens - first);
    float s[8][4];
    read_rows(s, x.stored + x.mark_at(item, tile), row0, 0);
    cp_async_wait<0>();
    __syncthreads();
    each_pair<8>([&](int n, int i, int row, int key) { put(at.s, row0 + row, key, s[n][2 * i], s[n][2 * i + 1]); });
    __syncthreads();
    if (too_small(at)) break;
    if (tile > 0) fetch(at.raw, x, item, first - TILE);
    back_of_tile(g, s, at, x, x.at(item, first), count);
  }
  write_rows(x.dstate + x.state_at(item), g, row0, 0);
  return tile;
}

// Two blocks fit a multiprocessor of an H100, one with float16's operands.
template <typename E>
__global__ void __launch_bounds__(THREADS, NEEDS_LO<E> ? 1 : 2) backward_tiles(const Tensors<E> x) {
  DYNAMIC_SHARED(BackwardRoom<E>, at);
  const int item = blockIdx.x;
  const float* gradient = x.dlast + x.state_at(item);
#pragma unroll 1
  for (int tile = x.marks - 1; tile >= 0; tile--) {
    fetch(at->raw, x, item, tile * TILE);
    tile = threadIdx.x < THREADS / 2 ? front_tiles(*at, x, item, tile) : back_tiles(*at, x, item, tile, gradient);
    if (tile < 0) break;
    __syncthreads();
    Part<LayoutInTiles> part;
    stretch_back(part, *reinterpret_cast<Work<LayoutInTiles>*>(at), x, item, tile * TILE,
                 lesser((tile + 1) * TILE, x.tokens), x.stored + x.mark_at(item, tile));
    gradient = x.dstate + x.state_at(item);
  }
}

template <typename E> constexpr int backward_tiles_bytes() {
  return sizeof(BackwardRoom<E>) > sizeof(Work<LayoutInTiles>) ? sizeof(BackwardRoom<E>) : sizeof(Work<LayoutInTiles>);
}

}  // namespace wkv7_training
}  // namespace rwkv
