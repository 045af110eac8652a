// Sums of rows through shared memory, where the second barrier keeps the next row from overwriting the parts too early.
#include "device.cuh"

template <bool WRONG> static __global__ void row_sums(const float* in, float* out, int rows) {
  __shared__ float parts[64];
  for (int row = 0; row < rows; row++) {
    parts[threadIdx.x] = in[row * 64 + threadIdx.x];
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < 64; i++) sum += parts[i];
    out[row * 64 + threadIdx.x] = sum;
    if (!WRONG) __syncthreads();
  }
}

// in, out: [16, 64]
extern "C" int planted_missing_barrier(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(row_sums<true>, 1, 64, 0, nullptr, in, out, 16)
               : LAUNCH(row_sums<false>, 1, 64, 0, nullptr, in, out, 16);
}
