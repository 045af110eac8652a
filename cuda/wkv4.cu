// WKV-4 by itself: the public operator. The layers use time_mix4.cu.
#include "wkv4.cuh"

// k, v, y: E [T, C]; w (below 0), u: float32 [C]; state_in, state_out: float32 [D, 3 (aa, bb, pp), C]; rows: int32
// [D, 2], null for one segment of all rows (D = 1). y is 0 in rows outside every segment.
extern "C" int rwkvmpi_cuda_wkv4(const void* k, const void* v, const float* w, const float* u, const float* state_in,
                                 float* state_out, const int32_t* rows, void* y, int64_t tokens, int64_t channels,
                                 int64_t segments, int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(rows || segments == 1, BAD_SIZE);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Wkv4<E> x = {nullptr, (const E*)k, (const E*)v, w,       u,      state_in, state_out,
                       rows,    (E*)y,       nullptr,     tokens, channels, segments};
    return launch_wkv4(x, device, stream);
  });
}
