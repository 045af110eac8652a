// WKV-7 by itself, for the segments of a chunk: the public operator. The layers use the time mix.
//
// The sequential body: a block advances BLOCK_ROWS rows of the state of one head of one segment, so that the 64 heads
// of a large model fill 128 multiprocessors with one document. Half of its warps advance; the others meanwhile fetch
// tokens, convert them to float32, once (at every use it would cost 40 more issue slots per token), and write y. All
// meet once per tile of tokens; in between the advancing warps wait for nobody.
#include "time_mix7.h"
#include "wkv6_segments.cuh"
#include "wkv7_sequential.cuh"

namespace rwkv {
namespace sequential {
namespace {

template <typename E> struct Wkv7 {
  const E *r, *w, *k, *v, *a, *b;  // [tokens, heads, n]
  const float* state_in;           // [segments, heads, n(value), n(key)]
  float* state_out;
  const int32_t* rows;
  E* y;
  int64_t tokens, heads, segments;
  int n, parts;  // parts: blocks of a head
  bool vectors, state_vectors;
};

template <int CAPACITY> struct Block : RowLayout<CAPACITY> {
  using L = RowLayout<CAPACITY>;
  static constexpr int TILE = CAPACITY <= 64 ? 16 : 1024 / CAPACITY;  // what MOST_SHARED has room for
  static constexpr int WARPS = CAPACITY == 32 ? 2 : 4;                // that advance, and as many that help
  static constexpr int HELPERS = 32 * WARPS, THREADS = 2 * HELPERS, BLOCK_ROWS = WARPS * L::WARP_ROWS;
  static constexpr int TOKEN = KEY_OPERANDS * CAPACITY + BLOCK_ROWS;  // floats of one in shared memory
  using Parts = PartsOfY<L, TILE>;

  static __device__ __forceinline__ void meet() { bar_sync(1, THREADS); }
};

// The operands of two tiles, and of 16-bit types a third as it came.
template <int CAPACITY, typename E> struct Shared {
  using B = Block<CAPACITY>;
  alignas(16) float tokens[2][B::TILE][B::TOKEN];
  alignas(16) float parts[2][B::WARPS][B::Parts::FLOATS];
  alignas(16) E raw[sizeof(E) == 4 ? 1 : B::TILE][sizeof(E) == 4 ? 16 : B::TOKEN];
};

// The tokens of a segment on their way through the block.
template <int CAPACITY, typename E> struct Stream {
  using L = RowLayout<CAPACITY>;
  using B = Block<CAPACITY>;
  static constexpr int TILE = B::TILE, PIECE = 16 / sizeof(E);
  static constexpr bool CONVERTED = sizeof(E) != 4;

  const Wkv7<E>& x;
  Shared<CAPACITY, E>& shared;
  int64_t first;  // the segment's first element of this head
  int count, first_row;

  // Half of the block each; both meet before every tile, after the last one, and when its last y is there.
  __device__ __forceinline__ void advance(Recurrence<L>& rows) const {
    const int warp = threadIdx.x / 32;
    B::meet();
    rows.begin(shared.tokens[0][0]);
    for (int tile = 0, begin = 0; begin < count; tile++, begin += TILE) {
      const int tokens = count - begin < TILE ? count - begin : TILE;
      const typename B::Parts parts = {shared.parts[tile % 2][warp]};
      rows.advance(shared.tokens[tile % 2][0], B::TOKEN, tokens, parts.of_lane(), B::Parts::PITCH, [&] {
        B::meet();
        return shared.tokens[(tile + 1) % 2][0];
      });
      if (begin + TILE < count) continue;
      const typename B::Parts last = {shared.parts[(tile + 1) % 2][warp]};
      rows.put(last.of_lane());
    }
    B::meet();
  }
  __device__ __forceinline__ void help() const {
    fetch(0);
    arrive(0);
    if (CONVERTED) fetch(TILE);
    B::meet();
    for (int begin = 0; begin < count; begin += TILE) {
      if (!CONVERTED) fetch(begin + TILE);
      if (begin > 0) write_y(begin / TILE - 1, begin - TILE - 1, TILE);
      if (begin + TILE < count) arrive(begin + TILE);
      if (CONVERTED) fetch(begin + 2 * TILE);
      B::meet();
    }
    const int last = (count - 1) / TILE;
    write_y(last, last * TILE - 1, count - last * TILE);
    B::meet();
    write_y(last + 1, count - 1, 1);
  }

  // act(token of the tile, its operand, number of floats before it in the token, channel) for this helper's pieces
  template <class Act> __device__ __forceinline__ void each_piece(Act act) const {
    const E* const operands[KEY_OPERANDS] = {x.r, x.w, x.k, x.a, x.b};
    constexpr int PIECES = CAPACITY / PIECE, VALUE_PIECES = B::BLOCK_ROWS / PIECE;
    constexpr int TURNS = (TILE * PIECES + B::HELPERS - 1) / B::HELPERS;
    const int helper = threadIdx.x - B::HELPERS;
#pragma unroll
    for (int i = 0; i < KEY_OPERANDS; i++)
#pragma unroll
      for (int j = 0; j < TURNS; j++) {
        const int p = j * B::HELPERS + helper, channel = p % PIECES * PIECE;
        if (TILE * PIECES % B::HELPERS == 0 || p < TILE * PIECES)
          act(p / PIECES, operands[i], i * CAPACITY + channel, channel);
      }
    for (int p = helper; p < TILE * VALUE_PIECES; p += B::HELPERS) {
      const int value = p % VALUE_PIECES * PIECE;
      act(p / VALUE_PIECES, x.v, KEY_OPERANDS * CAPACITY + value, first_row + value);
    }
  }

  __device__ __forceinline__ void fetch(int begin) const {
    if (begin >= count) return;
    const int64_t stride = x.heads * x.n;
    each_piece([&](int t, const E* operand, int place, int channel) {
      const E* row = begin + t < count ? operand + first + (begin + t) * stride : nullptr;
      if constexpr (CONVERTED)
        fetch16(&shared.raw[t][place], row, channel, x.n, x.vectors);
      else
        fetch16(&shared.tokens[begin / TILE % 2][t][place], row, channel, x.n, x.vectors);
    });
    cp_async_commit();
  }

  // Every helper converts what it fetched itself.
  __device__ __forceinline__ void arrive(int begin) const {
    cp_async_wait<0>();
    if constexpr (CONVERTED)
      each_piece([&](int t, const E*, int place, int) {
        float piece[PIECE];
        load8(&shared.raw[t][place], piece);
        write_floats(&shared.tokens[begin / TILE % 2][t][place], piece);
      });
  }

  // y of `slots` tokens from `begin` on, which lie where the tile's lie; there is no token -1.
  __device__ __forceinline__ void write_y(int tile, int begin, int slots) const {
    const int warp = threadIdx.x / 32 - B::WARPS;
    const typename B::Parts parts = {shared.parts[tile % 2][warp]};
    parts.sums(begin < 0, slots, [&](int slot, int row_of_warp, const auto& y) {
      const int row = first_row + warp * L::WARP_ROWS + row_of_warp;
      store_values(x.y + first + (begin + slot) * x.heads * x.n + row, y, x.n - row, x.vectors);
    });
  }
};

template <int CAPACITY, typename E>
__global__ void __launch_bounds__(Block<CAPACITY>::THREADS, CAPACITY <= 64 ? 2 : 1) wkv7_kernel(const Wkv7<E> x) {
  using L = RowLayout<CAPACITY>;
  using B = Block<CAPACITY>;
  using SharedMemory = Shared<CAPACITY, E>;
  static_assert(sizeof(SharedMemory) <= MOST_SHARED);
  DYNAMIC_SHARED(SharedMemory, shared);
  if (blockIdx.y >= x.segments) return clear_gaps(x.y, x.heads * x.n, x.rows, x.segments, x.tokens);
  const Segment segment = segment_of(x.rows, blockIdx.y, x.segments, x.tokens);
  const int64_t head = blockIdx.x / x.parts, state_at = (blockIdx.y * x.heads + head) * x.n * x.n;
  const int count = same_in_warp((int)segment.count), first_row = blockIdx.x % x.parts * B::BLOCK_ROWS;
  const Stream<CAPACITY, E> stream = {x, *shared, (segment.first * x.heads + head) * x.n, count, first_row};
  if (same_in_warp(threadIdx.x / 32) >= B::WARPS) {
    if (count > 0) stream.help();
    return;
  }
  Recurrence<L> rows;
  rows.values = threadIdx.x / 32 * L::WARP_ROWS + L::group() * L::ROWS;
  read_state<L>(rows.s, x.state_in + state_at, x.n, first_row + rows.values, x.state_vectors);
  if (count > 0) stream.advance(rows);
  if (count > 0 || x.state_in != x.state_out)
    write_state<L>(rows.s, x.state_out + state_at, x.n, first_row + rows.values, x.state_vectors);
}

}  // namespace
}  // namespace sequential
}  // namespace rwkv

// The plain recurrence. r, w, k, v, a, b, y: [tokens, heads, n] of `dtype`; state_in, state_out: float32 [segments,
// heads, n(value), n(key)], may be the same; rows: int32 [segments, 2] in device memory, null: one segment of them all.
// y is 0 outside the segments. body: 1 sequential, for any decay; 2 tiles on tensor cores, for n = 64, 16-bit types and
// decays as RWKV-7 makes them; 0 tiles where they can.
extern "C" int rwkvmpi_cuda_wkv7(const void* r, const void* w, const void* k, const void* v, const void* a,
                                 const void* b, const float* state_in, float* state_out, const int32_t* rows, void* y,
                                 int64_t tokens, int64_t heads, int64_t n, int64_t segments, int body, int dtype,
                                 int device, void* stream) {
  using namespace rwkv;
  using namespace rwkv::sequential;
  CHECK(tokens >= 0 && heads >= 0 && n >= 1 && segments >= 0, BAD_SIZE);
  CHECK(n <= MAX_HEAD_SIZE && tokens <= INT32_MAX && heads <= INT32_MAX / 32 && segments <= 65535, BAD_SIZE);
  CHECK(rows || segments == 1 || segments * heads == 0, BAD_POINTER);
  CHECK(body >= 0 && body <= 2, UNSUPPORTED);
  CHECK(dtype == FLOAT32 || dtype == BFLOAT16 || dtype == FLOAT16, BAD_DTYPE);
  const bool tiles = n == 64 && dtype != FLOAT32;
  CHECK(body != 2 || tiles, UNSUPPORTED);
  if (heads == 0 || (tokens == 0 && (segments == 0 || state_in == state_out))) return OK;
  CHECK(tokens == 0 || (r && w && k && v && a && b && y), BAD_POINTER);
  CHECK(segments == 0 || (state_in && state_out), BAD_POINTER);
  CHECK(all_on(4, {state_in, state_out, rows}), MISALIGNED);
  CHECK(all_on(dtype == FLOAT32 ? 4 : 2, {r, w, k, v, a, b, y}), MISALIGNED);
  const bool on_vectors = all_on(16, {r, w, k, v, a, b, y});
  const bool state_vectors = n % 4 == 0 && all_on(16, {state_in, state_out});
  CHECK(body != 2 || (on_vectors && state_vectors), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  if (body == 2 || (body == 0 && tiles && on_vectors && state_vectors && tokens > 0))
    return launch_wkv7_tiles(r, w, k, v, a, b, state_in, state_out, rows, y, tokens, heads, segments, dtype, stream);

  return dispatch_dtype(dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    return dispatch_capacity(n, [&](auto capacity) {
      constexpr int CAPACITY = decltype(capacity)::value;
      using B = Block<CAPACITY>;
      const int parts = int((n + B::BLOCK_ROWS - 1) / B::BLOCK_ROWS);
      const int64_t units = heads * parts, gaps = gap_parts(rows, segments, tokens, units);
      if (segments + gaps > 65535) return int(BAD_SIZE);
      const bool vectors = on_vectors && n * sizeof(E) % 16 == 0;
      const auto cast = [](const void* p) { return static_cast<const E*>(p); };
      const Wkv7<E> x = {cast(r), cast(w), cast(k), cast(v), cast(a), cast(b), state_in, state_out, rows,
                         static_cast<E*>(y), tokens, heads, segments, (int)n, parts, vectors, state_vectors};
      return LAUNCH((wkv7_kernel<CAPACITY, E>), dim3(unsigned(units), unsigned(segments + gaps)), dim3(B::THREADS),
                    sizeof(Shared<CAPACITY, E>), stream, x);
    });
  });
}
