// The head's softmax, folded together from slices of the vocabulary: the logits of one slice exist at a time.
//   Bytes of a token and slice of n ids: n sizeof(logit) in.
//
// A row's state in `running`: the largest logit so far, the sum of the exponentials relative to it as the sum of two
// floats, and the target's logit. Pieces of 8192 ids are folded in one after the other; within a piece the
// exponentials are float32, over threads and pieces their sums are float64, all in an order that depends on the number
// of ids alone.
#include "rows.cuh"

namespace rwkv {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int VECTORS = 4;                              // of a thread in a piece
constexpr int64_t PIECE = VECTORS * VECTOR * THREADS;  // ids

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__global__ void begin_kernel(float4* running, int64_t rows) {
  const int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  // A target that lies in none of the slices leaves NaN behind.
  if (t < rows) running[t] = make_float4(minus_infinity(), 0.0f, 0.0f, not_a_number());
}

struct Row {
  float maximum;
  double sum;
  __device__ explicit Row(float4 r) : maximum(r.x), sum((double)r.y + (double)r.z) {}
  // NaN among the logits is not seen by the maximum but by the sum.
  __device__ void fold(float other_maximum, double other_sum) {
    const float largest = fmaxf(maximum, other_maximum);
    sum = scaled(sum, maximum, largest) + scaled(other_sum, other_maximum, largest);
    maximum = largest;
  }
  __device__ static double scaled(double sum, float from, float to) {
    return from == to ? sum : sum * exp((double)from - (double)to);
  }
};

template <class E, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    slice_kernel(const E* logits, const int64_t* targets, float4* running, int64_t n, int64_t first_id,
                 int64_t stride) {
  __shared__ float largest[2][WARPS];
  __shared__ double sums[2][WARPS];
  const int64_t t = blockIdx.x, target = targets[t];
  if (target == -1) return;
  const E* own = logits + t * stride;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Row row(running[t]);  // kept up by the first thread
  int turn = 0;
  for (int64_t piece = 0; piece < n; piece += PIECE, turn ^= 1) {
    float x[VECTORS][VECTOR];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int64_t id = piece + (int64_t)(v * THREADS + threadIdx.x) * VECTOR;
      if (ALIGNED && id + VECTOR <= n) {
        load8(own + id, x[v]);
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x[v][i] = id + i < n ? to_float(own[id + i]) : minus_infinity();
      }
    }
    float maximum = minus_infinity();
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) maximum = fmaxf(maximum, x[v][i]);
    maximum = warp_max(maximum);
    if (lane == 0) largest[turn][warp] = maximum;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) maximum = fmaxf(maximum, largest[turn][i]);
    const float offset = maximum == minus_infinity() ? 0.0f : maximum;
    float part = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
      for (int i = 0; i < VECTOR; i++) x[v][i] = expf(x[v][i] - offset);
      part += sum_of(x[v]);
    }
    double sum = part;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[turn][warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    sum = 0.0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += sums[turn][i];
    row.fold(maximum, sum);
  }
  if (threadIdx.x != 0) return;
  const float high = (float)row.sum;
  const float logit = target >= first_id && target < first_id + n ? to_float(own[target - first_id]) : running[t].w;
  running[t] = make_float4(row.maximum, high, (float)(row.sum - (double)high), logit);
}

__global__ void end_kernel(const float4* running, const int64_t* targets, float* out, int64_t rows) {
  const int64_t t = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (t >= rows) return;
  const float4 r = running[t];
  const Row row(r);
  out[t] = targets[t] == -1 ? 0.0f : (float)((double)r.w - (double)r.x - log(row.sum));
}

int blocks_for(int64_t rows) { return int((rows + THREADS - 1) / THREADS); }

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// running: float32 [rows, 4], which head_slice and head_end understand.
extern "C" int rwkvmpi_cuda_head_begin(float* running, int64_t rows, int device, void* stream) {
  CHECK(rows >= 0 && rows <= INT32_MAX, BAD_SIZE);
  if (rows == 0) return OK;
  CHECK(running, BAD_POINTER);
  CHECK(all_on(16, {running}), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return LAUNCH(begin_kernel, dim3(blocks_for(rows)), dim3(THREADS), 0, stream, (float4*)running, rows);
}

// Folds the logits of the ids first_id .. first_id + n - 1 in; logits: [rows, n] in `dtype`, row_stride elements apart.
// The slices may come in any order, but bits are the same only for the same slices in the same order.
extern "C" int rwkvmpi_cuda_head_slice(const void* logits, const int64_t* targets, float* running, int64_t rows,
                                       int64_t n, int64_t first_id, int64_t row_stride, int dtype, int device,
                                       void* stream) {
  CHECK(rows >= 0 && n >= 0 && first_id >= 0, BAD_SIZE);
  CHECK(rows <= INT32_MAX && n <= INT32_MAX && first_id <= INT32_MAX, BAD_SIZE);
  CHECK(rows <= 1 || row_stride >= n, BAD_STRIDE);
  CHECK(row_stride <= INT64_MAX / 4 / (rows + 1), BAD_SIZE);
  if (rows == 0 || n == 0) return OK;
  CHECK(logits && targets && running, BAD_POINTER);
  CHECK(all_on(16, {running}) && all_on(8, {targets}), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(sizeof(E), {logits}), MISALIGNED);
    const bool vectors = all_on(16, {logits}) && (rows == 1 || row_stride * sizeof(E) % 16 == 0);
    auto kernel = vectors ? slice_kernel<E, true> : slice_kernel<E, false>;
    return LAUNCH(kernel, dim3(unsigned(rows)), dim3(THREADS), 0, stream, (const E*)logits, targets, (float4*)running,
                  n, first_id, row_stride);
  });
}

// out[t], float32 = ln softmax of row t at targets[t]: 0 where the target is -1, NaN where it was in no slice.
extern "C" int rwkvmpi_cuda_head_end(const float* running, const int64_t* targets, float* out, int64_t rows, int device,
                                     void* stream) {
  CHECK(rows >= 0 && rows <= INT32_MAX, BAD_SIZE);
  if (rows == 0) return OK;
  CHECK(running && targets && out, BAD_POINTER);
  CHECK(all_on(16, {running}) && all_on(8, {targets}) && all_on(4, {out}), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return LAUNCH(end_kernel, dim3(blocks_for(rows)), dim3(THREADS), 0, stream, (const float4*)running, targets, out,
                rows);
}
