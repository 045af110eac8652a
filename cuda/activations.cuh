// The functions that follow a product.
#pragma once
#include "functions.cuh"

namespace rwkv {

enum Activation : int { NONE = 0, TANH = 1, SIGMOID = 2, RELU_SQUARED = 3 };

// NaN stays.
__device__ __forceinline__ float activated(int op, float x) {
  if (op == TANH) return tanhf(x);
  if (op == SIGMOID) return sigmoid(x);
  if (op == RELU_SQUARED) return x < 0.0f ? 0.0f : x * x;
  return x;
}

}  // namespace rwkv
