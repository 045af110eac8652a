// Layer norm, and the embedding with or without one. A block is a row.
//   layer_norm: 4 C bytes in, sizeof(E) C out; embed: a table's row in, 4 C out. Weight and bias stay in the cache.
#include "rows.cuh"

namespace rwkv {
namespace {

template <class In, class Out> struct Norm {
  const In* x;         // [rows of x, channels]
  const void* tokens;  // null: row t is row t of x
  int tokens64;
  int64_t vocabulary;          // rows of x, where there are tokens
  const float *weight, *bias;  // both null: the rows as they are
  Out* out;
  int64_t rows, channels;
  float eps;

  // The row of x that belongs to row t, null where the token is outside the vocabulary.
  __device__ const In* source(int64_t t) const {
    if (!tokens) return x + t * channels;
    const int64_t token = tokens64 ? ((const int64_t*)tokens)[t] : ((const int32_t*)tokens)[t];
    return token >= 0 && token < vocabulary ? x + token * channels : nullptr;
  }
};

template <class In, class Out, int V> __global__ void __launch_bounds__(MOST_ROW_THREADS) norm_kernel(Norm<In, Out> p) {
  __shared__ MomentScratch<1> scratch;
  const In* in = p.source(blockIdx.x);
  Out* out = p.out + blockIdx.x * p.channels;
  float x[1][V][VECTOR], weight[V][VECTOR], bias[V][VECTOR];
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int64_t c = vector_channel(v);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[0][v][i] = 0.0f;
    if (!in || c >= p.channels) continue;
    load8(in + c, x[0][v]);
    if (!p.weight) continue;
    load8(p.weight + c, weight[v]);
    load8(p.bias + c, bias[v]);
  }
  if (in && p.weight) {
    Moments m[1];
    register_moments(x, p.channels, p.eps, scratch, m);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (vector_channel(v) >= p.channels) continue;
#pragma unroll
      for (int i = 0; i < VECTOR; i++) x[0][v][i] = m[0].normalised(x[0][v][i], weight[v][i], bias[v][i]);
    }
  }
#pragma unroll
  for (int v = 0; v < V; v++)
    if (vector_channel(v) < p.channels) store8(out + vector_channel(v), x[0][v]);
}

// For rows that do not fit the registers, or do not divide into vectors.
template <class In, class Out, int WIDTH>
__global__ void __launch_bounds__(MOST_ROW_THREADS) long_norm_kernel(Norm<In, Out> p) {
  __shared__ MomentScratch<1> scratch;
  const In* in = p.source(blockIdx.x);
  Out* out = p.out + blockIdx.x * p.channels;
  const int64_t step = (int64_t)blockDim.x * WIDTH;
  Moments m = {};
  if (in && p.weight) m = memory_moments<In, WIDTH>(in, p.channels, p.eps, scratch);
  for (int64_t c = (int64_t)threadIdx.x * WIDTH; c < p.channels; c += step) {
    float x[WIDTH] = {};
    if (in) load_width(in + c, x);
    if (in && p.weight) {
      float weight[WIDTH], bias[WIDTH];
      load_width(p.weight + c, weight);
      load_width(p.bias + c, bias);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) x[i] = m.normalised(x[i], weight[i], bias[i]);
    }
    store_width(out + c, x);
  }
}

template <class In, class Out> int launch(const Norm<In, Out>& p, int device, void* stream) {
  CHECK(p.rows >= 0 && p.channels > 0 && p.rows <= INT32_MAX && p.channels <= INT32_MAX, BAD_SIZE);
  if (p.rows == 0) return OK;
  CHECK(p.x && p.out && !p.weight == !p.bias, BAD_POINTER);
  const bool vectors = p.channels % VECTOR == 0;
  CHECK(all_on(vectors ? 16 : sizeof(In), {p.x}) && all_on(vectors ? 16 : sizeof(Out), {p.out}), MISALIGNED);
  CHECK(all_on(vectors ? 16 : sizeof(float), {p.weight, p.bias}), MISALIGNED);
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const int held = register_vectors(p.channels);
  auto kernel = held == 1   ? norm_kernel<In, Out, 1>
                : held == 2 ? norm_kernel<In, Out, 2>
                : vectors   ? long_norm_kernel<In, Out, VECTOR>
                            : long_norm_kernel<In, Out, 1>;
  const int64_t width = held ? held * VECTOR : vectors ? VECTOR : 1;
  return LAUNCH(kernel, dim3(unsigned(p.rows)), dim3(row_threads(p.channels, width)), 0, stream, p);
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// x: float32 [rows, channels]; out the same in `dtype`.
extern "C" int rwkvmpi_cuda_layer_norm(const float* x, const float* weight, const float* bias, void* out, int64_t rows,
                                       int64_t channels, float eps, int dtype, int device, void* stream) {
  CHECK(rows == 0 || (weight && bias), BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    return launch(Norm<float, E>{x, nullptr, 0, 0, weight, bias, (E*)out, rows, channels, eps}, device, stream);
  });
}

// x[t], float32 [count, channels] = row tokens[t] of the table [vocabulary, channels], normalised where weight is not
// null; 0 for a token outside the vocabulary.
extern "C" int rwkvmpi_cuda_embed(const void* tokens, int tokens64, const void* table, int table_dtype,
                                  const float* weight, const float* bias, float* x, int64_t count, int64_t vocabulary,
                                  int64_t channels, float eps, int device, void* stream) {
  CHECK(vocabulary >= 0 && vocabulary <= INT32_MAX, BAD_SIZE);
  CHECK(count == 0 || tokens, BAD_POINTER);
  CHECK(all_on(tokens64 ? 8 : 4, {tokens}), MISALIGNED);
  return dispatch_dtype(table_dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const Norm<E, float> p = {(const E*)table, tokens, tokens64, vocabulary, weight, bias, x, count, channels, eps};
    return launch(p, device, stream);
  });
}
