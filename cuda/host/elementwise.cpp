// What is checked and summed over whole tensors.
#include "parallel.h"
#include "tensors.h"

using namespace rwkv;

namespace {

constexpr int64_t VALUES_PER_THREAD = 16384;

}  // namespace

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
