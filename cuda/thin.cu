// Products of 1 to 16 rows of activations with a matrix, which is read once at the speed of memory; and in the same
// pass what follows them. A row's bits do not depend on how many rows there are, nor on its place among them.
#include "thin_plain.cuh"
#include "thin_tensor.cuh"

using namespace rwkv;

namespace {

struct Processors {
  int count = 1, shared_bytes = 0;  // multiprocessors; what a block can have of shared memory
};

Processors processors_of(int device) {
#ifdef __CUDACC__
  Processors p;
  cudaDeviceGetAttribute(&p.count, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&p.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return p;
#else
  (void)device;
  return {3, 227 << 10};
#endif
}

}  // namespace

// s = op(scale * x w^T), and by `accumulate`: 0 out = s, 1 out += s, 2 out += sigmoid(gate) * s, 3 out = s,
// 4 out = u + d * (mix + s). x: [rows, inputs] in `dtype`, its rows x_stride apart; w: [outputs, inputs] and gate:
// [rows, outputs] the same; out: [rows, outputs], for 1, 2 and 3 float32, else in `dtype`; u, d: float32 [rows,
// outputs]; mix: float32 [outputs].
extern "C" int rwkvmpi_cuda_thin_product(const void* x, const void* w, void* out, const void* gate, const float* u,
                                         const float* d, const float* mix, int64_t rows, int64_t outputs,
                                         int64_t inputs, int64_t x_stride, int op, int accumulate, float scale,
                                         int dtype, int device, void* stream) {
  CHECK(rows >= 0 && rows <= MOST_THIN_ROWS && outputs >= 0 && inputs > 0, BAD_SIZE);
  CHECK(outputs <= INT32_MAX / 2 && inputs <= INT32_MAX / 2, BAD_SIZE);
  CHECK(op >= NONE && op <= RELU_SQUARED && accumulate >= STORE && accumulate <= MIX, UNSUPPORTED);
  CHECK(rows <= 1 || (x_stride >= inputs && x_stride <= INT32_MAX), BAD_STRIDE);
  if (rows == 0 || outputs == 0) return OK;
  CHECK(x && w && out && (gate || accumulate != GATED_ADD), BAD_POINTER);
  CHECK((u && d && mix) || accumulate != MIX, BAD_POINTER);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const Processors processors = processors_of(device);
  if (rows == 1) x_stride = 0;
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const Thin<E> p = {(const E*)x, (const E*)w, out,      (const E*)gate, u,          d,    mix, rows,
                       outputs,     inputs,      x_stride, op,             accumulate, scale};
    const bool to_e = accumulate == STORE || accumulate == MIX;
    CHECK(all_on(sizeof(E), {x, w, gate}) && all_on(4, {u, d, mix}), MISALIGNED);
    CHECK(all_on(to_e ? sizeof(E) : sizeof(float), {out}), MISALIGNED);
    const int64_t vector = 16 / sizeof(E);
    if (inputs % vector != 0) return thin_plain::launch<E, 1>(p, stream);
    CHECK(all_on(16, {x, w}) && x_stride % vector == 0, MISALIGNED);
    if constexpr (sizeof(E) == 4)
      return thin_plain::launch<E, 4>(p, stream);
    else
      return thin_tensor::launch<E>(p, processors.count, processors.shared_bytes, stream);
  });
}
