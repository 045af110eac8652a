// Small kernels whose results test_emulation.py knows from elsewhere.
#include "device.cuh"

static __global__ void convert(const float* in, bf16* narrow, half_t* half, float* wide, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    narrow[i] = from_float<bf16>(in[i]);
    half[i] = from_float<half_t>(in[i]);
    wide[2 * i] = to_float(narrow[i]);
    wide[2 * i + 1] = to_float(half[i]);
  }
}

// d = a b + d and e = a^T b^T + e. a: [16, 16], b: [16, 8], bt: [8, 16]; d, e: [16, 8]
template <typename E> static __global__ void multiply(const E* a, const E* b, const E* bt, float* d, float* e) {
  alignas(16) __shared__ E as[16 * 16];
  alignas(16) __shared__ E bs[16 * 8];
  alignas(16) __shared__ E bts[8 * 16];
  const int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  cp_async16(as + 8 * lane, a + 8 * lane);
  cp_async16(lane < 16 ? bs + 8 * lane : bts + 8 * (lane - 16), lane < 16 ? b + 8 * lane : bt + 8 * (lane - 16));
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[2];
  float sums[2][4];
  for (int i = 0; i < 4; i++) {
    sums[0][i] = d[(group + i / 2 * 8) * 8 + pair + i % 2];
    sums[1][i] = e[(group + i / 2 * 8) * 8 + pair + i % 2];
  }
  ldmatrix_x4(left, as + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x2_trans(right, bs + lane % 16 * 8);
  mma_16816<E>(sums[0], left, right);
  ldmatrix_x4_trans(left, as + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  ldmatrix_x2(right, bts + lane % 8 * 16 + lane / 8 % 2 * 8);
  mma_16816<E>(sums[1], left, right);
  for (int i = 0; i < 4; i++) {
    d[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[0][i];
    e[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[1][i];
  }
}

// Row i of out [12, 64]: what every thread of two warps gets.
static __global__ void exchange(int* out) {
  const int thread = threadIdx.x, lane = thread % 32;
  const unsigned all = 0xffffffffu;
  out[0 * 64 + thread] = __shfl_sync(all, thread, 5);
  out[1 * 64 + thread] = __shfl_sync(all, thread, lane + 1, 8);
  out[2 * 64 + thread] = __shfl_xor_sync(all, thread, 3);
  out[3 * 64 + thread] = __shfl_up_sync(all, thread, 2);
  out[4 * 64 + thread] = __shfl_up_sync(all, thread, 1, 16);
  out[5 * 64 + thread] = __shfl_down_sync(all, thread, 3);
  out[6 * 64 + thread] = (int)__ballot_sync(all, lane % 3 == 0);
  out[7 * 64 + thread] = __reduce_max_sync(all, (thread * 7) % 64);
  // Two halves in operations of their own, one of them more often.
  out[8 * 64 + thread] = 0;
  if (lane < 16)
    for (int i = 0; i < 3; i++) out[8 * 64 + thread] += __shfl_xor_sync(0x0000ffffu, thread, 8 >> i);
  else
    out[8 * 64 + thread] = __reduce_add_sync(0xffff0000u, thread);
  out[9 * 64 + thread] = __popc(__match_any_sync(all, lane / 5));
  out[10 * 64 + thread] = __any_sync(all, lane == 31) + 2 * __all_sync(all, lane < 31);
  __shared__ int total;
  if (thread == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, thread);
  __syncthreads();
  out[11 * 64 + thread] = total;
}

// Whether static and dynamic shared memory are NaN at the start of each block, and what cp.async leaves until the wait.
static __global__ void poison(const float* in, int* out) {
  __shared__ float own[32];
  DYNAMIC_SHARED(float, tile);
  const int thread = threadIdx.x;
  int seen = own[thread] != own[thread] && tile[thread] != tile[thread];
  own[thread] = tile[thread] = 1.0f;
  __syncthreads();
  if (thread < 8) cp_async16(tile + 4 * thread, in + 4 * thread, thread < 4);
  cp_async_commit();
  if (thread < 8) seen += tile[4 * thread] != tile[4 * thread] ? 2 : 0;
  cp_async_wait<0>();
  if (thread < 8) seen += tile[4 * thread + 3] == (thread < 4 ? in[4 * thread + 3] : 0.0f) ? 4 : 0;
  out[blockIdx.x * 32 + thread] = seen;
}

static __global__ void overrun(float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

static __global__ void misaligned(float* out) {
  float x[8] = {};
  store8(out + 1, x);
}

extern "C" {
int check_convert(const float* in, bf16* narrow, half_t* half, float* wide, int count) {
  return LAUNCH(convert, 1, 128, 0, nullptr, in, narrow, half, wide, count);
}
int check_multiply(const void* a, const void* b, const void* bt, float* d, float* e, int dtype) {
  if (dtype == BFLOAT16)
    return LAUNCH(multiply<bf16>, 1, 32, 0, nullptr, (const bf16*)a, (const bf16*)b, (const bf16*)bt, d, e);
  return LAUNCH(multiply<half_t>, 1, 32, 0, nullptr, (const half_t*)a, (const half_t*)b, (const half_t*)bt, d, e);
}
int check_exchange(int* out) { return LAUNCH(exchange, 1, 64, 0, nullptr, out); }
int check_poison(const float* in, int* out) { return LAUNCH(poison, 3, 32, 128, nullptr, in, out); }
int check_overrun(float* out) { return LAUNCH(overrun, 1, 32, 128, nullptr, out); }
int check_misaligned(float* out) { return LAUNCH(misaligned, 1, 1, 0, nullptr, out); }
int check_limits(int blocks, int threads, int shared_bytes) {
  return LAUNCH(misaligned, dim3(1, unsigned(blocks)), unsigned(threads), size_t(shared_bytes), nullptr, nullptr);
}
}
