// The launchers of WKV-7 for training. Bodies: wkv7_backward_tokens.cuh, wkv7_backward_forward.cuh and
// wkv7_backward_tiles.cuh.
#include <initializer_list>

#include "wkv7_backward_forward.cuh"
#include "wkv7_backward_tiles.cuh"
#include "wkv7_backward_tokens.cuh"

namespace rwkv {
namespace wkv7_training {
namespace {

enum Body : int { AUTO = 0, TOKENS = 1, TILES = 2 };

constexpr int MAX_SIZE = 256;

// Whether all sizes are usable and all offsets fit; 0 tokens are legal, the state then passes through.
bool fit(const Sizes& x) {
  constexpr int64_t LIMIT = int64_t(1) << 31, ELEMENTS = int64_t(1) << 60;
  for (const int64_t size : {x.batch, x.tokens, x.heads, x.size, x.every})
    if (size < 0 || size >= LIMIT / 2) return false;
  if (x.size < 1 || x.size > MAX_SIZE || x.every < 1 || x.batch * x.heads >= LIMIT) return false;
  return x.batch * x.heads <= ELEMENTS / (x.size * x.size * (x.tokens + 1));
}

template <typename E> void set_sizes(Tensors<E>& x, const Sizes& sizes) {
  x.tokens = (int)sizes.tokens, x.heads = (int)sizes.heads, x.size = (int)sizes.size;
  x.every = (int)sizes.every, x.marks = (int)sizes.marks();
}

// Calls `run` with the layout of the padded head size.
template <typename F> int with_size(int64_t size, const F& run) {
  if (size <= 64) return run(LayoutOf<64>{});
  return run(LayoutOf<256>{});
}

// Whether a block may have that much shared memory: 163 KiB on an A100, 227 on an H100, but 99 on smaller GPUs.
bool has_shared_memory(int bytes, int device) {
#ifdef __CUDACC__
  int most = 0;
  return cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && bytes <= most;
#else
  (void)bytes, (void)device;
  return true;
#endif
}

// Whether tiles are possible. States must be stored where tiles begin, and for the backward
// pass (`dense`) before every one of them.
template <typename E> bool takes_tiles(const Sizes& x, bool dense, int bytes, int device) {
  const bool marks = dense ? x.every == TILE : x.every % TILE == 0;
  return sizeof(E) == 2 && x.size == HEAD && marks && has_shared_memory(bytes, device);
}

}  // namespace
}  // namespace wkv7_training
}  // namespace rwkv

// r, w, k, v, a, b, y: E [B, T, H, N]; state, last: float32 [B, H, N(value), N(key)]; stored: float32
// [B, H, ceil(T / every), N, N]. body: 0 chooses, 1 token by token, 2 tiles of 16 tokens (N = 64, 16-bit E, `every` a
// multiple of 16, for the backward pass 16).
extern "C" int rwkvmpi_cuda_wkv7_train_forward(const void* r, const void* w, const void* k, const void* v,
                                               const void* a, const void* b, const float* state, void* y, float* last,
                                               float* stored, int64_t batch, int64_t tokens, int64_t heads,
                                               int64_t size, int64_t every, int body, int dtype, int device,
                                               void* stream) {
  using namespace rwkv::wkv7_training;
  const Sizes sizes{batch, tokens, heads, size, every};
  CHECK(fit(sizes), BAD_SIZE);
  CHECK(body >= AUTO && body <= TILES, UNSUPPORTED);
  if (batch * heads == 0) return OK;
  CHECK(state && last && (tokens == 0 || (r && w && k && v && a && b && y && stored)), BAD_POINTER);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const dim3 blocks((unsigned)(batch * heads));
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    Tensors<E> x{};
    x.r = (const E*)r, x.w = (const E*)w, x.k = (const E*)k, x.v = (const E*)v, x.a = (const E*)a, x.b = (const E*)b;
    x.y = (E*)y, x.state = state, x.last = last, x.stored = stored;
    set_sizes(x, sizes);
    if constexpr (sizeof(E) == 2) {
      constexpr int BYTES = sizeof(ForwardRoom<E>);
      if (body != TOKENS && takes_tiles<E>(sizes, false, BYTES, device)) {
        CHECK(all_on(16, {r, w, k, v, a, b, state, y, last, stored}), MISALIGNED);
        return LAUNCH(forward_tiles<E>, blocks, dim3(THREADS), BYTES, stream, x);
      }
    }
    CHECK(body != TILES, UNSUPPORTED);
    CHECK(all_on(sizeof(E), {r, w, k, v, a, b, y}) && all_on(4, {state, last, stored}), MISALIGNED);
    return with_size(size, [&](auto layout) -> int {
      using L = decltype(layout);
      return LAUNCH((forward_tokens<E, L>), dim3(blocks.x, L::GROUPS), dim3(THREADS), sizeof(Chunk<L>), stream, x);
    });
  });
}

// dy like y, dlast and dstate like state, dr ... db like r. The other arguments as in the forward pass.
extern "C" int rwkvmpi_cuda_wkv7_train_backward(const void* r, const void* w, const void* k, const void* v,
                                                const void* a, const void* b, const float* stored, const void* dy,
                                                const float* dlast, void* dr, void* dw, void* dk, void* dv, void* da,
                                                void* db, float* dstate, int64_t batch, int64_t tokens, int64_t heads,
                                                int64_t size, int64_t every, int body, int dtype, int device,
                                                void* stream) {
  using namespace rwkv::wkv7_training;
  const Sizes sizes{batch, tokens, heads, size, every};
  CHECK(fit(sizes), BAD_SIZE);
  CHECK(body >= AUTO && body <= TILES, UNSUPPORTED);
  if (batch * heads == 0) return OK;
  CHECK(dlast && dstate, BAD_POINTER);
  CHECK(tokens == 0 || (r && w && k && v && a && b && stored && dy && dr && dw && dk && dv && da && db), BAD_POINTER);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const dim3 blocks((unsigned)(batch * heads));
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    Tensors<E> x{};
    x.r = (const E*)r, x.w = (const E*)w, x.k = (const E*)k, x.v = (const E*)v, x.a = (const E*)a, x.b = (const E*)b;
    x.dy = (const E*)dy, x.dr = (E*)dr, x.dw = (E*)dw, x.dk = (E*)dk, x.dv = (E*)dv, x.da = (E*)da, x.db = (E*)db;
    x.stored = const_cast<float*>(stored), x.dlast = dlast, x.dstate = dstate;
    set_sizes(x, sizes);
    if constexpr (sizeof(E) == 2) {
      constexpr int BYTES = backward_tiles_bytes<E>();
      if (body != TOKENS && tokens > 0 && takes_tiles<E>(sizes, true, BYTES, device)) {
        CHECK(all_on(16, {r, w, k, v, a, b, stored, dy, dlast, dr, dw, dk, dv, da, db, dstate}), MISALIGNED);
        return LAUNCH(backward_tiles<E>, blocks, dim3(THREADS), BYTES, stream, x);
      }
    }
    CHECK(body != TILES || tokens == 0, UNSUPPORTED);
    CHECK(all_on(sizeof(E), {r, w, k, v, a, b, dy, dr, dw, dk, dv, da, db}), MISALIGNED);
    CHECK(all_on(4, {stored, dlast, dstate}), MISALIGNED);
    return with_size(size, [&](auto layout) -> int {
      using L = decltype(layout);
      return LAUNCH((backward_tokens<E, L>), blocks, dim3(THREADS), sizeof(Work<L>), stream, x);
    });
  });
}
