// Rows of channels shared out over the threads of a block, and their mean and variance. How a row is shared out, and so
// the order of its sums, depends on the number of channels alone.
#pragma once
#include <initializer_list>

#include "functions.cuh"

namespace rwkv {
namespace {

constexpr int VECTOR = 8;              // channels of a vector: 16 bytes of a 16-bit type
constexpr int MOST_ROW_THREADS = 512;  // of a block
constexpr int MOST_WARPS = MOST_ROW_THREADS / 32;
constexpr int64_t MOST_REGISTER_CHANNELS = 2 * VECTOR * MOST_ROW_THREADS;

// A block's threads when each has `width` channels at a time, or as many as there can be.
inline unsigned row_threads(int64_t channels, int64_t width) {
  const int64_t wanted = (channels + width - 1) / width;
  return wanted >= MOST_ROW_THREADS ? MOST_ROW_THREADS : unsigned((wanted + 31) / 32 * 32);
}

// Vectors of a thread when it holds a whole row's share in registers, 0 when it does not: long rows, and those that do
// not divide into vectors.
inline int register_vectors(int64_t channels) {
  if (channels % VECTOR != 0 || channels > MOST_REGISTER_CHANNELS) return 0;
  return channels <= VECTOR * MOST_ROW_THREADS ? 1 : 2;
}

__device__ __forceinline__ int64_t vector_channel(int vector) {
  return (int64_t)(vector * blockDim.x + threadIdx.x) * VECTOR;
}

template <class E, int WIDTH> __device__ __forceinline__ void load_width(const E* p, float (&x)[WIDTH]) {
  if constexpr (WIDTH == VECTOR)
    load8(p, x);
  else
    x[0] = to_float(*p);
}
template <class E, int WIDTH> __device__ __forceinline__ void store_width(E* p, const float (&x)[WIDTH]) {
  if constexpr (WIDTH == VECTOR)
    store8(p, x);
  else
    *p = from_float<E>(x[0]);
}

__device__ __forceinline__ float sum_of(const float (&x)[VECTOR]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
__device__ __forceinline__ float sum_of(const float (&x)[1]) { return x[0]; }

// The sum of (x - mean)^2, every rounding written out: the same whether or not the compiler fuses operations.
__device__ __forceinline__ float squares_of(const float (&x)[VECTOR], float mean) {
  float even = (x[0] - mean) * (x[0] - mean), odd = (x[1] - mean) * (x[1] - mean);
#pragma unroll
  for (int i = 2; i < VECTOR; i += 2) {
    even = fmaf(x[i] - mean, x[i] - mean, even);
    odd = fmaf(x[i + 1] - mean, x[i + 1] - mean, odd);
  }
  return even + odd;
}
__device__ __forceinline__ float squares_of(const float (&x)[1], float mean) {
  return fmaf(x[0] - mean, x[0] - mean, 0.0f);
}

// Sums over the block, in all its threads, for the price of one barrier.
template <int ROWS> __device__ __forceinline__ void block_sums(float (&x)[ROWS], float (&parts)[ROWS][MOST_WARPS]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    x[row] = warp_sum(x[row]);
    if (lane == 0) parts[row][warp] = x[row];
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; row++)
    x[row] = group_sum<MOST_WARPS>(lane % MOST_WARPS < warps ? parts[row][lane % MOST_WARPS] : 0.0f);
}

template <int ROWS> struct MomentScratch {
  float sums[ROWS][MOST_WARPS], squares[ROWS][MOST_WARPS];
};

struct Moments {
  float mean, scale;  // scale: 1 / standard deviation
  __device__ __forceinline__ float normalised(float x, float weight, float bias) const {
    return fmaf((x - mean) * scale, weight, bias);
  }
};

__device__ __forceinline__ float inverse_deviation(float squares, int64_t channels, float eps) {
  return 1.0f / sqrtf(squares / (float)channels + eps);
}

// Of rows in registers: the mean first, then the squares around it. Two barriers for all the rows together; between two
// uses of the same scratch there must be another.
template <int ROWS, int V>
__device__ __forceinline__ void register_moments(const float (&x)[ROWS][V][VECTOR], int64_t channels, float eps,
                                                 MomentScratch<ROWS>& scratch, Moments (&m)[ROWS]) {
  float sums[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    sums[row] = sum_of(x[row][0]);
#pragma unroll
    for (int v = 1; v < V; v++) sums[row] += sum_of(x[row][v]);
  }
  block_sums(sums, scratch.sums);
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    m[row].mean = sums[row] / (float)channels;
    sums[row] = 0.0f;
#pragma unroll
    for (int v = 0; v < V; v++)
      if (vector_channel(v) < channels) sums[row] += squares_of(x[row][v], m[row].mean);
  }
  block_sums(sums, scratch.squares);
#pragma unroll
  for (int row = 0; row < ROWS; row++) m[row].scale = inverse_deviation(sums[row], channels, eps);
}

// Of one row that is read where it lies, `width` channels at a time, twice.
template <class E, int WIDTH>
__device__ __forceinline__ Moments memory_moments(const E* x, int64_t channels, float eps, MomentScratch<1>& scratch) {
  const int64_t first = (int64_t)threadIdx.x * WIDTH, step = (int64_t)blockDim.x * WIDTH;
  float values[WIDTH], sum[1] = {0.0f}, squares[1] = {0.0f};
  for (int64_t c = first; c < channels; c += step) {
    load_width(x + c, values);
    sum[0] += sum_of(values);
  }
  block_sums(sum, scratch.sums);
  const float mean = sum[0] / (float)channels;
  for (int64_t c = first; c < channels; c += step) {
    load_width(x + c, values);
    squares[0] += squares_of(values, mean);
  }
  block_sums(squares, scratch.squares);
  return {mean, inverse_deviation(squares[0], channels, eps)};
}

}  // namespace
}  // namespace rwkv
