// Each warp transposes a tile of its own. Its lanes do not run in step, so they must meet before they read.
#include "device.cuh"

template <bool WRONG> static __global__ void transpose(const float* in, float* out) {
  __shared__ float tiles[2][16][17];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = lane; i < 256; i += 32) tiles[warp][i / 16][i % 16] = in[warp * 256 + i];
  if (!WRONG) __syncwarp();
  for (int i = lane; i < 256; i += 32) out[warp * 256 + i] = tiles[warp][i % 16][i / 16];
}

// in, out: at least [2, 16, 16]
extern "C" int planted_missing_syncwarp(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(transpose<true>, 1, 64, 0, nullptr, in, out)
               : LAUNCH(transpose<false>, 1, 64, 0, nullptr, in, out);
}
