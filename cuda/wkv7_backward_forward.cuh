// WKV-7's forward pass for training in tiles of 16 tokens on tensor cores, N = 64 and 16-bit inputs; it stores the
// states that the backward pass needs. Derivation: wkv7_backward.md.
//
// A block walks over the tiles of one head. Its first four warps find U, the other four the output; each of the eight
// holds 16 values x 32 keys of the state in registers.
#pragma once

#include "wkv7_backward_scale.cuh"
#include "wkv7_backward_tokens.cuh"

namespace rwkv {
namespace wkv7_training {

template <typename E> struct ForwardRoom {
  Scaled<NEEDS_LO<E>> in;
  Tile u;
  Plane s;  // the state before the tile
  Square ak, rk, rb;
  Triangle ab;
  Raw<E, 6> raw;
  alignas(16) float decay[HEAD];  // of the whole tile
  alignas(16) float room[TILE][4 * TILE + 4];
  int small[4];
};

template <typename E>
__device__ __forceinline__ void forward_tile(float (&s)[4][4], ForwardRoom<E>& at, const Tensors<E>& x, int64_t begin,
                                             int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column0 = warp % 4 * TILE, key0 = warp / 4 * 32;
  const bool front = warp < 4;
  const auto& in = at.in;
  float d[2][4] = {};
  if (front) {
    float product[2][4] = {};
    if (warp == 0) lower_product<1>(product, in.a, in.b), put_triangle(at.ab, product);
    if (warp == 1) lower_product<1>(product, in.a, in.k), put_all(at.ak, product);
    if (warp == 2) lower_product<0>(product, in.r, in.k), put_all(at.rk, product);
    if (warp == 3) lower_product<0>(product, in.r, in.b), put_all(at.rb, product);
  }
  const Tile& reads = front ? in.a : in.r;
  multiply<false, true, HEAD>(d, reads, 0, at.s, column0);
  __syncthreads();
  const Square& own = front ? at.ak : at.rk;
  multiply<false, false, TILE>(d, own, 0, in.v, column0);
  if (front) solve<false>(at.u, d, at.ab, at.room, column0, column0);
  __syncthreads();
  if (!front) {
    multiply<false, false, TILE>(d, at.rb, 0, at.u, column0);
    each_pair<2>([&](int n, int i, int t, int column) {
      if (t < count)
        write_pair(x.y + begin + t * (int64_t)x.heads * HEAD + column0 + column, d[n][2 * i], d[n][2 * i + 1]);
    });
  }
  multiply<true, false, TILE>(s, in.v, column0, in.k, key0);
  multiply<true, false, TILE>(s, at.u, column0, in.b, key0);
#pragma unroll
  for (int n = 0; n < 4; n++) {
    const float2 c = *reinterpret_cast<const float2*>(&at.decay[key0 + n * 8 + lane % 4 * 2]);
    s[n][0] *= c.x, s[n][1] *= c.y, s[n][2] *= c.x, s[n][3] *= c.y;
  }
}

template <typename E> __global__ void __launch_bounds__(THREADS, 3) forward_tiles(const Tensors<E> x) {
  DYNAMIC_SHARED(ForwardRoom<E>, at);
  const int item = blockIdx.x;
  const int warp = threadIdx.x / 32, row0 = warp % 4 * TILE, key0 = warp / 4 * 32;
  float s[4][4];
  read_rows(s, x.state + x.state_at(item), row0, key0);
  if (x.tokens > 0) fetch(at->raw, x, item, 0);
#pragma unroll 1
  for (int first = 0; first < x.tokens; first += TILE) {
    const int count = lesser(TILE, x.tokens - first);
    cp_async_wait<0>();
    __syncthreads();
    if (warp < 4) {
      const bool small = scale(
          at->in, at->raw, count,
          [&](int t, int key, float2 c) {
            if (t == TILE - 1) *reinterpret_cast<float2*>(&at->decay[key]) = c;
          },
          [](int, int) {});
      if (threadIdx.x % 32 == 0) at->small[warp] = small;
    }
    each_pair<4>([&](int n, int i, int row, int key) {
      put(at->s, row0 + row, key0 + key, s[n][2 * i], s[n][2 * i + 1]);
    });
    __syncthreads();
    const bool small = at->small[0] || at->small[1] || at->small[2] || at->small[3];
    if (small) {  // token by token; the state goes through memory from one layout to the other
      float* const state = x.last + x.state_at(item);
      write_rows(state, s, row0, key0);
      __syncthreads();
      Part<LayoutOf<HEAD>> part;
      read_state<LayoutOf<HEAD>>(part, state, HEAD, 0);
      stretch<LayoutOf<HEAD>>(part, *reinterpret_cast<Chunk<LayoutOf<HEAD>>*>(at), x, item, first, first + count, 0);
      write_state<LayoutOf<HEAD>>(state, part, HEAD, 0);
      __syncthreads();
      read_rows(s, state, row0, key0);
    } else if (first % x.every == 0) {
      write_rows(x.stored + x.mark_at(item, first / x.every), s, row0, key0);
    }
    if (first + TILE < x.tokens) fetch(at->raw, x, item, first + TILE);
    if (!small) forward_tile(s, *at, x, x.at(item, first), count);
  }
  write_rows(x.last + x.state_at(item), s, row0, key0);
}

}  // namespace wkv7_training
}  // namespace rwkv
