// Marks the segments whose states are no longer numbers.
#include "device.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int64_t SPAN = 16 * THREADS;  // floats of one block

__global__ void mark_kernel(const float* x, int32_t* flags, int64_t count) {
  const int64_t segment = blockIdx.y, first = blockIdx.x * SPAN;
  const float* own = x + segment * count;
  bool broken = false;
  for (int64_t i = first + threadIdx.x; i < count && i < first + SPAN; i += THREADS)
    broken |= (__float_as_uint(own[i]) & 0x7f800000u) == 0x7f800000u;
  if (broken) atomicMax(&flags[segment], 1);
}

}  // namespace

// x: float32 [segments, count]; flags: int32 [segments]: 1 where there is NaN or Inf, untouched elsewhere.
extern "C" int rwkvmpi_cuda_mark_not_finite(const float* x, int32_t* flags, int64_t segments, int64_t count, int device,
                                            void* stream) {
  CHECK(segments >= 0 && count >= 0, BAD_SIZE);
  CHECK(segments <= 65535 && count <= INT64_MAX / 4 / (segments + 1), BAD_SIZE);
  if (segments == 0 || count == 0) return OK;
  CHECK(x && flags, BAD_POINTER);
  CHECK(all_on(4, {x, flags}), MISALIGNED);
  const int64_t blocks = (count + SPAN - 1) / SPAN;
  CHECK(blocks <= INT32_MAX, BAD_SIZE);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return LAUNCH(mark_kernel, dim3(unsigned(blocks), unsigned(segments)), dim3(THREADS), 0, stream, x, flags, count);
}
