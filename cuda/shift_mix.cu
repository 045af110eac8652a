// Token shift: the normalised rows of a chunk mixed with the row before each, the shift rows of the state updated in
// place. A block takes a run of rows and the one before it.
//   Bytes of a token: 4 C in (and again 4 C for the row before each run, from the cache), M sizeof(E) C out, 8 C more
//   where u and d are wanted; `mixes` once per run, from the cache.
#include "rows.cuh"

namespace rwkv {
namespace {

constexpr int64_t FEW_ROWS = 512;  // up to here each row is a block of its own, so that all of the GPU has work

template <class E> struct ShiftMix {
  const float *x, *weight, *bias;  // [rows, channels]; [channels]
  float* shift;                    // of every segment the normalised row before its first, `shift_stride` apart
  const float* mixes;              // [mix_count, channels]
  const int32_t* segments;         // [segment_count][2]: first row, number of rows
  E* mixed;                        // [mix_count, rows, channels]
  float *u, *d;                    // [rows, channels], or both null
  int64_t shift_stride, mix_count, rows, channels, segment_count;
  float eps;
};

// Where the rows of a run belong.
template <int ROWS> struct Places {
  int32_t segment[ROWS];  // -1: to none
  int32_t first[ROWS], end[ROWS];

  // By all threads of the block; there must be a barrier before the first use. A row belongs to at most one segment.
  template <class E> __device__ void find(const ShiftMix<E>& p, int64_t run) {
    if (threadIdx.x < ROWS) segment[threadIdx.x] = -1;
    __syncthreads();
    for (int64_t s = threadIdx.x; s < p.segment_count; s += blockDim.x) {
      const int64_t begin = p.segments[2 * s], count = p.segments[2 * s + 1];
      if (begin < 0 || count <= 0 || begin + count > p.rows) continue;
      for (int row = 0; row < ROWS; row++) {
        if (run + row < begin || run + row >= begin + count) continue;
        segment[row] = (int32_t)s;
        first[row] = (int32_t)begin;
        end[row] = (int32_t)(begin + count);
      }
    }
  }
};

template <class E, int V, int ROWS>
__global__ void __launch_bounds__(MOST_ROW_THREADS) shift_mix_kernel(ShiftMix<E> p) {
  __shared__ MomentScratch<ROWS + 1> scratch;
  __shared__ Places<ROWS> places;
  const int64_t run = (int64_t)blockIdx.x * ROWS;
  float u[ROWS + 1][V][VECTOR], d[ROWS][V][VECTOR];  // u[0]: the row before the run
#pragma unroll
  for (int row = 0; row <= ROWS; row++) {
    const int64_t t = run + row - 1;
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
      for (int i = 0; i < VECTOR; i++) u[row][v][i] = 0.0f;
      if (t >= 0 && t < p.rows && vector_channel(v) < p.channels)
        load8(p.x + t * p.channels + vector_channel(v), u[row][v]);
    }
  }
  float weight[V][VECTOR], bias[V][VECTOR], share[V][VECTOR];  // on their way while the moments are summed up
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int64_t c = vector_channel(v);
    if (c >= p.channels) continue;
    load8(p.weight + c, weight[v]);
    load8(p.bias + c, bias[v]);
    if (p.mix_count) load8(p.mixes + c, share[v]);
  }
  places.find(p, run);
  Moments m[ROWS + 1];
  register_moments(u, p.channels, p.eps, scratch, m);  // its barriers complete `places`

#pragma unroll
  for (int v = 0; v < V; v++) {
    const int64_t c = vector_channel(v);
    if (c >= p.channels) continue;
#pragma unroll
    for (int row = 0; row <= ROWS; row++)
#pragma unroll
      for (int i = 0; i < VECTOR; i++) u[row][v][i] = m[row].normalised(u[row][v][i], weight[v][i], bias[v][i]);
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      const bool inside = places.segment[row] >= 0;
      float before[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; i++) before[i] = u[row][v][i];
      if (inside && places.first[row] == run + row)
        load8(p.shift + places.segment[row] * p.shift_stride + c, before);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) d[row][v][i] = inside ? before[i] - u[row + 1][v][i] : 0.0f;
    }
  }

  for (int64_t mix = 0; mix < p.mix_count; mix++) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int64_t c = vector_channel(v);
      if (c >= p.channels) continue;
      float now[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; i++) now[i] = share[v][i];
      if (mix + 1 < p.mix_count) load8(p.mixes + (mix + 1) * p.channels + c, share[v]);
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        if (run + row >= p.rows) continue;
        float out[VECTOR];
#pragma unroll
        for (int i = 0; i < VECTOR; i++) out[i] = fmaf(d[row][v][i], now[i], u[row + 1][v][i]);
        store8(p.mixed + (mix * p.rows + run + row) * p.channels + c, out);
      }
    }
  }

  // A segment's shift row is read and written by the block of its first row alone: each thread its own channels, above
  // and here. `late`: the segment that begins in this run and ends after it; its last row has not been seen yet.
  int late = -1;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    if (run + row >= p.rows) continue;
    const int segment = places.segment[row], end = places.end[row];
    if (segment >= 0 && places.first[row] >= run && end > run + ROWS) late = row;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int64_t c = vector_channel(v), at = (run + row) * p.channels + c;
      if (c >= p.channels) continue;
      if (p.u) {
        store8(p.u + at, u[row + 1][v]);
        store8(p.d + at, d[row][v]);
      }
      if (segment >= 0 && places.first[row] >= run && end == run + row + 1)
        store8(p.shift + segment * p.shift_stride + c, u[row + 1][v]);
    }
  }
  if (late < 0) return;
  __shared__ MomentScratch<1> late_scratch;
  const float* last = p.x + (int64_t)(places.end[late] - 1) * p.channels;
  float x[1][V][VECTOR];
#pragma unroll
  for (int v = 0; v < V; v++) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[0][v][i] = 0.0f;
    if (vector_channel(v) < p.channels) load8(last + vector_channel(v), x[0][v]);
  }
  Moments of_last[1];
  register_moments(x, p.channels, p.eps, late_scratch, of_last);
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int64_t c = vector_channel(v);
    if (c >= p.channels) continue;
    float weight[VECTOR], bias[VECTOR];
    load8(p.weight + c, weight);
    load8(p.bias + c, bias);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[0][v][i] = of_last[0].normalised(x[0][v][i], weight[i], bias[i]);
    store8(p.shift + places.segment[late] * p.shift_stride + c, x[0][v]);
  }
}

// For rows that do not fit the registers, or do not divide into vectors: one row to a block, read where it lies.
template <class E, int WIDTH>
__global__ void __launch_bounds__(MOST_ROW_THREADS, 1) long_shift_mix_kernel(ShiftMix<E> p) {
  __shared__ MomentScratch<1> scratch[3];
  __shared__ Places<1> places;
  const int64_t t = blockIdx.x, step = (int64_t)blockDim.x * WIDTH;
  const float* row = p.x + t * p.channels;
  places.find(p, t);
  const Moments m = memory_moments<float, WIDTH>(row, p.channels, p.eps, scratch[0]);
  const int segment = places.segment[0];
  const bool inside = segment >= 0, begins = inside && places.first[0] == t;
  const float* last = begins ? p.x + (int64_t)(places.end[0] - 1) * p.channels : row;
  float* shift = p.shift + (inside ? segment : 0) * p.shift_stride;
  Moments of_before = {}, of_last = {};
  if (inside && !begins) of_before = memory_moments<float, WIDTH>(row - p.channels, p.channels, p.eps, scratch[1]);
  if (begins) of_last = memory_moments<float, WIDTH>(last, p.channels, p.eps, scratch[2]);

  for (int64_t c = (int64_t)threadIdx.x * WIDTH; c < p.channels; c += step) {
    float u[WIDTH], d[WIDTH], weight[WIDTH], bias[WIDTH], other[WIDTH] = {};
    load_width(row + c, u);
    load_width(p.weight + c, weight);
    load_width(p.bias + c, bias);
    if (inside) load_width(begins ? shift + c : row - p.channels + c, other);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      u[i] = m.normalised(u[i], weight[i], bias[i]);
      const float before = begins ? other[i] : of_before.normalised(other[i], weight[i], bias[i]);
      d[i] = inside ? before - u[i] : 0.0f;
    }
    for (int64_t mix = 0; mix < p.mix_count; mix++) {
      float out[WIDTH];
      load_width(p.mixes + mix * p.channels + c, out);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) out[i] = fmaf(d[i], out[i], u[i]);
      store_width(p.mixed + (mix * p.rows + t) * p.channels + c, out);
    }
    if (p.u) {
      store_width(p.u + t * p.channels + c, u);
      store_width(p.d + t * p.channels + c, d);
    }
    if (begins) {
      load_width(last + c, other);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) other[i] = of_last.normalised(other[i], weight[i], bias[i]);
      store_width(shift + c, other);
    }
  }
}

template <class E> int launch(const ShiftMix<E>& p, void* stream) {
  const int held = register_vectors(p.channels);
  if (held == 0) {
    const bool vectors = p.channels % VECTOR == 0;
    auto kernel = vectors ? long_shift_mix_kernel<E, VECTOR> : long_shift_mix_kernel<E, 1>;
    const dim3 block(row_threads(p.channels, vectors ? VECTOR : 1));
    return LAUNCH(kernel, dim3(unsigned(p.rows)), block, 0, stream, p);
  }
  const int run = p.rows <= FEW_ROWS || held == 2 ? 1 : 4;  // two rows of two vectors each would not fit the registers
  auto kernel = run == 4 ? shift_mix_kernel<E, 1, 4> : shift_mix_kernel<E, 1, 1>;
  if (held == 2) kernel = shift_mix_kernel<E, 2, 1>;
  const dim3 grid(unsigned((p.rows + run - 1) / run)), block(row_threads(p.channels, held * VECTOR));
  return LAUNCH(kernel, grid, block, 0, stream, p);
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// mixed[m] = u + d * mixes[m] with u = norm(x) and d = (u of the row before) - u, 0 outside all segments. shift:
// float32, a row for each segment, which becomes the segment's last u.
extern "C" int rwkvmpi_cuda_shift_mix(const float* x, const float* weight, const float* bias, float* shift,
                                      const float* mixes, const int32_t* rows, void* mixed, float* u, float* d,
                                      int64_t shift_stride, int64_t mix_count, int64_t count, int64_t channels,
                                      int64_t segments, float eps, int dtype, int device, void* stream) {
  CHECK(count >= 0 && mix_count >= 0 && segments >= 0 && channels > 0, BAD_SIZE);
  CHECK(count <= INT32_MAX && channels <= INT32_MAX && segments <= INT32_MAX && mix_count <= INT32_MAX, BAD_SIZE);
  CHECK(mix_count == 0 || count <= INT64_MAX / 8 / channels / mix_count, BAD_SIZE);
  if (count == 0) return OK;
  CHECK(x && weight && bias && !u == !d, BAD_POINTER);
  CHECK((mixes && mixed) || mix_count == 0, BAD_POINTER);
  CHECK((shift && rows) || segments == 0, BAD_POINTER);
  CHECK(segments <= 1 || (shift_stride >= channels && shift_stride <= INT64_MAX / 8 / segments), BAD_STRIDE);
  const bool vectors = channels % VECTOR == 0;
  CHECK(all_on(vectors ? 16 : 4, {x, weight, bias, mixes, shift, u, d}) && all_on(4, {rows}), MISALIGNED);
  CHECK(!vectors || segments <= 1 || shift_stride % 4 == 0, MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(vectors ? 16 : sizeof(E), {mixed}), MISALIGNED);
    return launch(ShiftMix<E>{x, weight, bias, shift, mixes, rows, (E*)mixed, u, d, shift_stride, mix_count, count,
                              channels, segments, eps},
                  stream);
  });
}
