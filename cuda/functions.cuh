// Scalar functions and reductions that the kernels share. float32 throughout; every sum has one fixed order.
#pragma once
#include "device.cuh"

namespace rwkv {

// 2^x by the hardware's instruction: 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1/x to 1 unit in the last place; Inf gives 0.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// 1/sqrt(x) to 2 units in the last place.
__device__ __forceinline__ float inverse_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / sqrtf(x);
#endif
}

// The relative error is at most (|x| + 4) 2^-24; NaN stays.
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + power_of_2(x * -1.4426950408889634f));
}

// RWKV-7's decay e^(-e^(-1/2) sigmoid(w0 + lin)), between 0.545 and 1, and its logarithm to base 2.
constexpr float LOG2_DECAY7 = -0.8750387749145276f;
__device__ __forceinline__ float log2_decay7(float w0, float lin) { return LOG2_DECAY7 * sigmoid(w0 + lin); }
__device__ __forceinline__ float decay7(float w0, float lin) { return power_of_2(log2_decay7(w0, lin)); }

// The factor that brings a vector to length 1, from the sum of its squares.
__device__ __forceinline__ float inverse_length(float squares) { return inverse_sqrt(fmaxf(squares, 1e-24f)); }

// The sum over each group of WIDTH neighbouring lanes (a power of 2 up to 32), in all of them. Every lane of the warp
// takes part.
template <int WIDTH> __device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
template <int WIDTH> __device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) { return group_sum<32>(x); }
__device__ __forceinline__ float warp_max(float x) { return group_max<32>(x); }

// Four sums over the warp for little more than the price of two: the lanes share the work of the wide steps.
__device__ __forceinline__ void warp_sums(float (&x)[4]) {
  const int lane = threadIdx.x & 31;
  const bool upper = lane & 16, odd = lane & 8;
  const float a = __shfl_xor_sync(0xffffffffu, upper ? x[0] : x[2], 16) + (upper ? x[2] : x[0]);
  const float b = __shfl_xor_sync(0xffffffffu, upper ? x[1] : x[3], 16) + (upper ? x[3] : x[1]);
  const float sum = group_sum<8>(__shfl_xor_sync(0xffffffffu, odd ? a : b, 8) + (odd ? b : a));
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = __shfl_sync(0xffffffffu, sum, 8 * i);
}

// The sum over the block, in every thread; shared: one float per warp. Ends with the block past a barrier, so that
// `shared` may be used again after another one.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  const int warps = (int)(blockDim.x + 31) / 32;
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < warps; i++) sum += shared[i];
  return sum;
}

}  // namespace rwkv
