// What RWKV-7's time mix does with one token of one head before and after the recurrence: a warp's work, in one order
// of operations whoever calls it, so that a step has the bits of a longer chunk.
#pragma once
#include "time_mix7.h"
#include "wkv7_sequential.cuh"

namespace rwkv {

// Any n up to 512 and any dtype.
int launch_v7_sequential(const Mix7Arguments& x, int dtype, void* stream);

namespace sequential {

enum { IN_R, IN_K, IN_V, IN_W, IN_A, IN_G, IN_V_LIN, IN_V_FIRST, INPUTS };
enum { W0, A0, K_K, K_A, R_K, LN_WEIGHT, LN_BIAS, V0, VECTORS };
enum { VALUES = KEY_OPERANDS, GATES, MIX_OPERANDS };  // of a token in shared memory, after those of wkv7_tokens

template <typename E> struct Mix7 {
  const E* inputs[INPUTS];        // [tokens, heads, n]; the last two null in the first layer
  const float* vectors[VECTORS];  // [heads, n]; the last one null in the first layer
  float* state;                   // [segments, heads, n(value), n(key)]
  const int32_t* rows;
  E *h, *v_out;  // v_out null except in the first layer
  int64_t tokens, heads, segments;
  int n;
  float eps;
  bool vectorised, state_vectors;  // whether inputs and state are read 16 bytes at a time

  explicit Mix7(const Mix7Arguments& x)
      : inputs{of(x.r), of(x.k), of(x.v), of(x.w_lin), of(x.a_lin), of(x.g), of(x.v_lin), of(x.v_first)},
        vectors{x.w0, x.a0, x.k_k, x.k_a, x.r_k, x.ln_weight, x.ln_bias, x.v0}, state(x.state), rows(x.rows),
        h(static_cast<E*>(x.h)), v_out(static_cast<E*>(x.v_out)), tokens(x.tokens), heads(x.heads),
        segments(x.segments), n((int)x.n), eps(x.eps), vectorised(x.n * sizeof(E) % 16 == 0),
        state_vectors(x.n % 4 == 0 && all_on(16, {x.state})) {
    for (const E* p : inputs) vectorised = vectorised && all_on(16, {p});
  }
  static const E* of(const void* p) { return static_cast<const E*>(p); }
};

// The error in the arguments of a time mix, or OK; `state_bytes`: of an element.
inline int wrong_mix7(const Mix7Arguments& x, int dtype, int state_bytes) {
  CHECK(dtype == FLOAT32 || dtype == BFLOAT16 || dtype == FLOAT16, BAD_DTYPE);
  CHECK(x.tokens >= 0 && x.heads >= 0 && x.n >= 1 && x.segments >= 0, BAD_SIZE);
  CHECK(x.n <= MAX_HEAD_SIZE && x.tokens <= INT32_MAX && x.heads <= INT32_MAX / 32, BAD_SIZE);
  if (x.tokens == 0 || x.heads == 0) return OK;
  for (const void* p : {x.r, x.k, x.v, x.w_lin, x.a_lin, x.g, (const void*)x.h}) CHECK(p, BAD_POINTER);
  for (const float* p : {x.w0, x.a0, x.k_k, x.k_a, x.r_k, x.ln_weight, x.ln_bias}) CHECK(p, BAD_POINTER);
  CHECK(x.state || x.segments == 0, BAD_POINTER);
  CHECK(x.v_first ? x.v_lin && x.v0 : x.v_out != nullptr, BAD_POINTER);
  CHECK(all_on(4, {x.w0, x.a0, x.v0, x.k_k, x.k_a, x.r_k, x.ln_weight, x.ln_bias, x.rows}), MISALIGNED);
  CHECK(all_on(state_bytes, {x.state}), MISALIGNED);
  CHECK(all_on(dtype == FLOAT32 ? 4 : 2, {x.r, x.k, x.v, x.w_lin, x.a_lin, x.v_lin, x.g, x.v_first, x.h, x.v_out}),
        MISALIGNED);
  return OK;
}

// The j-th of a lane's CAPACITY / 32 channels.
__device__ __forceinline__ int channel_of(int j) { return (threadIdx.x & 31) + 32 * j; }

// From the products to the operands of the recurrence, the values and the gates; returns the bonus, sum of r k' r_k.
//   input(i, j), vector(i, j): IN_* and vector i of channel_of(j) < n;  keep(j, v): the first layer's values
// token: MIX_OPERANDS * CAPACITY floats of shared memory, 0 from n on afterwards.
template <int CAPACITY, class Input, class Vector, class Keep>
__device__ __forceinline__ float prepare_token(float* token, int n, bool residual, Input input, Vector vector,
                                               Keep keep) {
  constexpr int COUNT = CAPACITY / 32;
  float k[COUNT], removal[COUNT], squares = 0.0f, bonus = 0.0f;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const bool held = channel_of(j) < n;
    k[j] = held ? input(IN_K, j) : 0.0f;
    removal[j] = held ? k[j] * vector(K_K, j) : 0.0f;
    squares = fmaf(removal[j], removal[j], squares);
  }
  const float scale = inverse_length(warp_sum(squares));
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    float operands[MIX_OPERANDS] = {};
    if (channel_of(j) < n) {
      const float rate = sigmoid(vector(A0, j) + input(IN_A, j)), direction = removal[j] * scale;
      operands[OPERAND_R] = input(IN_R, j);
      operands[OPERAND_W] = decay7(vector(W0, j), input(IN_W, j));
      operands[OPERAND_K] = k[j] * fmaf(rate - 1.0f, vector(K_A, j), 1.0f);
      operands[OPERAND_A] = -direction;
      operands[OPERAND_B] = direction * rate;
      operands[VALUES] = input(IN_V, j);
      operands[GATES] = input(IN_G, j);
      if (residual) {
        const float share = sigmoid(vector(V0, j) + input(IN_V_LIN, j));
        operands[VALUES] = fmaf(input(IN_V_FIRST, j) - operands[VALUES], share, operands[VALUES]);
      } else {
        keep(j, operands[VALUES]);
      }
      bonus = fmaf(operands[OPERAND_R] * operands[OPERAND_K], vector(R_K, j), bonus);
    }
#pragma unroll
    for (int i = 0; i < MIX_OPERANDS; i++) token[i * CAPACITY + channel_of(j)] = operands[i];
  }
  return warp_sum(bonus);
}

// (groupnorm(y) ln_weight + ln_bias + bonus v') g, given to put(j, h); y: n floats of shared memory.
template <int CAPACITY, class Vector, class Put>
__device__ __forceinline__ void finish_token(const float* y, const float* token, float bonus, int n, float eps,
                                             Vector vector, Put put) {
  constexpr int COUNT = CAPACITY / 32;
  float own[COUNT], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    own[j] = channel_of(j) < n ? y[channel_of(j)] : 0.0f;
    sum += own[j];
  }
  const float mean = warp_sum(sum) / (float)n;
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    own[j] -= mean;
    if (channel_of(j) < n) squares = fmaf(own[j], own[j], squares);
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / (float)n + eps);
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    const int c = channel_of(j);
    if (c >= n) continue;
    const float normal = fmaf(own[j] * scale, vector(LN_WEIGHT, j), vector(LN_BIAS, j));
    put(j, fmaf(bonus, token[VALUES * CAPACITY + c], normal) * token[GATES * CAPACITY + c]);
  }
}

}  // namespace sequential
}  // namespace rwkv
