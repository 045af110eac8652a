// WKV-7 in tiles: what surrounds the recurrence in RWKV-7's time mix, and in plain WKV-7. `Inputs` makes the operands
// of a thread's tokens from the arguments, `Outputs` the results from y.
#pragma once
#include "time_mix7_prepare.cuh"

namespace rwkv {
namespace tile7 {

// A vector's values for a thread's two channels.
struct Two {
  float x[2];
  __device__ __forceinline__ Two(const float* p, int at, float scale = 1.0f) {
    const float2 two = *reinterpret_cast<const float2*>(p + at);
    x[0] = two.x * scale;
    x[1] = two.y * scale;
  }
  __device__ __forceinline__ float operator[](int i) const { return x[i]; }
};
template <class E> __device__ __forceinline__ void read(const E* p, float (&x)[2]) { unpack<E>(word(p), x[0], x[1]); }

// sigmoid(bias + x), the bias already scaled so that one operation makes the exponent.
constexpr float TO_EXPONENT = -1.4426950408889634f;
__device__ __forceinline__ float rate(float scaled_bias, float x) {
  return reciprocal(1.0f + power_of_2(fmaf(x, TO_EXPONENT, scaled_bias)));
}

template <class E> struct MixInputs {
  static constexpr int COUNT = 7, ALWAYS = 5;
  enum { R, K, V, W_LIN, A_LIN, V_LIN, V_FIRST };
  const Mix7Arguments& arguments;
  const int channel;

  __device__ __forceinline__ MixInputs(const Mix7Arguments& x, int channel) : arguments(x), channel(channel) {}
  __device__ __forceinline__ const E* input(int i) const {
    const Mix7Arguments& x = arguments;
    const void* all[COUNT] = {x.r, x.k, x.v, x.w_lin, x.a_lin, x.v_lin, x.v_first};
    return static_cast<const E*>(all[i]);
  }
  __device__ __forceinline__ bool all() const { return arguments.v_first; }

  // at: of the thread's channels in the tile's first row.
  __device__ __forceinline__ void operands(const E (&staged)[MOST_INPUTS][MATRIX], int64_t at, int columns, int count,
                                           Operands& o, Tile<E>& tile) const {
    const Place p;
    const int own = p.token(0) * SIZE + p.channel();
    // The vectors stay in the first-level cache: registers are what there is too little of.
    const Mix7Arguments& x = arguments;
    const Two w0(x.w0, channel, TO_EXPONENT), a0(x.a0, channel, TO_EXPONENT), k_k(x.k_k, channel), k_a(x.k_a, channel);
    const Two r_k(x.r_k, channel);
    float squares[4], bonus[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = own + i * SIZE;
      float k[2], w_lin[2], a_lin[2], kk[2];
      read(&staged[R][from], o.r[i]);
      read(&staged[K][from], k);
      read(&staged[W_LIN][from], w_lin);
      read(&staged[A_LIN][from], a_lin);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float a = rate(a0[e], a_lin[e]);
        o.log_decay[i][e] = p.token(i) < count ? __fmul_rn(LOG2_DECAY7, rate(w0[e], w_lin[e])) : 0.0f;
        kk[e] = k[e] * k_k[e];
        o.k[i][e] = k[e] * fmaf(a - 1.0f, k_a[e], 1.0f);
        o.a[i][e] = kk[e];
        o.b[i][e] = a;
      }
      squares[i] = fmaf(kk[0], kk[0], kk[1] * kk[1]);
      bonus[i] = fmaf(o.r[i][0] * o.k[i][0], r_k[0], o.r[i][1] * o.k[i][1] * r_k[1]);
    }
    if (all())
      mix_values(staged, own, tile);
    else
      pass_values(staged, own, at, columns, count, tile);
    warp_sums(squares);
    warp_sums(bonus);
    if (p.lane == 0) *reinterpret_cast<float4*>(&tile.bonus[p.token(0)]) = {bonus[0], bonus[1], bonus[2], bonus[3]};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float inverse = inverse_length(squares[i]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float kk = o.a[i][e] * inverse;
        o.a[i][e] = -kk;
        o.b[i][e] *= kk;
      }
    }
  }

  __device__ __forceinline__ void mix_values(const E (&staged)[MOST_INPUTS][MATRIX], int own, Tile<E>& tile) const {
    const Place p;
    const Two v0(arguments.v0, channel, TO_EXPONENT);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int from = own + i * SIZE;
      float v[2], v_lin[2], v_first[2];
      read(&staged[V][from], v);
      read(&staged[V_LIN][from], v_lin);
      read(&staged[V_FIRST][from], v_first);
#pragma unroll
      for (int e = 0; e < 2; e++) v[e] = fmaf(v_first[e] - v[e], rate(v0[e], v_lin[e]), v[e]);
      put(tile.v + p(i), v[0], v[1]);
    }
  }
  __device__ __forceinline__ void pass_values(const E (&staged)[MOST_INPUTS][MATRIX], int own, int64_t at, int columns,
                                              int count, Tile<E>& tile) const {
    const Place p;
    E* out = static_cast<E*>(arguments.v_out) + at;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t v = word(&staged[V][own + i * SIZE]);
      put_word(tile.v + p(i), v);
      if (p.token(i) < count) put_word(out + p.token(i) * columns, v);
    }
  }
};

template <class E> struct MixOutputs {
  const Mix7Arguments& arguments;
  const int channel;

  __device__ __forceinline__ MixOutputs(const Mix7Arguments& x, int channel) : arguments(x), channel(channel) {}

  __device__ __forceinline__ const E* gate() const { return static_cast<const E*>(arguments.g); }
  // at: of the thread's channels in the tile's first row; gates: [token][SIZE]; wait(): till y and the tile are there.
  template <class Wait>
  __device__ __forceinline__ void write(const Tile<E>& tile, const float* y, const E* gates, int64_t at, int columns,
                                        int count, Wait wait) const {
    const Place p;
    E* h_out = static_cast<E*>(arguments.h) + at;
    const Two weight(arguments.ln_weight, channel), bias(arguments.ln_bias, channel);
    wait();
    float x[4][2], sums[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = *reinterpret_cast<const float2*>(y + p.token(i) * Y_STRIDE + p.channel());
      x[i][0] = two.x;
      x[i][1] = two.y;
      sums[i] = two.x + two.y;
    }
    warp_sums(sums);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) x[i][e] = fmaf(sums[i], -1.0f / SIZE, x[i][e]);
      sums[i] = fmaf(x[i][0], x[i][0], x[i][1] * x[i][1]);
    }
    warp_sums(sums);
    const float4 four = *reinterpret_cast<const float4*>(&tile.bonus[p.token(0)]);
    const float bonus[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = p.token(i);
      const float scale = inverse_sqrt(fmaf(sums[i], 1.0f / SIZE, arguments.eps));
      float v[2], g[2], h[2];
      read(tile.v + p(i), v);
      read(gates + token * SIZE + p.channel(), g);
#pragma unroll
      for (int e = 0; e < 2; e++) h[e] = fmaf(bonus[i], v[e], fmaf(x[i][e] * scale, weight[e], bias[e])) * g[e];
      const uint32_t result = pack<E>(h[0], h[1]);
      if (token < count) put_word(h_out + token * columns, result);
    }
  }
};

template <class E> struct PlainInputs {
  static constexpr int COUNT = 6, ALWAYS = 6;
  enum { R, W, K, V, A, B };
  const Wkv7Arguments& arguments;

  __device__ __forceinline__ PlainInputs(const Wkv7Arguments& x, int) : arguments(x) {}
  __device__ __forceinline__ const E* input(int i) const {
    const Wkv7Arguments& x = arguments;
    const void* all[COUNT] = {x.r, x.w, x.k, x.v, x.a, x.b};
    return static_cast<const E*>(all[i]);
  }
  __device__ __forceinline__ void operands(const E (&staged)[MOST_INPUTS][MATRIX], int64_t, int, int count, Operands& o,
                                           Tile<E>& tile) const {
    const Place p;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = p.token(i), from = token * SIZE + p.channel();
      float w[2], v[2];
      read(&staged[R][from], o.r[i]);
      read(&staged[W][from], w);
      read(&staged[K][from], o.k[i]);
      read(&staged[V][from], v);
      read(&staged[A][from], o.a[i]);
      read(&staged[B][from], o.b[i]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float log = log2f(w[e]);
        o.log_decay[i][e] = token >= count ? 0.0f : log < -14.0f ? -14.0f : log;  // NaN stays
      }
      put(tile.v + p(i), v[0], v[1]);
    }
  }
};

template <class E> struct PlainOutputs {
  const Wkv7Arguments& arguments;
  __device__ __forceinline__ PlainOutputs(const Wkv7Arguments& x, int) : arguments(x) {}
  __device__ __forceinline__ const E* gate() const { return nullptr; }
  template <class Wait>
  __device__ __forceinline__ void write(const Tile<E>&, const float* y, const E*, int64_t at, int columns, int count,
                                        Wait wait) const {
    const Place p;
    E* out = static_cast<E*>(arguments.y) + at;
    wait();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = *reinterpret_cast<const float2*>(y + p.token(i) * Y_STRIDE + p.channel());
      if (p.token(i) < count) put_word(out + p.token(i) * columns, pack<E>(two.x, two.y));
    }
  }
};

}  // namespace tile7
}  // namespace rwkv
