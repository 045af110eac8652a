// The time mix of RWKV-6 and RWKV-5 for one token of each of many states. The work is moving the states: every element
// is read once and written once, 16 bytes at a time, and the loads of a head are under way before anything else.
#include <type_traits>

#include "wkv6.cuh"

namespace rwkv {
namespace {

constexpr int THREADS = 256;

template <typename E, typename S> struct Step6 {
  const E *r, *k, *v, *w_lin, *gate;  // [states, heads, n]; w_lin and gate may be null
  const float *decay, *u, *ln_weight, *ln_bias;
  S* state;  // [states, heads, n(value), n(key)]
  E* h;
  int64_t heads, n;
  float eps;
};

// A head's token, in shared memory.
struct Token {
  float *r, *w, *k, *v, *y;  // [n]
  __device__ Token(float* memory, int n)
      : r(memory), w(memory + n), k(memory + 2 * n), v(memory + 3 * n), y(memory + 4 * n) {}
};

template <typename E, typename S> __device__ void read_token(const Step6<E, S>& x, const Token& to, int n) {
  const int64_t channel = blockIdx.x * x.n, at = blockIdx.y * x.heads * x.n + channel;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    to.r[i] = to_float(x.r[at + i]);
    to.k[i] = to_float(x.k[at + i]);
    to.v[i] = to_float(x.v[at + i]);
    const float decay = x.decay[channel + i];
    to.w[i] = x.w_lin ? decay6(decay + to_float(x.w_lin[at + i])) : decay;
  }
}

// By the first warp, once y is complete.
template <typename E, typename S> __device__ void write_token(const Step6<E, S>& x, const Token& from, int n) {
  if (threadIdx.x >= 32) return;
  const int64_t channel = blockIdx.x * x.n, at = blockIdx.y * x.heads * x.n + channel;
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < n; i += 32) sum += from.y[i];
  const float mean = warp_sum(sum) / n;
  for (int i = threadIdx.x; i < n; i += 32) squares = fmaf(from.y[i] - mean, from.y[i] - mean, squares);
  const float inverse = 1.0f / sqrtf(warp_sum(squares) / n + x.eps);
  for (int i = threadIdx.x; i < n; i += 32) {
    float out = fmaf((from.y[i] - mean) * inverse, x.ln_weight[channel + i], x.ln_bias[channel + i]);
    if (x.gate) {
      const float g = to_float(x.gate[at + i]);
      out *= g * sigmoid(g);
    }
    x.h[at + i] = from_float<E>(out);
  }
}

// A head of 64: every thread has the same keys of several rows, and ROW neighbouring lanes have a row.
template <typename E, typename S> __global__ void __launch_bounds__(THREADS) step_of_64(const Step6<E, S> x) {
  constexpr int N = 64, KEYS = 16 / sizeof(S), ROW = N / KEYS, STRIDE = THREADS / ROW, ROWS = N / STRIDE;
  struct alignas(16) Vector {
    S x[KEYS];
  };
  __shared__ float memory[5 * N];
  const Token token(memory, N);
  const int first = threadIdx.x / ROW, key = threadIdx.x % ROW * KEYS;
  S* const state = x.state + (blockIdx.y * x.heads + blockIdx.x) * N * N + key;
  Vector s[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) s[i] = *reinterpret_cast<const Vector*>(state + (first + i * STRIDE) * N);
  read_token(x, token, N);
  __syncthreads();
  float r[KEYS], w[KEYS], k[KEYS], bonus = 0.0f, y[ROWS], v[ROWS];
#pragma unroll
  for (int j = 0; j < KEYS; j++) {
    r[j] = token.r[key + j], w[j] = token.w[key + j], k[j] = token.k[key + j];
    bonus = fmaf(r[j] * x.u[blockIdx.x * N + key + j], k[j], bonus);
  }
  bonus = group_sum<ROW>(bonus);
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    y[i] = 0.0f;
    v[i] = token.v[first + i * STRIDE];
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const float old = to_float(s[i].x[j]);
      y[i] = fmaf(old, r[j], y[i]);
      s[i].x[j] = from_float<S>(fmaf(old, w[j], v[i] * k[j]));
    }
    *reinterpret_cast<Vector*>(state + (first + i * STRIDE) * N) = s[i];
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    y[i] = fmaf(bonus, v[i], group_sum<ROW>(y[i]));
    if (key == 0) token.y[first + i * STRIDE] = y[i];
  }
  __syncthreads();
  write_token(x, token, N);
}

// Any head size: a warp per row of values.
template <typename E, typename S> __global__ void __launch_bounds__(THREADS) step_of_any(const Step6<E, S> x) {
  __shared__ float memory[5 * MOST_KEYS];
  const int n = (int)x.n, lane = threadIdx.x % 32;
  const Token token(memory, n);
  S* const state = x.state + (blockIdx.y * x.heads + blockIdx.x) * n * n;
  read_token(x, token, n);
  __syncthreads();
  float bonus = 0.0f;
  for (int j = lane; j < n; j += 32) bonus = fmaf(token.r[j] * x.u[blockIdx.x * x.n + j], token.k[j], bonus);
  bonus = warp_sum(bonus);
  for (int row = threadIdx.x / 32; row < n; row += THREADS / 32) {
    const float v = token.v[row];
    float y = 0.0f;
    for (int j = lane; j < n; j += 32) {
      S& element = state[(int64_t)row * n + j];
      const float old = to_float(element);
      y = fmaf(old, token.r[j], y);
      element = from_float<S>(fmaf(old, token.w[j], v * token.k[j]));
    }
    y = fmaf(bonus, v, warp_sum(y));
    if (lane == 0) token.y[row] = y;
  }
  __syncthreads();
  write_token(x, token, n);
}

}  // namespace
}  // namespace rwkv

// As rwkvmpi_cuda_v6_time_mix with one token for each of B states: r, k, v, w_lin, g, h: E [B, H*N]; state:
// [B, H, N(value), N(key)] of state_dtype, float32 or float16 (lossy: every element is rounded after every token).
extern "C" int rwkvmpi_cuda_v6_step(const void* r, const void* k, const void* v, const void* w_lin,
                                    const float* time_decay, const float* u, const void* g, const float* ln_weight,
                                    const float* ln_bias, void* state, void* h, int64_t states, int64_t heads,
                                    int64_t n, float eps, int state_dtype, int dtype, int device, void* stream) {
  using namespace rwkv;
  CHECK(states >= 0 && states <= 65535 && heads >= 0 && heads < INT32_MAX / MOST_KEYS, BAD_SIZE);
  CHECK(n >= 1 && n <= MOST_KEYS, BAD_SIZE);
  CHECK(state_dtype == FLOAT32 || state_dtype == FLOAT16, BAD_DTYPE);
  if (states == 0 || heads == 0) return OK;
  CHECK(r && k && v && time_decay && u && ln_weight && ln_bias && state && h, BAD_POINTER);
  CHECK(n != 64 || (uintptr_t)state % 16 == 0, MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const dim3 grid((unsigned)heads, (unsigned)states);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    const auto run = [&](auto* typed) -> int {
      using S = std::remove_pointer_t<decltype(typed)>;
      const Step6<E, S> x = {(const E*)r, (const E*)k, (const E*)v,      (const E*)w_lin, (const E*)g,
                             time_decay,  u,           ln_weight,        ln_bias,         typed,
                             (E*)h,       heads,       n,                eps};
      CHECK(hold_elements(x.r, x.k, x.v, x.w_lin, x.gate, x.decay, x.u, x.ln_weight, x.ln_bias, x.state, x.h),
            MISALIGNED);
      if (n == 64) return LAUNCH((step_of_64<E, S>), grid, dim3(THREADS), 0, stream, x);
      return LAUNCH((step_of_any<E, S>), grid, dim3(THREADS), 0, stream, x);
    };
    return state_dtype == FLOAT32 ? run((float*)state) : run((half_t*)state);
  });
}
