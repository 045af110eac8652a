// One value in, one value out.
#include "functions.h"
#include "parallel.h"
#include "tensors.h"

using namespace rwkv;

namespace {

constexpr int64_t VALUES_PER_THREAD = 16384;

template <class F> void map(Source in, Sink out, int64_t count, int threads, F f) {
  parallel_ranges(count, VALUES_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += LANES) out(i, f(i, in(i, end - i), end - i), end - i);
  });
}

}  // namespace

RWKV_API void rwkvmpi_tanh(const void* x, void* out, int is_bf16, int64_t count, int threads) {
  map({x, is_bf16}, {out, is_bf16}, count, threads, [](int64_t, vf v, int64_t) { return rwkv::tanh(v); });
}

RWKV_API void rwkvmpi_sigmoid(const void* x, void* out, int is_bf16, int64_t count, int threads) {
  map({x, is_bf16}, {out, is_bf16}, count, threads, [](int64_t, vf v, int64_t) { return sigmoid(v); });
}

RWKV_API void rwkvmpi_relu_squared(const void* x, void* out, int is_bf16, int64_t count, int threads) {
  map({x, is_bf16}, {out, is_bf16}, count, threads, [](int64_t, vf v, int64_t) { return relu_squared(v); });
}

// sigmoid(r) * x
RWKV_API void rwkvmpi_sigmoid_mul(const void* r, int r_bf16, const void* x, int x_bf16, void* out, int out_bf16,
                                  int64_t count, int threads) {
  const Source xs = {x, x_bf16};
  map({r, r_bf16}, {out, out_bf16}, count, threads,
      [&](int64_t i, vf v, int64_t left) { return sigmoid(v) * xs(i, left); });
}

// 1 if every value is finite: no exponent is all ones.
RWKV_API int rwkvmpi_all_finite(const void* x, int is_bf16, int64_t count, int threads) {
  int finite = 1;
  const Source in = {x, is_bf16};
  parallel_ranges(count, VALUES_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    vi bad = {};
    for (int64_t i = begin; i < end; i += LANES) bad |= (as_int(in(i, end - i)) & 0x7f800000) == 0x7f800000;
    for (int lane = 0; lane < LANES; lane++)
      if (bad[lane]) __atomic_store_n(&finite, 0, __ATOMIC_RELAXED);
  });
  return finite;
}

// acc[c] += x[first][c], then x[first + 1][c], ...: one order, whatever the threads and however the rows are split
// into calls.
RWKV_API void rwkvmpi_fold_rows(double* acc, const float* x, int64_t channels, int64_t first, int64_t count) {
  for (int64_t t = first; t < first + count; t++)
    for (int64_t c = 0; c < channels; c++) acc[c] += (double)x[t * channels + c];
}
