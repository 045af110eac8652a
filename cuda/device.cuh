// The only header of CUDA that kernels include: under nvcc CUDA itself with thin wrappers of its instructions
// (instructions.cuh), otherwise an emulation on the host, on which the same sources are tested without a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#include "instructions.cuh"
#else
#include "emulation/cuda.h"
#endif

// What launchers return; a code > 0 is a cudaError_t.
enum Error : int {
  OK = 0,
  BAD_POINTER = -1,
  BAD_SIZE = -2,
  BAD_DTYPE = -3,
  MISALIGNED = -4,
  BAD_STRIDE = -5,
  UNSUPPORTED = -6
};

#define CHECK(condition, code)              \
  do {                                      \
    if (!(condition)) return (code);        \
  } while (0)

// Whether all these addresses are multiples of `bytes`, a power of 2; null is.
inline bool all_on(size_t bytes, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) & (bytes - 1)) return false;
  return true;
}

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <typename E> struct DtypeTag {
  using type = E;
};

// Calls `run` with the tag of a dtype, whose `type` is the element's; for an unknown one the result is BAD_DTYPE.
template <typename F> int dispatch_dtype(int dtype, const F& run) {
  if (dtype == FLOAT32) return run(DtypeTag<float>{});
  if (dtype == BFLOAT16) return run(DtypeTag<bf16>{});
  if (dtype == FLOAT16) return run(DtypeTag<half_t>{});
  return BAD_DTYPE;
}

// Eight elements as float, by accesses of 16 bytes; p is 16-byte aligned.
template <typename E> __device__ __forceinline__ void load8(const E* p, float (&x)[8]) {
  static_assert(sizeof(E) == 2 || sizeof(E) == 4);
  constexpr int PARTS = sizeof(E) / 2, EACH = 8 / PARTS;
  check_vector_aligned(p);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    union {
      uint4 vector;
      E elements[EACH];
    } loaded;
    loaded.vector = reinterpret_cast<const uint4*>(p)[part];
#pragma unroll
    for (int i = 0; i < EACH; i++) x[part * EACH + i] = to_float(loaded.elements[i]);
  }
}

template <typename E> __device__ __forceinline__ void store8(E* p, const float (&x)[8]) {
  static_assert(sizeof(E) == 2 || sizeof(E) == 4);
  constexpr int PARTS = sizeof(E) / 2;
  check_vector_aligned(p);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    uint4 stored;
    if constexpr (sizeof(E) == 4)
      stored = make_uint4(__float_as_uint(x[4 * part]), __float_as_uint(x[4 * part + 1]),
                          __float_as_uint(x[4 * part + 2]), __float_as_uint(x[4 * part + 3]));
    else
      stored = make_uint4(pack2<E>(x[0], x[1]), pack2<E>(x[2], x[3]), pack2<E>(x[4], x[5]), pack2<E>(x[6], x[7]));
    reinterpret_cast<uint4*>(p)[part] = stored;
  }
}
