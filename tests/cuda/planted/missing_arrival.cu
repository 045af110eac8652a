// A barrier that half of the block does not come to when the last tile is only half full.
#include "device.cuh"

template <bool WRONG> static __global__ void halves(const float* in, float* out, int count) {
  __shared__ float tile[64];
  for (int first = 0; first < count; first += 64) {
    const int i = first + threadIdx.x;
    if (i < count) tile[threadIdx.x] = in[i];
    if (!WRONG || i < count) bar_sync(3, 64);
    if (i < count) out[i] = tile[threadIdx.x ^ 1];
    __syncthreads();
  }
}

// in, out: at least [992]
extern "C" int planted_missing_arrival(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(halves<true>, 1, 64, 0, nullptr, in, out, 992)
               : LAUNCH(halves<false>, 1, 64, 0, nullptr, in, out, 992);
}
