// RWKV-7's time mix between its matrix products, token by token in float32: every head size up to 512 and every dtype.
//
// A block is one head of one segment, since the group norm needs all of its values. Per tile of tokens its warps
// prepare a token each, advance rows of the state, and finish a token each; the next tile comes from memory meanwhile.
// Up to a head size of 128 the state stays in registers; beyond, the block takes its rows in turn for every tile.
// Issue slots per token at N = 64: 8 warps of 115 for the recurrence, about 250 to prepare and 130 to finish, so 330
// per scheduler.
#include "time_mix7_sequential.cuh"
#include "wkv6_segments.cuh"

namespace rwkv {
namespace sequential {
namespace {

template <int CAPACITY> struct MixBlock {
  using L = RowLayout<CAPACITY>;
  static constexpr int TILE = CAPACITY <= 64 ? 16 : CAPACITY <= 256 ? 4 : 2, TURN = TILE < 8 ? TILE : 8;
  static constexpr int WARPS = CAPACITY == 32 ? 2 : CAPACITY == 128 ? 16 : 8, THREADS = 32 * WARPS;
  static constexpr int ROWS = WARPS * L::WARP_ROWS;
  static constexpr bool RESIDENT = ROWS == CAPACITY;
  using Parts = PartsOfY<L, TURN + 1>;
};

template <int CAPACITY, typename E> struct MixShared {
  using B = MixBlock<CAPACITY>;
  alignas(16) float tokens[B::TILE][MIX_OPERANDS * CAPACITY];
  alignas(16) float parts[B::WARPS][B::Parts::FLOATS];
  alignas(16) E raw[INPUTS][B::TILE][CAPACITY];
  float y[B::TILE][CAPACITY];
  float vectors[VECTORS][CAPACITY];
  float bonus[B::TILE];
};

// The rows from first_row on through the tokens of a tile, a TURN at a time as there is room for the parts of y.
template <int CAPACITY, typename E>
__device__ __forceinline__ void advance(Recurrence<RowLayout<CAPACITY>>& rows, MixShared<CAPACITY, E>& shared,
                                        int first_row, int count) {
  using B = MixBlock<CAPACITY>;
  const typename B::Parts parts = {shared.parts[threadIdx.x / 32]};
  rows.values = first_row + RowLayout<CAPACITY>::group() * RowLayout<CAPACITY>::ROWS;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += B::TURN) {
    const int tokens = count - begin < B::TURN ? count - begin : B::TURN;
    const float* token = shared.tokens[begin];
    float* const slots = parts.of_lane();
    rows.begin(token);
    rows.advance(token, MIX_OPERANDS * CAPACITY, tokens, slots, B::Parts::PITCH, [&] { return token; });
    rows.put(slots + tokens * B::Parts::PITCH);
    parts.sums(1, tokens + 1, [&](int slot, int row, const auto& y) {
#pragma unroll
      for (int i = 0; i < B::Parts::WIDTH; i++) shared.y[begin + slot - 1][first_row + row + i] = y[i];
    });
  }
}

// Inputs of the tokens from `begin` on, as they are, into shared memory; 0 for those beyond the segment.
template <int CAPACITY, typename E>
__device__ __forceinline__ void fetch(const Mix7<E>& x, MixShared<CAPACITY, E>& shared, int64_t first, int begin,
                                      int count) {
  using B = MixBlock<CAPACITY>;
  constexpr int PIECE = 16 / sizeof(E), PIECES = CAPACITY / PIECE;
#pragma unroll
  for (int i = 0; i < INPUTS; i++) {
    if (i >= IN_V_LIN && !x.inputs[IN_V_FIRST]) break;
    for (int p = threadIdx.x; p < B::TILE * PIECES; p += B::THREADS) {
      const int t = p / PIECES, channel = p % PIECES * PIECE;
      const E* row = begin + t < count ? x.inputs[i] + first + (begin + t) * x.heads * x.n : nullptr;
      fetch16(&shared.raw[i][t][channel], row, channel, x.n, x.vectorised);
    }
  }
  cp_async_commit();
}

template <int CAPACITY, typename E>
__global__ void __launch_bounds__(MixBlock<CAPACITY>::THREADS, CAPACITY <= 64 ? 2 : 1) v7_kernel(const Mix7<E> x) {
  using L = RowLayout<CAPACITY>;
  using B = MixBlock<CAPACITY>;
  using SharedMemory = MixShared<CAPACITY, E>;
  static_assert(sizeof(SharedMemory) <= MOST_SHARED);
  DYNAMIC_SHARED(SharedMemory, memory);
  SharedMemory& shared = *memory;
  if (blockIdx.y >= x.segments) {
    clear_gaps(x.h, x.heads * x.n, x.rows, x.segments, x.tokens);
    if (x.v_out) clear_gaps(x.v_out, x.heads * x.n, x.rows, x.segments, x.tokens);
    return;
  }
  const Segment segment = segment_of(x.rows, blockIdx.y, x.segments, x.tokens);
  if (segment.count == 0) return;

  const int n = x.n, count = same_in_warp((int)segment.count), warp = same_in_warp(threadIdx.x / 32);
  const int64_t head = blockIdx.x, first = (segment.first * x.heads + head) * n;
  const bool residual = x.inputs[IN_V_FIRST] != nullptr;
  float* state = x.state + (blockIdx.y * x.heads + head) * n * n;
  fetch<CAPACITY>(x, shared, first, 0, count);
#pragma unroll
  for (int i = 0; i < VECTORS; i++)
    if (i != V0 || residual)
      for (int c = threadIdx.x; c < n; c += B::THREADS) shared.vectors[i][c] = x.vectors[i][head * n + c];
  const auto vector = [&](int i, int j) { return shared.vectors[i][channel_of(j)]; };
  const int first_row = warp * L::WARP_ROWS, row = first_row + L::group() * L::ROWS;
  Recurrence<L> rows;
  if constexpr (B::RESIDENT) read_state<L>(rows.s, state, n, row, x.state_vectors);

#pragma unroll 1
  for (int begin = 0; begin < count; begin += B::TILE) {
    const int tokens = count - begin < B::TILE ? count - begin : B::TILE;
    const auto place = [&](int t) { return first + (begin + t) * x.heads * n; };
    cp_async_wait<0>();
    __syncthreads();
    for (int t = warp; t < tokens; t += B::WARPS) {
      const float bonus = prepare_token<CAPACITY>(
          shared.tokens[t], n, residual, [&](int i, int j) { return to_float(shared.raw[i][t][channel_of(j)]); },
          vector, [&](int j, float v) { x.v_out[place(t) + channel_of(j)] = from_float<E>(v); });
      if (threadIdx.x % 32 == 0) shared.bonus[t] = bonus;
    }
    __syncthreads();
    if (begin + B::TILE < count) fetch<CAPACITY>(x, shared, first, begin + B::TILE, count);
    if constexpr (B::RESIDENT) {
      advance(rows, shared, first_row, tokens);
    } else {
      for (int group = 0; group < n; group += B::ROWS) {
        read_state<L>(rows.s, state, n, group + row, x.state_vectors);
        advance(rows, shared, group + first_row, tokens);
        write_state<L>(rows.s, state, n, group + row, x.state_vectors);
      }
    }
    __syncthreads();
    for (int t = warp; t < tokens; t += B::WARPS)
      finish_token<CAPACITY>(
          shared.y[t], shared.tokens[t], shared.bonus[t], n, x.eps, vector,
          [&](int j, float h) { x.h[place(t) + channel_of(j)] = from_float<E>(h); });
  }
  if constexpr (B::RESIDENT) write_state<L>(rows.s, state, n, row, x.state_vectors);
}

}  // namespace
}  // namespace sequential

int launch_v7_sequential(const Mix7Arguments& arguments, int dtype, void* stream) {
  using namespace sequential;
  if (const int error = wrong_mix7(arguments, dtype, sizeof(float))) return error;
  if (arguments.tokens == 0 || arguments.heads == 0) return OK;
  CHECK(arguments.rows || arguments.segments == 0, BAD_POINTER);
  const int64_t segments = arguments.segments;
  const int64_t blocks = segments + gap_parts(arguments.rows, segments, arguments.tokens, arguments.heads);
  CHECK(blocks <= 65535, BAD_SIZE);
  if (blocks == 0) return OK;
  return dispatch_dtype(dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    return dispatch_capacity(arguments.n, [&](auto capacity) {
      constexpr int CAPACITY = decltype(capacity)::value;
      return LAUNCH((v7_kernel<CAPACITY, E>), dim3(unsigned(arguments.heads), unsigned(blocks)),
                    dim3(MixBlock<CAPACITY>::THREADS), sizeof(MixShared<CAPACITY, E>), stream, Mix7<E>(arguments));
    });
  });
}

}  // namespace rwkv
