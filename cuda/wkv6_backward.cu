// The launchers of WKV-6 for training: the forward pass that remembers, and the backward pass.
#include "wkv6_backward.cuh"

#include "wkv6_launch.cuh"

namespace rwkv {
namespace {

bool fit(int64_t batch, int64_t tokens, int64_t heads, int64_t size) {
  constexpr int64_t LIMIT = int64_t(1) << 31;
  return batch >= 0 && batch <= 65535 && tokens >= 0 && tokens < LIMIT / (batch + 1) && heads >= 0 &&
         heads < LIMIT / MOST_TRAINED_KEYS && size >= 1 && size <= MOST_TRAINED_KEYS;
}

}  // namespace
}  // namespace rwkv

// r, w, k, v, y: E [B, T, H, N]; u: float32 [H, N]; state, last: float32 [B, H, N(value), N(key)]; stored: float32
// [B, H, ceil(T / every), N, N], the states before every `every`-th token; every must be 16, N 256 at most.
extern "C" int rwkvmpi_cuda_wkv6_train_forward(const void* r, const void* w, const void* k, const void* v,
                                               const float* u, const float* state, void* y, float* last, float* stored,
                                               int64_t batch, int64_t tokens, int64_t heads, int64_t size,
                                               int64_t every, int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(fit(batch, tokens, heads, size), BAD_SIZE);
  CHECK(every == BACK_TILE, UNSUPPORTED);
  if (batch == 0 || heads == 0) return OK;
  CHECK(stored || tokens == 0, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    Wkv6<E> x = {};
    x.r = (const E*)r, x.w = (const E*)w, x.k = (const E*)k, x.v = (const E*)v, x.out = (E*)y;
    x.u = u, x.state_in = state, x.state_out = last, x.stored = stored;
    x.tokens = batch * tokens, x.heads = heads, x.n = size, x.segments = batch;
    return launch_wkv6<E, false>(x, device, stream);
  });
}

// dy, dr, dw, dk, dv: as y, r, w, k, v; dlast, dstate: as last, state; du: float32 [B, H, N], of each sequence alone.
extern "C" int rwkvmpi_cuda_wkv6_train_backward(const void* r, const void* w, const void* k, const void* v,
                                                const float* u, const float* stored, const void* dy, const float* dlast,
                                                void* dr, void* dw, void* dk, void* dv, float* du, float* dstate,
                                                int64_t batch, int64_t tokens, int64_t heads, int64_t size,
                                                int64_t every, int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(fit(batch, tokens, heads, size), BAD_SIZE);
  CHECK(every == BACK_TILE, UNSUPPORTED);
  if (batch == 0 || heads == 0) return OK;
  CHECK(u && dlast && du && dstate, BAD_POINTER);
  CHECK(tokens == 0 || (r && w && k && v && stored && dy && dr && dw && dk && dv), BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Wkv6Backward<E> x = {(const E*)r,  (const E*)w, (const E*)k, (const E*)v, u,  stored, (const E*)dy,
                               dlast,        (E*)dr,      (E*)dw,      (E*)dk,      (E*)dv, du, dstate,
                               batch,        tokens,      heads,       size};
    CHECK(hold_elements(x.r, x.w, x.k, x.v, x.u, x.stored, x.dy, x.dlast, x.dr, x.dw, x.dk, x.dv, x.du, x.dstate),
          MISALIGNED);
    DeviceGuard guard(device);
    if (guard.error) return guard.error;
    const auto run = [&](auto kernel) -> int {
      return LAUNCH(kernel, dim3((unsigned)heads, (unsigned)batch), dim3(BACK_THREADS),
                    back_tile_bytes(padded_to_part(size)), stream, x);
    };
    return size <= PART ? run(wkv6_backward_kernel<E, PART>) : run(wkv6_backward_kernel<E, 0>);
  });
}
