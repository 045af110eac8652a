// The arguments of WKV-6 and WKV-5 over the segments of a chunk, alone or as the time mix between its matrix products.
#pragma once
#include "wkv6_decay.cuh"
#include "wkv6_segments.cuh"

namespace rwkv {
namespace {

template <typename E> struct Wkv6 {
  const E *r, *k, *v;  // [tokens, heads, n]
  const E* w;          // the same: the decays, or as part of the time mix what is added to `decay`; null: no such
  const float* decay;  // [heads, n]: of the time mix its time_decay; where w is null the decay itself
  const float* u;      // [heads, n]
  const float* state_in;
  float* state_out;  // [segments, heads, n(value), n(key)], may be state_in
  const int32_t* rows;
  E* out;  // [tokens, heads, n]
  int64_t tokens, heads, n, segments;
  // of the time mix:
  const E* gate;                     // may be null
  const float *ln_weight, *ln_bias;  // [heads * n]
  float eps;
  // of training: the states before every 16th token, [segments, heads, ceil(tokens of a segment / 16), n, n], or null
  float* stored;
};

constexpr int64_t MOST_KEYS = 512;

// Checks what the launchers have in common.
template <typename E> int check(const Wkv6<E>& x, bool mix) {
  CHECK(x.tokens >= 0 && x.heads >= 0 && x.segments >= 0 && x.n >= 1 && x.n <= MOST_KEYS, BAD_SIZE);
  constexpr int64_t LIMIT = int64_t(1) << 31;
  CHECK(x.tokens < LIMIT && x.heads < LIMIT / MOST_KEYS && x.segments < LIMIT, BAD_SIZE);
  if (x.heads == 0) return OK;
  CHECK(x.segments + gap_parts(x.rows, x.segments, x.tokens, x.heads) <= 65535, BAD_SIZE);
  CHECK(x.u && (x.decay || (!mix && (x.w || x.tokens == 0))) && (!mix || (x.ln_weight && x.ln_bias)), BAD_POINTER);
  CHECK(x.tokens == 0 || (x.r && x.k && x.v && x.out), BAD_POINTER);
  CHECK(x.segments == 0 || (x.state_in && x.state_out), BAD_POINTER);
  CHECK(hold_elements(x.r, x.k, x.v, x.w, x.gate, x.out, x.rows, x.decay, x.u, x.ln_weight, x.ln_bias, x.state_in,
                      x.state_out, x.stored),
        MISALIGNED);
  if (x.n != 64) return OK;
  for (const void* p : {(const void*)x.r, (const void*)x.k, (const void*)x.v, (const void*)x.w, (const void*)x.out,
                        (const void*)x.gate, (const void*)x.decay, (const void*)x.u, (const void*)x.ln_weight,
                        (const void*)x.ln_bias, (const void*)x.state_in, (const void*)x.state_out,
                        (const void*)x.stored})
    CHECK((uintptr_t)p % 16 == 0, MISALIGNED);
  return OK;
}

// [heads, segments and gaps]
template <typename E> dim3 grid_of(const Wkv6<E>& x) {
  return dim3((unsigned)x.heads, (unsigned)(x.segments + gap_parts(x.rows, x.segments, x.tokens, x.heads)));
}

}  // namespace
}  // namespace rwkv
