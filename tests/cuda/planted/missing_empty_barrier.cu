// Warp 0 fills a buffer, warp 1 empties it: barrier 1 says that it is full, barrier 2 that it is empty again.
#include "device.cuh"

template <bool WRONG> static __global__ void pipeline(const float* in, float* out, int tiles) {
  __shared__ float buffer[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int tile = 0; tile < tiles; tile++) {
      if (!WRONG && tile > 0) bar_sync(2, 64);
      buffer[lane] = in[tile * 32 + lane];
      if (WRONG)
        bar_sync(1, 64);
      else
        bar_arrive(1, 64);
    }
  } else {
    for (int tile = 0; tile < tiles; tile++) {
      bar_sync(1, 64);
      out[tile * 32 + lane] = buffer[31 - lane];
      if (!WRONG && tile + 1 < tiles) bar_arrive(2, 64);
    }
  }
}

// in, out: [32, 32]
extern "C" int planted_missing_empty_barrier(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(pipeline<true>, 1, 64, 0, nullptr, in, out, 32)
               : LAUNCH(pipeline<false>, 1, 64, 0, nullptr, in, out, 32);
}
