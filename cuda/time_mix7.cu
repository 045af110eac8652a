// RWKV-7's time mix between its matrix products: the launcher, which chooses among the bodies.
#include <initializer_list>

#include "time_mix7.h"
#include "time_mix7_sequential.cuh"

namespace rwkv {
namespace {

enum Body : int { AUTO = 0, SEQUENTIAL = 1, TILES_FUSED = 2, TILES_SPLIT = 3 };

constexpr int64_t MOST_SIZE = 512;
// Fewer heads of segments than this leave multiprocessors without work when tiles are prepared where they are used.
constexpr int64_t FEW_HEADS = 96, MANY_TOKENS = 128;

bool have_tiles(int64_t n, int dtype) { return n == 64 && dtype != FLOAT32; }

// The choice between the tile bodies does not change the bits, so it may depend on what is there at the moment.
int choose(const Mix7Arguments& x, int dtype) {
  if (!have_tiles(x.n, dtype)) return SEQUENTIAL;
  const bool scratch = x.scratch && x.scratch_bytes >= v7_tiles_scratch(x.tokens, x.heads, x.segments);
  const bool idle = x.segments * x.heads <= FEW_HEADS && x.tokens >= MANY_TOKENS;
  return scratch && idle ? TILES_SPLIT : TILES_FUSED;
}

int check(const Mix7Arguments& x, int dtype) {
  CHECK(dtype == FLOAT32 || dtype == BFLOAT16 || dtype == FLOAT16, BAD_DTYPE);
  CHECK(x.tokens >= 0 && x.heads >= 0 && x.n >= 0 && x.n <= MOST_SIZE && x.segments >= 0, BAD_SIZE);
  CHECK(x.tokens <= INT32_MAX && x.heads <= INT32_MAX / MOST_SIZE && x.segments <= INT32_MAX, BAD_SIZE);
  CHECK((x.segments + 1) * (x.heads + 1) <= INT32_MAX, BAD_SIZE);
  CHECK((x.tokens / 16 + x.segments + 1) * (x.heads + 1) <= INT32_MAX, BAD_SIZE);
  if (x.tokens == 0 || x.heads == 0 || x.n == 0) return OK;
  for (const void* p : {x.r, x.k, x.v, x.w_lin, x.a_lin, x.g, static_cast<const void*>(x.h)}) CHECK(p, BAD_POINTER);
  for (const float* p : {x.w0, x.a0, x.k_k, x.k_a, x.r_k, x.ln_weight, x.ln_bias}) CHECK(p, BAD_POINTER);
  CHECK(x.segments == 0 || (x.state && x.rows), BAD_POINTER);
  if (x.v_first)
    CHECK(x.v_lin && x.v0, BAD_POINTER);
  else
    CHECK(x.v_out, BAD_POINTER);
  return OK;
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// Bytes of scratch memory for body 3; below 0 for sizes that no call takes.
extern "C" int64_t rwkvmpi_cuda_v7_time_mix_scratch(int64_t tokens, int64_t heads, int64_t n, int64_t segments,
                                                    int dtype) {
  for (const int64_t size : {tokens, heads, segments}) CHECK(size >= 0 && size <= INT32_MAX, BAD_SIZE);
  CHECK((tokens / 16 + segments + 1) * (heads + 1) <= INT32_MAX, BAD_SIZE);
  return have_tiles(n, dtype) && segments > 0 ? v7_tiles_scratch(tokens, heads, segments) : 0;
}

// From the products r, k, v, w_lin, a_lin, v_lin, g, [tokens, heads * n] of `dtype`, to the output product's input h.
// v_first, v_lin and v0 are null in the first layer, which writes v_out = v.
//   w = exp(-e^(-1/2) sigmoid(w0 + w_lin)),  a = sigmoid(a0 + a_lin),  kk = k*k_k of length 1 per head,
//   k' = k (1 + (a-1) k_a),  v' = v + (v_first - v) sigmoid(v0 + v_lin),  y = WKV-7(r, w, k', v', -kk, kk*a),
//   h = (groupnorm(y) + (sum over head of r k' r_k) v') * g
// state: float32 [segments, heads, n(value), n(key)], in place; rows: int32 [segments, 2]. Segments are disjoint and
// ascend. Rows outside all of them come out as 0.
// body: 0 by the shape, 1 sequential, 2 tiles on tensor cores in one kernel, 3 in two kernels and with scratch memory;
// 2 and 3 give the same bits, and are for n = 64 and 16-bit types.
extern "C" int rwkvmpi_cuda_v7_time_mix(const void* r, const void* k, const void* v, const void* w_lin,
                                        const void* a_lin, const void* v_lin, const void* g, const void* v_first,
                                        const float* w0, const float* a0, const float* v0, const float* k_k,
                                        const float* k_a, const float* r_k, const float* ln_weight,
                                        const float* ln_bias, float* state, const int32_t* rows, void* h, void* v_out,
                                        void* scratch, int64_t tokens, int64_t heads, int64_t n, int64_t segments,
                                        int64_t scratch_bytes, float eps, int body, int dtype, int device,
                                        void* stream) {
  const Mix7Arguments x = {r,   k,         v,       w_lin, a_lin, v_lin, g,     v_first, w0,
                           a0,  v0,        k_k,     k_a,   r_k,   ln_weight, ln_bias, state, rows,
                           h,   v_out,     scratch, tokens, heads, n,    segments, scratch_bytes, eps};
  if (const int error = check(x, dtype)) return error;
  if (tokens == 0 || heads == 0 || n == 0) return OK;
  if (body == AUTO) body = choose(x, dtype);
  CHECK(body == SEQUENTIAL || ((body == TILES_FUSED || body == TILES_SPLIT) && have_tiles(n, dtype)), UNSUPPORTED);
  if (body == TILES_SPLIT && segments > 0) {
    CHECK(scratch, BAD_POINTER);
    CHECK(scratch_bytes >= v7_tiles_scratch(tokens, heads, segments), BAD_SIZE);
  }
  if (body != SEQUENTIAL)
    CHECK(all_on(16, {r, k, v, w_lin, a_lin, v_lin, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln_weight, ln_bias, state, h,
                     v_out, scratch}),
          MISALIGNED);
  CHECK(all_on(4, {rows}), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return body == SEQUENTIAL    ? launch_v7_sequential(x, dtype, stream)
         : body == TILES_FUSED ? launch_v7_tiles_fused(x, dtype, stream)
                               : launch_v7_tiles_split(x, dtype, stream);
}
