// WKV-7 in tiles, inside RWKV-7's time mix and plain: a block is a head of a segment, or, where few heads cannot fill
// the device, all tiles are prepared first, side by side, and then taken one after another. Same functions, same bits.
//
// Memory, per token and head: nine rows of 128 bytes in and out (seven in the first layer), in two kernels another 712
// written and read again; 2.4 MB per token of 32 layers of 64 heads are 0.7 us of an H100's memory. A block of the one
// kernel takes 66 KiB of shared memory and 128 registers a thread, so a multiprocessor has two. Expected on an H100,
// not measured, per token of 32 layers of 64 heads: four documents or more 0.9 to 1.1 us (6,000 issue slots a tile, and
// one tile per token and multiprocessor), two 1.2; one document in two kernels 0.8 to prepare and 0.6 to advance.
#include "time_mix7_tokens.cuh"

namespace rwkv {
namespace tile7 {
namespace {

constexpr int THREADS = (ADVANCE_WARPS + PREPARE_WARPS) * 32, STREAMED_TILES = 4;

struct Segment {
  int first, count;
  __device__ __forceinline__ int tiles() const { return count / TOKENS + (count % TOKENS != 0); }
};

// Segment d, empty where it does not lie within the chunk.
__device__ __forceinline__ Segment segment_of(const int32_t* rows, int64_t segments, int64_t tokens, int64_t d) {
  if (!rows && segments) return {0, int(tokens)};
  if (d >= segments) return {0, 0};
  const int first = rows[2 * d], count = rows[2 * d + 1];
  return first >= 0 && count > 0 && int64_t(first) + count <= tokens ? Segment{first, count} : Segment{0, 0};
}

// Tiles have fixed places in scratch memory, whatever the segments are: there are tokens / 16 + segments of them. They
// suffice: two neighbouring segments' first places are at least the first one's tiles apart.
__device__ __forceinline__ int64_t first_place(const Segment& segment, int64_t d) { return segment.first / TOKENS + d; }

__device__ __forceinline__ int64_t warp_min(int64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Clears the rows between segment d and the next one, and those before the first one, in one head's columns.
template <class E>
__device__ void clear_gaps(E* out, const int32_t* rows, int64_t segments, int64_t tokens, int64_t heads, int64_t d,
                           int64_t head) {
  if (!rows && segments) return;
  int64_t next = tokens, before = tokens;  // first rows of the next segment, and of the very first
  for (int64_t other = threadIdx.x & 31; other < segments; other += 32) {
    const Segment segment = segment_of(rows, segments, tokens, other);
    if (!segment.count) continue;
    if (other > d && segment.first < next) next = segment.first;
    if (segment.first < before) before = segment.first;
  }
  next = warp_min(next);
  before = warp_min(before);
  const Segment own = segment_of(rows, segments, tokens, d);
  const auto clear = [&](int64_t begin, int64_t end) {
    const uint4 zero = {0, 0, 0, 0};
    for (int64_t row = begin + threadIdx.x / 8; row < end; row += THREADS / 8)
      *reinterpret_cast<uint4*>(out + (row * heads + head) * SIZE + threadIdx.x % 8 * 8) = zero;
  };
  if (own.count ? own.first == before : d == 0 && before == tokens) clear(0, before);
  if (own.count) clear(own.first + own.count, next);
}

// What the advancing warps do: every tile of a head in turn, as soon as it is there.
template <class E, int RING>
__device__ __forceinline__ void advance_all(const Tile<E>* ring, float (*y)[TOKENS * Y_STRIDE], const float* state_in,
                                            float* state_out, int tiles) {
  State state;
  state.load(state_in);
  for (int i = 0; i < tiles; i++) {
    bar_sync(FULL + i % RING, THREADS);
    advance(state, ring[i % RING], y[i % 2]);
    bar_arrive(DONE + i % RING, THREADS);
  }
  state.store(state_out);
}

__device__ __forceinline__ int tokens_of(const Segment& segment, int tile) {
  const int left = segment.count - tile * TOKENS;
  return left < TOKENS ? left : TOKENS;
}

__host__ __device__ __forceinline__ const float* state_in(const Mix7Arguments& x) { return x.state; }
__host__ __device__ __forceinline__ const float* state_in(const Wkv7Arguments& x) { return x.state_in; }
__host__ __device__ __forceinline__ float* state_out(const Mix7Arguments& x) { return x.state; }
__host__ __device__ __forceinline__ float* state_out(const Wkv7Arguments& x) { return x.state_out; }
template <class E> __device__ void clear_outputs(const Mix7Arguments& x, int64_t d, int64_t head) {
  clear_gaps(static_cast<E*>(x.h), x.rows, x.segments, x.tokens, x.heads, d, head);
  if (!x.v_first) clear_gaps(static_cast<E*>(x.v_out), x.rows, x.segments, x.tokens, x.heads, d, head);
}
template <class E> __device__ void clear_outputs(const Wkv7Arguments& x, int64_t d, int64_t head) {
  clear_gaps(static_cast<E*>(x.y), x.rows, x.segments, x.tokens, x.heads, d, head);
}

template <class E> struct FusedShared {
  Workspace<E> work;
  Tile<E> tiles[2];
  E gates[MATRIX];
  float y[2][TOKENS * Y_STRIDE];
};

// Four warps prepare tile t + 1 and finish tile t - 1 while four others take tile t.
template <class E, class Inputs, class Outputs, class Arguments>
__global__ void __launch_bounds__(THREADS, 2) fused_kernel(const Arguments x) {
  DYNAMIC_SHARED(FusedShared<E>, shared);
  const int heads = int(x.heads), d = blockIdx.x / heads, head = blockIdx.x % heads, columns = heads * SIZE;
  clear_outputs<E>(x, d, head);
  const Segment segment = segment_of(x.rows, x.segments, x.tokens, d);
  const int tiles = segment.tiles();
  const int64_t matrix = int64_t(blockIdx.x) * SIZE * SIZE;
  if (!tiles) {
    if (d < x.segments && state_in(x) != state_out(x))
      for (int i = threadIdx.x; i < SIZE * SIZE; i += THREADS) state_out(x)[matrix + i] = state_in(x)[matrix + i];
    return;
  }
  if (threadIdx.x < ADVANCE_WARPS * 32) {
    advance_all<E, 2>(shared->tiles, shared->y, state_in(x) + matrix, state_out(x) + matrix, tiles);
    __syncthreads();  // no thread leaves while others count on it at a barrier
    return;
  }
  const Place p;
  const int own = head * SIZE + p.channel();
  const Inputs inputs(x, own);
  const Outputs outputs(x, own);
  const auto at = [&](int tile) { return int64_t(segment.first + tile * TOKENS) * columns + head * SIZE; };
  const auto fetch = [&](int tile) {
    if (tile < tiles)
      stage<E>(inputs, shared->work.staged[tile % 2], at(tile), columns, tokens_of(segment, tile));
    cp_async_commit();
  };
  const auto finish = [&](int tile) {
    outputs.write(shared->tiles[tile % 2], shared->y[tile % 2], shared->gates, at(tile) + p.channel(), columns,
                  tokens_of(segment, tile), [&] { bar_sync(DONE + tile % 2, THREADS); });
  };
  fetch(0);
  fetch(1);
  for (int i = 0; i < tiles + 2; i++) {
    cp_async_wait<0>();  // for what was asked for in the round before
    __syncwarp();
    if (i >= 2) finish(i - 2);
    if (outputs.gate() && 1 <= i && i <= tiles) {  // the gate for the next round
      __syncwarp();
      copy_rows(shared->gates, outputs.gate(), at(i - 1), columns, tokens_of(segment, i - 1));
      cp_async_commit();
    }
    if (i >= tiles) continue;
    Operands operands;
    Tile<E>& tile = shared->tiles[i % 2];
    inputs.operands(shared->work.staged[i % 2], at(i) + p.channel(), columns, tokens_of(segment, i), operands, tile);
    __syncwarp();
    fetch(i + 2);
    scale_operands(operands, shared->work, tile);
    multiply(shared->work, tile, (p.warp + i) % PREPARE_WARPS);
    bar_arrive(FULL + i % 2, THREADS);
  }
  __syncthreads();
}

template <class E> struct PrepareShared {
  Workspace<E> work;
  Tile<E> tile;
};

// A block prepares the tile of one place and head.
template <class E> __global__ void __launch_bounds__(PREPARE_WARPS * 32) prepare_kernel(const Mix7Arguments x) {
  DYNAMIC_SHARED(PrepareShared<E>, shared);
  const int heads = int(x.heads), place = blockIdx.x / heads, head = blockIdx.x % heads, columns = heads * SIZE;
  const Place p;
  int64_t found = x.segments;
  for (int64_t d = p.lane; d < x.segments; d += 32) {
    const Segment segment = segment_of(x.rows, x.segments, x.tokens, d);
    const int64_t first = first_place(segment, d);
    if (first <= place && place < first + segment.tiles()) found = d;
  }
  found = warp_min(found);
  if (found == x.segments) return;
  const Segment segment = segment_of(x.rows, x.segments, x.tokens, found);
  const int tile = int(place - first_place(segment, found)), first = segment.first + tile * TOKENS;
  const int64_t at = int64_t(first) * columns + head * SIZE;
  const MixInputs<E> inputs(x, head * SIZE + p.channel());
  const int count = tokens_of(segment, tile);
  stage<E>(inputs, shared->work.staged[0], at, columns, count);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  Operands operands;
  inputs.operands(shared->work.staged[0], at + p.channel(), columns, count, operands, shared->tile);
  scale_operands(operands, shared->work, shared->tile);
  multiply(shared->work, shared->tile, (p.warp + blockIdx.x) % PREPARE_WARPS);
  __syncthreads();
  const uint4* from = reinterpret_cast<const uint4*>(&shared->tile);
  uint4* to = reinterpret_cast<uint4*>(static_cast<Tile<E>*>(x.scratch) + blockIdx.x);
  for (int i = threadIdx.x; i < int(sizeof(Tile<E>) / 16); i += PREPARE_WARPS * 32) to[i] = from[i];
}

template <class E> struct StreamShared {
  Tile<E> tiles[STREAMED_TILES];
  E gates[STREAMED_TILES][MATRIX];
  float y[2][TOKENS * Y_STRIDE];
};

// Takes the prepared tiles of a head in turn; the warps that do not advance fetch them ahead and finish y.
template <class E> __global__ void __launch_bounds__(THREADS, 2) stream_kernel(const Mix7Arguments x) {
  DYNAMIC_SHARED(StreamShared<E>, shared);
  constexpr int RING = STREAMED_TILES, PIECES = sizeof(Tile<E>) / 16;
  const int heads = int(x.heads), d = blockIdx.x / heads, head = blockIdx.x % heads, columns = heads * SIZE;
  clear_outputs<E>(x, d, head);
  const Segment segment = segment_of(x.rows, x.segments, x.tokens, d);
  const int tiles = segment.tiles();
  const int64_t matrix = int64_t(blockIdx.x) * SIZE * SIZE;
  if (!tiles) return;
  if (threadIdx.x < ADVANCE_WARPS * 32) {
    advance_all<E, RING>(shared->tiles, shared->y, x.state + matrix, x.state + matrix, tiles);
    __syncthreads();
    return;
  }
  const Place p;
  const MixOutputs<E> outputs(x, head * SIZE + p.channel());
  const auto at = [&](int tile) { return int64_t(segment.first + tile * TOKENS) * columns + head * SIZE; };
  const Tile<E>* source = static_cast<const Tile<E>*>(x.scratch) + first_place(segment, d) * x.heads + head;
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const uint4* from = reinterpret_cast<const uint4*>(source + int64_t(tile) * x.heads);
      uint4* to = reinterpret_cast<uint4*>(&shared->tiles[tile % RING]);
      for (int i = threadIdx.x - ADVANCE_WARPS * 32; i < PIECES; i += PREPARE_WARPS * 32) cp_async16(to + i, from + i);
      copy_rows(shared->gates[tile % RING], outputs.gate(), at(tile), columns, tokens_of(segment, tile));
    }
    cp_async_commit();
  };
  const auto finish = [&](int tile) {
    outputs.write(shared->tiles[tile % RING], shared->y[tile % 2], shared->gates[tile % RING], at(tile) + p.channel(),
                  columns, tokens_of(segment, tile), [&] { bar_sync(DONE + tile % RING, THREADS); });
  };
  for (int i = 0; i < RING - 1; i++) fetch(i);
  for (int i = 0; i <= tiles; i++) {
    cp_async_wait<RING - 2>();
    if (i < tiles) bar_arrive(FULL + i % RING, THREADS);
    if (i > 0) finish(i - 1);
    sync_prepare();  // the tile before is finished with
    fetch(i + RING - 1);
  }
  __syncthreads();
}

// Segments of the grid: at least one, whose blocks clear all rows if there is none.
int64_t grid_segments(int64_t segments) { return segments > 0 ? segments : 1; }

template <class Launch> int with_16_bit_type(int dtype, Launch run) {
  if (dtype == BFLOAT16) return run(bf16());
  if (dtype == FLOAT16) return run(half_t());
  return UNSUPPORTED;
}

}  // namespace
}  // namespace tile7

int64_t v7_tiles_scratch(int64_t tokens, int64_t heads, int64_t segments) {
  return (tokens / tile7::TOKENS + segments) * heads * int64_t(sizeof(tile7::Tile<bf16>));
}

int launch_v7_tiles_fused(const Mix7Arguments& x, int dtype, void* stream) {
  using namespace tile7;
  return with_16_bit_type(dtype, [&](auto type) -> int {
    using E = decltype(type);
    const int64_t blocks = grid_segments(x.segments) * x.heads;
    const auto kernel = fused_kernel<E, MixInputs<E>, MixOutputs<E>, Mix7Arguments>;
    return LAUNCH(kernel, dim3(unsigned(blocks)), dim3(THREADS), sizeof(FusedShared<E>), stream, x);
  });
}

int launch_v7_tiles_split(const Mix7Arguments& x, int dtype, void* stream) {
  using namespace tile7;
  return with_16_bit_type(dtype, [&](auto type) -> int {
    using E = decltype(type);
    const int64_t places = (x.tokens / TOKENS + x.segments) * x.heads, blocks = grid_segments(x.segments) * x.heads;
    if (x.segments > 0) {
      const auto prepare = prepare_kernel<E>;
      const int error = LAUNCH(prepare, dim3(unsigned(places)), dim3(PREPARE_WARPS * 32), sizeof(PrepareShared<E>),
                               stream, x);
      if (error) return error;
    }
    const auto kernel = stream_kernel<E>;
    return LAUNCH(kernel, dim3(unsigned(blocks)), dim3(THREADS), sizeof(StreamShared<E>), stream, x);
  });
}

int launch_wkv7_tiles(const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
                      const float* state_in, float* state_out, const int32_t* rows, void* y, int64_t tokens,
                      int64_t heads, int64_t segments, int dtype, void* stream) {
  using namespace tile7;
  CHECK(heads <= INT32_MAX / SIZE && grid_segments(segments) * heads <= INT32_MAX, BAD_SIZE);
  const Wkv7Arguments x = {r, w, k, v, a, b, state_in, state_out, rows, y, tokens, heads, SIZE, segments};
  return with_16_bit_type(dtype, [&](auto type) -> int {
    using E = decltype(type);
    const int64_t blocks = grid_segments(x.segments) * x.heads;
    const auto kernel = fused_kernel<E, PlainInputs<E>, PlainOutputs<E>, Wkv7Arguments>;
    return LAUNCH(kernel, dim3(unsigned(blocks)), dim3(THREADS), sizeof(FusedShared<E>), stream, x);
  });
}

}  // namespace rwkv
