// Each block smooths a row in place; wrongly it also reads the row before, which another block writes.
#include "device.cuh"

template <bool WRONG> static __global__ void smooth(const float* in, float* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const float before = blockIdx.x == 0 ? 0.0f : WRONG ? out[i - 32] : in[i - 32];
  out[i] = before + in[i];
}

// in, out: at least [8, 32]
extern "C" int planted_blocks_in_order(const float* in, float* out, int wrong) {
  return wrong ? LAUNCH(smooth<true>, 8, 32, 0, nullptr, in, out) : LAUNCH(smooth<false>, 8, 32, 0, nullptr, in, out);
}
