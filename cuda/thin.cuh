// A product of few rows with a large matrix: what its two bodies share.
#pragma once
#include "activations.cuh"
#include "rows.cuh"

namespace rwkv {
namespace {

constexpr int MOST_THIN_ROWS = 16;

// What becomes of the sums, as `accumulate` numbers them.
enum Accumulate : int { STORE = 0, ADD = 1, GATED_ADD = 2, STORE_FLOAT = 3, MIX = 4 };

template <class E> struct Thin {
  const E *x, *w;            // [rows, inputs], x_stride apart; [outputs, inputs]
  void* out;                 // [rows, outputs]
  const E* gate;             // [rows, outputs]
  const float *u, *d, *mix;  // [rows, outputs] twice, [outputs]
  int64_t rows, outputs, inputs, x_stride;
  int op, accumulate;
  float scale;
  int run = 0, rest = 0;  // outputs of a block, and of how many blocks there is one more

  __device__ __forceinline__ void finish(int64_t row, int64_t n, float sum) const {
    const int64_t at = row * outputs + n;
    const float s = activated(op, sum * scale);
    if (accumulate == STORE) {
      ((E*)out)[at] = from_float<E>(s);
    } else if (accumulate == MIX) {
      ((E*)out)[at] = from_float<E>(fmaf(d[at], mix[n] + s, u[at]));
    } else {
      float* to = (float*)out + at;
      if (accumulate == STORE_FLOAT) *to = s;
      if (accumulate == ADD) *to += s;
      if (accumulate == GATED_ADD) *to = fmaf(sigmoid(to_float(gate[at])), s, *to);
    }
  }
};

}  // namespace
}  // namespace rwkv
