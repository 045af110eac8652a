// WKV-7 token by token, as its kernels share it.
//
//   S <- S diag(w) + (S a) b^T + v k^T,   y = S r      S is [value, key]
//
// The rows of S do not depend on each other. A lane holds parts of some in registers, and a warp needs nobody else's
// results: it advances as many tokens as lie in shared memory without a barrier.
#pragma once
#include "wkv7_rows.cuh"

namespace rwkv {
namespace sequential {

// A token in shared memory: these operands of CAPACITY floats each, then the values v.
enum { OPERAND_R, OPERAND_W, OPERAND_K, OPERAND_A, OPERAND_B, KEY_OPERANDS };

// What the lanes of a warp have of y for SLOTS tokens, and the sums over them. Writing the parts down and adding them
// up for many tokens together costs half of the shuffles' issue slots, and none of their waiting time.
template <class L, int SLOTS> struct PartsOfY {
  static constexpr int PITCH = 32 * L::ROWS + 8;  // the tokens that are read together begin in different banks
  static constexpr int FLOATS = SLOTS * PITCH;
  static constexpr int WIDTH = SLOTS * L::WARP_ROWS < 32 ? 1 : SLOTS / (32 / L::WARP_ROWS);  // sums of one lane
  static constexpr int LANES_PER_SLOT = L::WARP_ROWS / WIDTH;
  float* own;  // this warp's FLOATS

  __device__ __forceinline__ float* of_lane() const { return own + L::part() * L::WARP_ROWS + L::group() * L::ROWS; }

  // sink(slot, row within the warp's, WIDTH values) for the slots from `begin` to before `end`
  template <class Sink> __device__ __forceinline__ void sums(int begin, int end, Sink sink) const {
    const int lane = threadIdx.x & 31, row = lane % LANES_PER_SLOT * WIDTH;
    __syncwarp();
    for (int slot = begin + lane / LANES_PER_SLOT; slot < end; slot += 32 / LANES_PER_SLOT) {
      float parts[L::LANES][WIDTH], y[WIDTH];
#pragma unroll
      for (int q = 0; q < L::LANES; q++) read_floats(parts[q], own + slot * PITCH + q * L::WARP_ROWS + row);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        float column[L::LANES];
#pragma unroll
        for (int q = 0; q < L::LANES; q++) column[q] = parts[q][i];
        y[i] = sum_of_parts<L::LANES>(column);
      }
      sink(slot, row, y);
    }
    __syncwarp();
  }
};

// A lane's rows of the state on their way through tokens in shared memory.
//
// Only S a has to be waited for: its shuffles are on their way while the last token's y and the rest of the new state
// are computed. The operands of the next token are read as soon as the last one's have been used, so none is held
// twice. Per token at CAPACITY 64:
//   issue slots of a warp: 80 of arithmetic, 11 reads and a write, 16 for the sums of S a, 7 others: 115
//   cycles of shared memory for a warp: 20 + 2 to read, 2 to write, 6 to shuffle: 30, times four warps
//   in sequence: 3 shuffles of 28, 16 multiply-adds to complete S, 20 + 8 for its product with a: 128 cycles
template <class L> struct Recurrence {
  static constexpr int C = L::CAPACITY;
  float s[L::ROWS][L::KEYS];
  float r[L::KEYS], w[L::KEYS], k[L::KEYS], a[L::KEYS], b[L::KEYS], v[L::ROWS];
  float removed[L::ROWS];  // this lane's parts of S a
  int values;              // where a token has the v of this lane's first row

  __device__ __forceinline__ void begin(const float* token) {
#pragma unroll
    for (int i = 0; i < L::KEYS; i++) r[i] = 0.0f;
    read_keys<L>(a, token + OPERAND_A * C);
    read_keys<L>(w, token + OPERAND_W * C);
    read_keys<L>(k, token + OPERAND_K * C);
    read_floats(v, token + KEY_OPERANDS * C + values);
    read_keys<L>(b, token + OPERAND_B * C);
    remove();
  }
  __device__ __forceinline__ void remove() {
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) removed[i] = part_of_product(s[i], a);
  }

  __device__ __forceinline__ void multiply(float (&y)[L::ROWS]) const {
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) y[i] = part_of_product(s[i], r);
  }
  __device__ __forceinline__ void put(float* parts) const {
    float y[L::ROWS];
    multiply(y);
    write_floats(parts, y);
  }

  // Writes the lane's parts of the y of the token before (of the first one's, nothing of value): late, as no read would
  // be moved before it; of a tile's LAST token before next(), which may want them.
  // next(): where the next token is; called when all of this one has been read.
  template <bool LAST, class Next>
  __device__ __forceinline__ void advance(const float* token, float* parts, Next next) {
    float y[L::ROWS];
    multiply(y);
    if (LAST) write_floats(parts, y);
    read_keys<L>(r, token + OPERAND_R * C);
    const float* following = next();
    read_keys<L>(a, following + OPERAND_A * C);
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) decay_and_add(s[i], w, v[i], k);
    read_keys<L>(w, following + OPERAND_W * C);
    read_keys<L>(k, following + OPERAND_K * C);
    read_floats(v, following + KEY_OPERANDS * C + values);
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) removed[i] = sum_over_row<L>(removed[i]);
#pragma unroll
    for (int i = 0; i < L::ROWS; i++) add_removal(s[i], removed[i], b);
    read_keys<L>(b, following + OPERAND_B * C);
    remove();
    if (!LAST) write_floats(parts, y);
  }

  // `count` > 0 tokens, `pitch` floats apart; the parts of the token before the first go to the first place. finish():
  // as next() above, after the last one.
  template <class Finish>
  __device__ __forceinline__ void advance(const float* token, int pitch, int count, float* parts, int parts_pitch,
                                          Finish finish) {
#pragma unroll 1
    for (int t = 1; t < count; t++, token += pitch, parts += parts_pitch)
      advance<false>(token, parts, [&] { return token + pitch; });
    advance<true>(token, parts, finish);
  }
};

// 16 bytes of a row of n elements on their way to shared memory: those from `at` on, 0 beyond n or where the row is
// null. Without `vectors` they are there at once.
template <typename E>
__device__ __forceinline__ void fetch16(E* shared, const E* row, int at, int n, bool vectors) {
  constexpr int COUNT = 16 / sizeof(E);
  if (vectors) {
    const bool held = row && at < n;
    cp_async16(shared, held ? row + at : nullptr, held);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) shared[i] = row && at + i < n ? row[at + i] : from_float<E>(0.0f);
  }
}

// x at p[0..COUNT), as far as `held` of them; vectors: p lies on a multiple of COUNT elements.
template <typename E, int COUNT>
__device__ __forceinline__ void store_values(E* p, const float (&x)[COUNT], int held, bool vectors) {
  struct alignas(COUNT * sizeof(E) < 16 ? COUNT * sizeof(E) : 16) Vector {
    E element[COUNT];
  };
  if (vectors && held >= COUNT) {
    Vector out;
#pragma unroll
    for (int i = 0; i < COUNT; i++) out.element[i] = from_float<E>(x[i]);
    *reinterpret_cast<Vector*>(p) = out;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (i < held) p[i] = from_float<E>(x[i]);
  }
}

// What all threads of a warp have in common, so that the compiler knows: else it guards every shuffle of a loop that
// runs this often against lanes that have left, and moves nothing across the guards.
__device__ __forceinline__ int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }

}  // namespace sequential
}  // namespace rwkv
