// The state of one head while the kernels of RWKV-5, 6 and 7 work on it: blocks of value rows, transposed to
// [key][value lanes] so that they lie in the first-level cache, no sum ever crosses lanes, and inputs are broadcast.
// In memory (and in files) a state is [value][key].
#pragma once
#include "parallel.h"
#include "transpose.h"

namespace rwkv {

// Registers per value block: as many as the register file holds beside the accumulators.
#if defined(__AVX512F__)
constexpr int MOST_REGISTERS = 4;
#else
constexpr int MOST_REGISTERS = 2;
#endif

template <int VECS> struct StateBlock {
  static constexpr int WIDTH = VECS * LANES;
  float* s;  // [keys][WIDTH], aligned to a cache line

  // state: this head's first value row of the block; values: how many rows of it exist (the other lanes are zero)
  RWKV_INLINE void read(const float* state, int64_t n, int64_t values) const {
    for (int64_t i = 0; i < WIDTH; i += LANES) {
      const int64_t rows = values - i, in_tiles = rows >= LANES ? n / LANES * LANES : 0;
      for (int64_t j = 0; j < in_tiles; j += LANES) transpose_tile(state + i * n + j, n, s + j * WIDTH + i, WIDTH);
      for (int64_t j = in_tiles; j < n; j++)
        for (int64_t lane = 0; lane < LANES; lane++)
          s[j * WIDTH + i + lane] = lane < rows ? state[(i + lane) * n + j] : 0.0f;
    }
  }
  RWKV_INLINE void write(float* state, int64_t n, int64_t values) const {
    for (int64_t i = 0; i < values; i += LANES) {
      const int64_t rows = values - i < LANES ? values - i : LANES, in_tiles = rows == LANES ? n / LANES * LANES : 0;
      for (int64_t j = 0; j < in_tiles; j += LANES) transpose_tile(s + j * WIDTH + i, WIDTH, state + i * n + j, n);
      for (int64_t lane = 0; lane < rows; lane++)
        for (int64_t j = in_tiles; j < n; j++) state[(i + lane) * n + j] = s[j * WIDTH + i + lane];
    }
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

// How many tokens ahead: the rows of a head lie a whole token apart, too far for the processor's own look-ahead
// (measured: 30% of the time).
constexpr int PREFETCH_TOKENS = 2;

// Registers per value block for operators that may split a head over threads: fewer when that leaves threads idle.
inline int block_registers(int64_t heads_times_segments, int64_t n, int threads) {
  int vecs = MOST_REGISTERS;
  while (vecs > 1 && ((vecs / 2) * LANES >= n ||
                      heads_times_segments * ((n + vecs * LANES - 1) / (vecs * LANES)) < 2 * (int64_t)threads))
    vecs /= 2;
  return vecs;
}

}  // namespace rwkv
