// WKV-7 for training: what the bodies in wkv7_backward_*.cuh share.
//
//   S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t      S is [value, key]
//
// The forward pass stores the state before every `every`-th token, from which the backward pass recomputes the others.
// One block works on one head of one sequence, and no sum crosses sequences, so a sequence's bits do not depend on
// the others.
#pragma once

#include "device.cuh"

namespace rwkv {
namespace wkv7_training {

constexpr int INPUTS = 6;     // r w k v a b
constexpr int GRADIENTS = 6;  // in the same order
constexpr int THREADS = 256, WARPS = THREADS / 32;

__host__ __device__ __forceinline__ int lesser(int a, int b) { return a < b ? a : b; }

struct Sizes {
  int64_t batch, tokens, heads, size, every;
  int64_t marks() const { return (tokens + every - 1) / every; }
};

// What a launch works on; in the forward pass `dy` is y (written), `end` the last state.
template <typename E> struct Tensors {
  const E *r, *w, *k, *v, *a, *b, *dy;
  E *y, *dr, *dw, *dk, *dv, *da, *db;
  const float *state, *dlast;
  float *stored, *last, *dstate;
  int tokens, heads, size, every, marks;

  // Where the token's values of this head begin; `item` counts the heads of all sequences.
  __device__ __forceinline__ int64_t at(int item, int token) const {
    const unsigned sequence = (unsigned)item / (unsigned)heads, head = (unsigned)item % (unsigned)heads;
    return (((int64_t)sequence * tokens + token) * heads + head) * size;
  }
  // Where a head's state begins, and its stored state number `mark`.
  __device__ __forceinline__ int64_t state_at(int item) const { return (int64_t)item * size * size; }
  __device__ __forceinline__ int64_t mark_at(int item, int mark) const {
    return ((int64_t)item * marks + mark) * size * size;
  }
};

}  // namespace wkv7_training
}  // namespace rwkv
