// CUDA on the host: everything that device.cuh offers when the compiler is not nvcc. It is for tests of correctness:
// g++ -std=c++20 -x c++ kernel.cu.
#pragma once
#include "async_copy.h"
#include "barriers.h"
#include "intrinsics.h"
#include "launch.h"
#include "matrix.h"
#include "types.h"
#include "warp.h"
