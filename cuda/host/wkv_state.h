// The state of one head while the kernels of RWKV-5, 6 and 7 work on it: a block of value rows, transposed to
// [key][value lanes] so that it lies in the first-level cache, no sum ever crosses lanes, and inputs are broadcast.
// In memory (and in files) a state is [value][key].
#pragma once
#include "vec.h"

namespace rwkv {

constexpr int MAX_HEAD_SIZE = 512;

template <int VECS, int N> struct StateBlock {  // N = 0: head size known at run time
  static constexpr int WIDTH = VECS * LANES;
  static constexpr int KEYS = N ? N : MAX_HEAD_SIZE;
  alignas(64) float s[KEYS * WIDTH];

  // state: this head's first value row of the block; values: how many rows of it exist (the other lanes are zero)
  void read(const float* state, int64_t n, int64_t values) {
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < WIDTH; i++) s[j * WIDTH + i] = i < values ? state[i * n + j] : 0.0f;
  }
  void write(float* state, int64_t n, int64_t values) const {
    for (int64_t i = 0; i < values; i++)
      for (int64_t j = 0; j < n; j++) state[i * n + j] = s[j * WIDTH + i];
  }
  RWKV_INLINE vf at(int64_t j, int c) const { return load(s + j * WIDTH + c * LANES); }
  RWKV_INLINE void set(int64_t j, int c, vf x) { store(s + j * WIDTH + c * LANES, x); }
};

template <int VECS> RWKV_INLINE void load_values(vf (&out)[VECS], const float* p, int64_t values) {
  for (int c = 0; c < VECS; c++) out[c] = values > c * LANES ? load(p + c * LANES, values - c * LANES) : vf{};
}
template <int VECS> RWKV_INLINE void store_values(float* p, const vf (&x)[VECS], int64_t values) {
  for (int c = 0; c < VECS; c++)
    if (values > c * LANES) store(p + c * LANES, x[c], values - c * LANES);
}

// Asks for n floats that are needed two tokens later: the rows of a head lie a whole token apart, too far for the
// processor's own look-ahead (measured: 30% of the time). An address past the end does no harm.
RWKV_INLINE void prefetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}
constexpr int PREFETCH_TOKENS = 2;

// Registers per value block: as many as the register file holds beside the accumulators, fewer when that leaves
// threads idle. A value row's bits are the same whatever block it is part of.
inline int block_registers(int64_t heads_times_segments, int64_t n, int threads, int most) {
  int vecs = most;
  while (vecs > 1 && ((vecs / 2) * LANES >= n ||
                      heads_times_segments * ((n + vecs * LANES - 1) / (vecs * LANES)) < 2 * (int64_t)threads))
    vecs /= 2;
  return vecs;
}

}  // namespace rwkv
