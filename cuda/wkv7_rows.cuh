// How the sequential bodies of WKV-7 hold rows of a head's state in a warp's registers, for heads of any size up to
// 512, and what they do with them.
//
// Every operation on an element and every sum has one order, which does not depend on where tokens are cut.
#pragma once
#include <initializer_list>

#include "functions.cuh"

namespace rwkv {
namespace sequential {

// How a warp holds rows of CAPACITY keys: a lane has ROWS rows by KEYS keys, and LANES lanes share a row. Head sizes
// between the capacities are padded with keys that are 0. At CAPACITY 64 one row by 16 keys per lane would be as many
// multiply-adds, but 20 reads of 16 bytes per token instead of 10: more than shared memory delivers meanwhile.
template <int CAPACITY_> struct RowLayout {
  static constexpr int CAPACITY = CAPACITY_;
  static constexpr int LANES = CAPACITY == 64 ? 8 : 32, KEYS = CAPACITY / LANES, ROWS = 2;
  static constexpr int GROUPS = 32 / LANES, WARP_ROWS = GROUPS * ROWS;

  // Neighbouring lanes read the same keys of an operand: then 16 bytes each take shared memory two cycles, not four.
  static __device__ __forceinline__ int part() { return (threadIdx.x & 31) / GROUPS; }
  static __device__ __forceinline__ int group() { return (threadIdx.x & 31) % GROUPS; }

  // Element i of a lane's KEYS belongs to key(i): every fourth element begins 4 * LANES keys further.
  static __device__ __forceinline__ int key(int i) { return i / 4 * (4 * LANES) + 4 * part() + i % 4; }
};

// The smallest capacity that holds n keys, as the type of an argument of f: 64 for every released model.
template <int CAPACITY> struct Capacity {
  static constexpr int value = CAPACITY;
};
template <class F> inline int dispatch_capacity(int64_t n, F f) {
  if (n <= 64) return f(Capacity<64>());
  return f(Capacity<512>());
}

constexpr int64_t MAX_HEAD_SIZE = 512;
constexpr size_t MOST_SHARED = 99 << 10;  // bytes of a block where a multiprocessor has least, as on RTX GPUs

template <int COUNT> __device__ __forceinline__ void read_floats(float (&x)[COUNT], const float* p) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 q = *reinterpret_cast<const float4*>(p + i);
      x[i] = q.x, x[i + 1] = q.y, x[i + 2] = q.z, x[i + 3] = q.w;
    }
  } else if constexpr (COUNT == 2) {
    const float2 q = *reinterpret_cast<const float2*>(p);
    x[0] = q.x, x[1] = q.y;
  } else {
    static_assert(COUNT == 1, "no vector of this many");
    x[0] = *p;
  }
}

template <int COUNT> __device__ __forceinline__ void write_floats(float* p, const float (&x)[COUNT]) {
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  } else {
    static_assert(COUNT == 2, "no vector of this many");
    *reinterpret_cast<float2*>(p) = make_float2(x[0], x[1]);
  }
}

// This lane's keys of an operand in shared memory.
template <class L> __device__ __forceinline__ void read_keys(float (&x)[L::KEYS], const float* operand) {
#pragma unroll
  for (int i = 0; i < L::KEYS; i += 4) {
    const float4 q = *reinterpret_cast<const float4*>(operand + L::key(i));
    x[i] = q.x, x[i + 1] = q.y, x[i + 2] = q.z, x[i + 3] = q.w;
  }
}

// This lane's part of a product of a row with an operand, in several chains to be short.
template <int KEYS> __device__ __forceinline__ float part_of_product(const float (&s)[KEYS], const float (&x)[KEYS]) {
  float chain[KEYS / 4];
#pragma unroll
  for (int c = 0; c < KEYS / 4; c++) {
    chain[c] = s[4 * c] * x[4 * c];
#pragma unroll
    for (int i = 4 * c + 1; i < 4 * c + 4; i++) chain[c] = fmaf(s[i], x[i], chain[c]);
  }
#pragma unroll
  for (int half = KEYS / 8; half > 0; half /= 2)
#pragma unroll
    for (int c = 0; c < half; c++) chain[c] += chain[c + half];
  return chain[0];
}

// The sum over the LANES lanes of a row, in all of them. sum_of_parts takes the parts in the same order.
template <class L> __device__ __forceinline__ float sum_over_row(float x) {
#pragma unroll
  for (int step = L::LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step * L::GROUPS);
  return x;
}
template <int COUNT, int LANES> __device__ __forceinline__ float sum_of_parts(float (&x)[LANES]) {
  if constexpr (COUNT == 1) {
    return x[0];
  } else {
#pragma unroll
    for (int q = 0; q < COUNT / 2; q++) x[q] += x[q + COUNT / 2];
    return sum_of_parts<COUNT / 2>(x);
  }
}

// What a token does to a row: first without S a, then with it.
template <int KEYS>
__device__ __forceinline__ void decay_and_add(float (&s)[KEYS], const float (&w)[KEYS], float v,
                                              const float (&k)[KEYS]) {
#pragma unroll
  for (int i = 0; i < KEYS; i++) s[i] = fmaf(s[i], w[i], v * k[i]);
}
template <int KEYS>
__device__ __forceinline__ void add_removal(float (&s)[KEYS], float removed, const float (&b)[KEYS]) {
#pragma unroll
  for (int i = 0; i < KEYS; i++) s[i] = fmaf(removed, b[i], s[i]);
}

// ROWS rows of a head's state from `row` on; `vectors`: n is a multiple of 4 and the state begins on a multiple of 16
// bytes. Rows and keys beyond n are 0.
template <class L, int ROWS>
__device__ __forceinline__ void read_state(float (&s)[ROWS][L::KEYS], const float* state, int n, int row,
                                           bool vectors) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float* own = state + (int64_t)(row + r) * n;
    const bool held = row + r < n;
#pragma unroll
    for (int i = 0; i < L::KEYS; i += 4) {
      const int key = L::key(i);
      float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (vectors) {
        if (held && key < n) q = *reinterpret_cast<const float4*>(own + key);
      } else if (held) {
        if (key < n) q.x = own[key];
        if (key + 1 < n) q.y = own[key + 1];
        if (key + 2 < n) q.z = own[key + 2];
        if (key + 3 < n) q.w = own[key + 3];
      }
      s[r][i] = q.x, s[r][i + 1] = q.y, s[r][i + 2] = q.z, s[r][i + 3] = q.w;
    }
  }
}
template <class L, int ROWS>
__device__ __forceinline__ void write_state(const float (&s)[ROWS][L::KEYS], float* state, int n, int row,
                                            bool vectors) {
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (row + r >= n) continue;
    float* own = state + (int64_t)(row + r) * n;
#pragma unroll
    for (int i = 0; i < L::KEYS; i += 4) {
      const int key = L::key(i);
      if (vectors) {
        const float4 q = make_float4(s[r][i], s[r][i + 1], s[r][i + 2], s[r][i + 3]);
        if (key < n) *reinterpret_cast<float4*>(own + key) = q;
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (key + j < n) own[key + j] = s[r][i + j];
      }
    }
  }
}

}  // namespace sequential
}  // namespace rwkv
