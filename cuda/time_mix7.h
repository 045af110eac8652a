// The arguments of RWKV-7's time mix, as its bodies take them (time_mix7.cu says what they mean), and the tile bodies'
// entries.
#pragma once
#include <cstdint>

namespace rwkv {

struct Mix7Arguments {
  const void *r, *k, *v, *w_lin, *a_lin, *v_lin, *g, *v_first;        // [tokens, heads * n] of the compute dtype
  const float *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_weight, *ln_bias;  // [heads * n]
  float* state;                                                       // [segments, heads, n(value), n(key)]
  const int32_t* rows;                                                // [segments, 2]
  void *h, *v_out;                                                    // as r
  void* scratch;
  int64_t tokens, heads, n, segments, scratch_bytes;
  float eps;
};

struct Wkv7Arguments {
  const void *r, *w, *k, *v, *a, *b;  // [tokens, heads, n] of the compute dtype
  const float* state_in;              // [segments, heads, n(value), n(key)]
  float* state_out;                   // may be state_in
  const int32_t* rows;                // [segments, 2]; null: one segment of all tokens
  void* y;
  int64_t tokens, heads, n, segments;
};

// For n = 64 and a 16-bit dtype; every array of the compute dtype starts at a multiple of 16 bytes.
int launch_v7_tiles_fused(const Mix7Arguments& x, int dtype, void* stream);
int launch_v7_tiles_split(const Mix7Arguments& x, int dtype, void* stream);  // the same bits; needs scratch
int64_t v7_tiles_scratch(int64_t tokens, int64_t heads, int64_t segments);

// Decays as RWKV-7 makes them, between 0.5 and 1 (bfloat16: down to 2^-14); smaller ones are not exact.
int launch_wkv7_tiles(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
                      const float* state_in, float* state_out, const int32_t* rows, void* y, int64_t tokens,
                      int64_t heads, int64_t segments, int dtype, void* stream);

}  // namespace rwkv
