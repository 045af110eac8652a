// The time mix of RWKV-4 between its matrix products.
#include "wkv4.cuh"

// h = sigmoid(r) * WKV-4(k, v, w, u), E [T, C], 0 in rows outside every segment; state: float32 [D, 3, C], in place.
// One token for each of B states: rows (0, 1), (1, 1), ...
extern "C" int rwkvmpi_cuda_v4_time_mix(const void* r, const void* k, const void* v, const float* w, const float* u,
                                        float* state, const int32_t* rows, void* h, int64_t tokens, int64_t channels,
                                        int64_t segments, int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(rows || segments == 0, BAD_POINTER);
  CHECK(r || tokens == 0, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Wkv4<E> x = {(const E*)r, (const E*)k, (const E*)v, w,      u,        state, state,
                       rows,        (E*)h,       nullptr,     tokens, channels, segments};
    return launch_wkv4(x, device, stream);
  });
}
