// The body for float32 and for inputs that do not divide into 16 bytes: multiply-adds in float32.
//   Bytes: the matrix once, sizeof(E) N K; x comes from the cache, for every 4 outputs again.
//
// A warp computes 4 outputs for all rows; its lanes share the inputs out, WIDTH at a time in turn. The order of a sum
// depends on the number of inputs alone.
#pragma once
#include "thin.cuh"

namespace rwkv {
namespace {
namespace thin_plain {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int OUTPUTS = 4;  // of a warp

template <class E, int WIDTH> __device__ __forceinline__ void load_inputs(const E* p, bool valid, float (&x)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) x[i] = 0.0f;
  if (!valid) return;
  if constexpr (WIDTH == 4) {
    const float4 four = *(const float4*)p;
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
    x[0] = to_float(*p);
  }
}

// Up to ROWS rows of x.
template <class E, int WIDTH, int ROWS> __global__ void __launch_bounds__(THREADS) kernel(Thin<E> p) {
  const int lane = threadIdx.x % 32;
  const int64_t first = ((int64_t)blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
  if (first >= p.outputs) return;
  float sums[ROWS][OUTPUTS] = {}, w[OUTPUTS][WIDTH], next[OUTPUTS][WIDTH];
  const auto load_weights = [&](int64_t k, float(&to)[OUTPUTS][WIDTH]) {
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++)
      load_inputs(p.w + (first + n) * p.inputs + k, k < p.inputs && first + n < p.outputs, to[n]);
  };
  load_weights(lane * WIDTH, next);
  for (int64_t k = lane * WIDTH; k < p.inputs; k += 32 * WIDTH) {
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) w[n][i] = next[n][i];
    load_weights(k + 32 * WIDTH, next);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      float x[WIDTH];
      load_inputs(p.x + row * p.x_stride + k, row < p.rows, x);
#pragma unroll
      for (int n = 0; n < OUTPUTS; n++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sums[row][n] = fmaf(w[n][i], x[i], sums[row][n]);
    }
  }
  // A lane finishes every 32nd of the sums.
  constexpr int SHARE = (ROWS * OUTPUTS + 31) / 32;
  float own[SHARE] = {};
#pragma unroll
  for (int i = 0; i < ROWS * OUTPUTS; i++) {
    const float sum = warp_sum(sums[i / OUTPUTS][i % OUTPUTS]);
    if (lane == i % 32) own[i / 32] = sum;
  }
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    const int row = (lane + 32 * i) / OUTPUTS, n = lane % OUTPUTS;
    if (row < p.rows && row < ROWS && first + n < p.outputs) p.finish(row, first + n, own[i]);
  }
}

template <class E, int WIDTH> int launch(const Thin<E>& p, void* stream) {
  const int64_t outputs = WARPS * OUTPUTS;
  const dim3 grid(unsigned((p.outputs + outputs - 1) / outputs));
  if (p.rows <= 2) return LAUNCH((kernel<E, WIDTH, 2>), grid, dim3(THREADS), 0, stream, p);
  return LAUNCH((kernel<E, WIDTH, MOST_THIN_ROWS>), grid, dim3(THREADS), 0, stream, p);
}

}  // namespace thin_plain
}  // namespace
}  // namespace rwkv
