// Decays of RWKV-4 to 6.
#pragma once
#include "functions.cuh"

namespace rwkv {
namespace {

// e^-x for x >= 0. The instruction for 2^x is off by up to 2^-22.5, close to 1 as anywhere, which in a slow decay would
// add up over thousands of tokens; so a result close to 1 is rounded correctly.
__device__ __forceinline__ float falling_power(float x) {
  float near = fmaf(x, -1.0f / 120, 1.0f / 24);
  near = fmaf(near, x, -1.0f / 6);
  near = fmaf(near, x, 0.5f);
  near = fmaf(near, x, -1.0f);
  near = fmaf(near, x, 1.0f);
  return x < 0.125f ? near : power_of_2(x * -1.4426950408889634f);
}

// RWKV-6's decay e^(-e^x).
__device__ __forceinline__ float decay6(float x) { return falling_power(power_of_2(x * 1.4426950408889634f)); }

}  // namespace
}  // namespace rwkv
