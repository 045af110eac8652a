// A shuffle in a branch that names lanes which are elsewhere.
#include "device.cuh"

template <bool WRONG> static __global__ void lower_half(const float* in, float* out) {
  const int lane = threadIdx.x;
  float x = in[lane];
  if (lane < 16) x += __shfl_xor_sync(WRONG ? 0xffffffffu : 0x0000ffffu, x, 8);
  __syncwarp();
  out[lane] = x;
}

// in, out: at least [32]
extern "C" int planted_lane_missing_in_shuffle(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(lower_half<true>, 1, 32, 0, nullptr, in, out)
               : LAUNCH(lower_half<false>, 1, 32, 0, nullptr, in, out);
}
