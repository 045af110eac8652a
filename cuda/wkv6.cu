// WKV-6 and WKV-5 by themselves: the public operators. The layers use time_mix6.cu.
#include "wkv6_launch.cuh"

// r, k, v, y: E [T, H, N]; w: the same, or with decay_per_head float32 [H, N]; u: float32 [H, N];
// state_in, state_out: float32 [D, H, N(value), N(key)]; rows: int32 [D, 2], null for one segment of all rows (D = 1).
//   y = (S + v (u*k)^T) r,  S <- S*diag(w) + v k^T;  y is 0 in rows outside every segment.
extern "C" int rwkvmpi_cuda_wkv6(const void* r, const void* w, const void* k, const void* v, const float* u,
                                 const float* state_in, float* state_out, const int32_t* rows, void* y, int64_t tokens,
                                 int64_t heads, int64_t n, int64_t segments, int decay_per_head, int dtype, int device,
                                 void* stream) {
  using namespace rwkv;
  CHECK(rows || segments == 1, BAD_SIZE);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    Wkv6<E> x = {};
    x.r = (const E*)r, x.k = (const E*)k, x.v = (const E*)v, x.out = (E*)y;
    x.w = decay_per_head ? nullptr : (const E*)w, x.decay = decay_per_head ? (const float*)w : nullptr;
    x.u = u, x.state_in = state_in, x.state_out = state_out, x.rows = rows;
    x.tokens = tokens, x.heads = heads, x.n = n, x.segments = segments;
    return launch_wkv6<E, false>(x, device, stream);
  });
}
