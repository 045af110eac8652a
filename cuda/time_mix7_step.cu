// RWKV-7's time mix for one token of each of many states: generation. Memory sets the pace, as a head reads and writes
// its whole state, 2 * 16 KiB in float32 at N = 64, for 0.04 MFLOP.
//
// A block is one head of one state. Its reads of the state are on their way, 64 bytes and more of each lane, while the
// first warp prepares the token. The order of operations is v7_time_mix's in its sequential body: so are the bits with
// a float32 state.
#include "time_mix7_sequential.cuh"

namespace rwkv {
namespace sequential {
namespace {

// Blocks that a multiprocessor shall have room for at N = 64: as many as do without spilled registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int STEP_BLOCKS = 4;
#else
constexpr int STEP_BLOCKS = 5;
#endif

template <int CAPACITY> struct StepBlock {
  using L = RowLayout<CAPACITY>;
  static constexpr int WARPS = CAPACITY == 32 ? 1 : CAPACITY == 64 ? 4 : 8, THREADS = 32 * WARPS;
  static constexpr int ROWS = L::KEYS == 8 ? 4 : 2;   // of a lane at a time
  static constexpr int ROW_STEP = WARPS * L::GROUPS;  // between them
  static constexpr int BLOCK_ROWS = ROWS * ROW_STEP;
  static constexpr bool PRELOADED = CAPACITY <= 64;  // the token's inputs wait in registers
};

// How S lies in memory: a lane takes 16 bytes at a time, neighbouring lanes neighbouring ones. For float32 these are
// the keys of RowLayout.
template <class L, typename S> struct StateVectors {
  static constexpr int WIDTH = 16 / sizeof(S), COUNT = L::KEYS / WIDTH;
  static __device__ __forceinline__ int key(int i) {
    return i / WIDTH * (WIDTH * L::LANES) + WIDTH * L::part() + i % WIDTH;
  }

  union Vector {
    uint4 bits;
    S elements[WIDTH];
  };
  uint4 vectors[COUNT];

  __device__ __forceinline__ void read(const S* row, int n, bool aligned) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
      const int first = key(c * WIDTH);
      Vector out;
      out.bits = make_uint4(0, 0, 0, 0);
      if (aligned) {
        if (first < n) out.bits = *reinterpret_cast<const uint4*>(row + first);
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++)
          if (first + i < n) out.elements[i] = row[first + i];
      }
      vectors[c] = out.bits;
    }
  }
  __device__ __forceinline__ void unpack(float (&s)[L::KEYS]) const {
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
      Vector in;
      in.bits = vectors[c];
#pragma unroll
      for (int i = 0; i < WIDTH; i++) s[c * WIDTH + i] = to_float(in.elements[i]);
    }
  }
  static __device__ __forceinline__ void write(const float (&s)[L::KEYS], S* row, int n, bool aligned) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
      const int first = key(c * WIDTH);
      Vector out;
#pragma unroll
      for (int i = 0; i < WIDTH; i++) out.elements[i] = from_float<S>(s[c * WIDTH + i]);
      if (aligned) {
        if (first < n) *reinterpret_cast<uint4*>(row + first) = out.bits;
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++)
          if (first + i < n) row[first + i] = out.elements[i];
      }
    }
  }
};

template <class L, typename S> __device__ __forceinline__ void read_operand(float (&x)[L::KEYS], const float* operand) {
#pragma unroll
  for (int i = 0; i < L::KEYS; i += 4) {
    const float4 q = *reinterpret_cast<const float4*>(operand + StateVectors<L, S>::key(i));
    x[i] = q.x, x[i + 1] = q.y, x[i + 2] = q.z, x[i + 3] = q.w;
  }
}

// The token's inputs and the head's vectors, by the first warp. Those that fit are all asked for before any is used.
template <int CAPACITY, typename E> struct StepInputs {
  static constexpr int COUNT = StepBlock<CAPACITY>::PRELOADED ? CAPACITY / 32 : 1;
  const Mix7<E>& x;
  int64_t at;
  int first_channel;  // of the head
  float inputs[INPUTS][COUNT], vectors[VECTORS][COUNT];

  __device__ __forceinline__ StepInputs(const Mix7<E>& arguments, int64_t place, int head)
      : x(arguments), at(place), first_channel(head * arguments.n) {
    if constexpr (StepBlock<CAPACITY>::PRELOADED) {
      const bool residual = x.inputs[IN_V_FIRST];
#pragma unroll
      for (int j = 0; j < COUNT; j++) {
        const bool held = channel_of(j) < x.n;
#pragma unroll
        for (int i = 0; i < INPUTS; i++)
          inputs[i][j] = held && (i < IN_V_LIN || residual) ? to_float(x.inputs[i][at + channel_of(j)]) : 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
          vectors[i][j] = held && (i < V0 || residual) ? x.vectors[i][first_channel + channel_of(j)] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ float input(int i, int j) const {
    if constexpr (StepBlock<CAPACITY>::PRELOADED)
      return inputs[i][j];
    else
      return to_float(x.inputs[i][at + channel_of(j)]);
  }
  __device__ __forceinline__ float vector(int i, int j) const {
    if constexpr (StepBlock<CAPACITY>::PRELOADED)
      return vectors[i][j];
    else
      return x.vectors[i][first_channel + channel_of(j)];
  }
};

template <int CAPACITY, typename E, typename S>
__global__ void __launch_bounds__(StepBlock<CAPACITY>::THREADS, CAPACITY == 64 ? STEP_BLOCKS : 1)
    v7_step_kernel(const Mix7<E> x, S* states, bool aligned) {
  using L = RowLayout<CAPACITY>;
  using B = StepBlock<CAPACITY>;
  __shared__ __align__(16) float token[MIX_OPERANDS * CAPACITY];
  __shared__ float y[CAPACITY];
  const int n = x.n, warp = same_in_warp(threadIdx.x / 32), head = blockIdx.x % (unsigned)x.heads;
  const int64_t at = (int64_t)blockIdx.x * n;
  S* const state = states + at * n;
  StateVectors<L, S> stored[B::ROWS];
  const auto fetch = [&](int begin) {
#pragma unroll
    for (int i = 0; i < B::ROWS; i++) {
      const int row = begin + i * B::ROW_STEP;
      stored[i].read(state + (int64_t)row * n, row < n ? n : 0, aligned);
    }
  };
  const int first_row = warp * L::GROUPS + L::group();
  fetch(first_row);

  float bonus = 0.0f;
  if (warp == 0) {
    const StepInputs<CAPACITY, E> in(x, at, head);
    bonus = prepare_token<CAPACITY>(
        token, n, x.inputs[IN_V_FIRST] != nullptr, [&](int i, int j) { return in.input(i, j); },
        [&](int i, int j) { return in.vector(i, j); },
        [&](int j, float v) { x.v_out[at + channel_of(j)] = from_float<E>(v); });
  }
  __syncthreads();
#pragma unroll 1
  for (int group = 0; group < n; group += B::BLOCK_ROWS) {
    float s[B::ROWS][L::KEYS], removed[B::ROWS], sum[B::ROWS], operand[L::KEYS], keys[L::KEYS];
    read_operand<L, S>(operand, token + OPERAND_A * CAPACITY);
#pragma unroll
    for (int i = 0; i < B::ROWS; i++) {
      stored[i].unpack(s[i]);
      removed[i] = part_of_product(s[i], operand);
    }
    read_operand<L, S>(operand, token + OPERAND_W * CAPACITY);
    read_operand<L, S>(keys, token + OPERAND_K * CAPACITY);
#pragma unroll
    for (int i = 0; i < B::ROWS; i++) {
      removed[i] = sum_over_row<L>(removed[i]);
      const int row = group + first_row + i * B::ROW_STEP;
      decay_and_add(s[i], operand, row < n ? token[VALUES * CAPACITY + row] : 0.0f, keys);
    }
    read_operand<L, S>(operand, token + OPERAND_B * CAPACITY);
    read_operand<L, S>(keys, token + OPERAND_R * CAPACITY);
#pragma unroll
    for (int i = 0; i < B::ROWS; i++) {
      add_removal(s[i], removed[i], operand);
      sum[i] = part_of_product(s[i], keys);
    }
    if (group + B::BLOCK_ROWS < n) fetch(group + B::BLOCK_ROWS + first_row);
#pragma unroll
    for (int i = 0; i < B::ROWS; i++) {
      const int row = group + first_row + i * B::ROW_STEP;
      sum[i] = sum_over_row<L>(sum[i]);
      if (row >= n) continue;
      StateVectors<L, S>::write(s[i], state + (int64_t)row * n, n, aligned);
      if (L::part() == 0) y[row] = sum[i];
    }
  }
  __syncthreads();
  if (warp != 0) return;
  finish_token<CAPACITY>(
      y, token, bonus, n, x.eps, [&](int i, int j) { return x.vectors[i][head * n + channel_of(j)]; },
      [&](int j, float h) { x.h[at + channel_of(j)] = from_float<E>(h); });
}

template <typename E, typename S> int launch_step(const Mix7Arguments& arguments, void* state, void* stream) {
  return dispatch_capacity(arguments.n, [&](auto capacity) {
    constexpr int CAPACITY = decltype(capacity)::value;
    const bool aligned = arguments.n * sizeof(S) % 16 == 0 && all_on(16, {state});
    return LAUNCH((v7_step_kernel<CAPACITY, E, S>), dim3(unsigned(arguments.tokens * arguments.heads)),
                  dim3(StepBlock<CAPACITY>::THREADS), 0, stream, Mix7<E>(arguments), static_cast<S*>(state), aligned);
  });
}

}  // namespace
}  // namespace sequential
}  // namespace rwkv

// One token of each of `batch` states. The arguments are those of v7_time_mix for as many tokens; state: float32 or
// float16 as state_dtype says, [batch, heads, n(value), n(key)], in place. float16 rounds to nearest and holds what is
// too large for it as +-65504; the arithmetic is float32's.
extern "C" int rwkvmpi_cuda_v7_step(const void* r, const void* k, const void* v, const void* w_lin, const void* a_lin,
                                    const void* v_lin, const void* g, const void* v_first, const float* w0,
                                    const float* a0, const float* v0, const float* k_k, const float* k_a,
                                    const float* r_k, const float* ln_weight, const float* ln_bias, void* state,
                                    void* h, void* v_out, int64_t batch, int64_t heads, int64_t n, float eps,
                                    int state_dtype, int dtype, int device, void* stream) {
  using namespace rwkv;
  const Mix7Arguments x = {r,   k,   v,       w_lin, a_lin,     v_lin,   g,
                           v_first, w0, a0,  v0,    k_k,       k_a,     r_k,
                           ln_weight, ln_bias, static_cast<float*>(state), nullptr, h, v_out, nullptr,
                           batch, heads, n, batch, 0, eps};
  CHECK(state_dtype == FLOAT32 || state_dtype == FLOAT16, BAD_DTYPE);
  if (const int error = sequential::wrong_mix7(x, dtype, state_dtype == FLOAT32 ? 4 : 2)) return error;
  if (batch == 0 || heads == 0) return OK;
  CHECK(batch <= INT32_MAX / heads, BAD_SIZE);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return dispatch_dtype(dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    return state_dtype == FLOAT32 ? sequential::launch_step<E, float>(x, state, stream)
                                  : sequential::launch_step<E, half_t>(x, state, stream);
  });
}
