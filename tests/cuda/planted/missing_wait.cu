// Two buffers filled by cp.async in turn. The last tile has no successor in flight, so it needs a wait for everything.
#include "device.cuh"

template <bool WRONG> static __global__ void stream(const float* in, float* out, int tiles) {
  DYNAMIC_SHARED(float, buffers);
  const int thread = threadIdx.x;
  if (thread < 16) cp_async16(buffers + 4 * thread, in + 4 * thread);
  cp_async_commit();
  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) {
      if (thread < 16) cp_async16(buffers + (tile + 1) % 2 * 64 + 4 * thread, in + (tile + 1) * 64 + 4 * thread);
      cp_async_commit();
    }
    if (WRONG || tile + 1 < tiles)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    __syncthreads();
    out[tile * 64 + thread] = 2.0f * buffers[tile % 2 * 64 + 63 - thread];
    __syncthreads();
  }
  cp_async_wait<0>();
}

// in, out: [16, 64]
extern "C" int planted_missing_wait(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(stream<true>, 1, 64, 512, nullptr, in, out, 16)
               : LAUNCH(stream<false>, 1, 64, 512, nullptr, in, out, 16);
}
