// The time mix of RWKV-6 and RWKV-5 between its matrix products.
#include "wkv6_launch.cuh"

// r, k, v, w_lin, g, h: E [T, H*N]; time_decay, ln_weight, ln_bias: float32 [H*N]; u: float32 [H, N]; rows: int32
// [D, 2]; state: float32 [D, H, N(value), N(key)], in place.
//   w = exp(-exp(time_decay + w_lin)); where w_lin is null (RWKV-5), time_decay is itself the decay of every token;
//   y = WKV-6(r, w, k, v, u);  h = (groupnorm(y)*ln_weight + ln_bias) * silu(g), without the gate where g is null;
//   h is 0 in rows outside every segment.
extern "C" int rwkvmpi_cuda_v6_time_mix(const void* r, const void* k, const void* v, const void* w_lin,
                                        const float* time_decay, const float* u, const void* g, const float* ln_weight,
                                        const float* ln_bias, float* state, const int32_t* rows, void* h,
                                        int64_t tokens, int64_t heads, int64_t n, int64_t segments, float eps,
                                        int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(rows || segments == 0, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    Wkv6<E> x = {};
    x.r = (const E*)r, x.k = (const E*)k, x.v = (const E*)v, x.w = (const E*)w_lin, x.gate = (const E*)g, x.out = (E*)h;
    x.decay = time_decay, x.u = u, x.ln_weight = ln_weight, x.ln_bias = ln_bias, x.eps = eps;
    x.state_in = state, x.state_out = state, x.rows = rows;
    x.tokens = tokens, x.heads = heads, x.n = n, x.segments = segments;
    return launch_wkv6<E, true>(x, device, stream);
  });
}
