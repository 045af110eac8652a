// What happens element by element between the large products, and the check that a state still is numbers.
//   Bytes of an element: activate 2 sizeof(E); gated_add 8 + 2 sizeof(E); mix 8 + 2 sizeof(E); all_finite sizeof(E);
//   convert: both types' sizes.
#include "activations.cuh"
#include "rows.cuh"

namespace rwkv {
namespace {

constexpr int THREADS = 256;
constexpr int TOGETHER = 2;  // vectors of a thread, both on their way before the first is used
constexpr int64_t MOST = INT64_MAX / 16;  // elements

// An operation has Values<WIDTH>, load(at, Values<WIDTH>&) and finish(at, Values<WIDTH>&) for WIDTH elements from `at`.
template <int WIDTH, class Op> __global__ void __launch_bounds__(THREADS, 3) elements_kernel(Op op, int64_t count) {
  const int64_t first = (int64_t)blockIdx.x * (THREADS * TOGETHER) + threadIdx.x;
  typename Op::template Values<WIDTH> values[TOGETHER];
#pragma unroll
  for (int i = 0; i < TOGETHER; i++) {
    const int64_t at = (first + i * THREADS) * WIDTH;
    if (at + WIDTH <= count) op.load(at, values[i]);
  }
#pragma unroll
  for (int i = 0; i < TOGETHER; i++) {
    const int64_t at = (first + i * THREADS) * WIDTH;
    if (at + WIDTH <= count) {
      op.finish(at, values[i]);
    } else {
      for (int64_t one = at; one < count; one++) {
        typename Op::template Values<1> value;
        op.load(one, value);
        op.finish(one, value);
      }
    }
  }
}

// `vectors`: whether all pointers lie on 16 bytes. An element's bits are the same either way.
template <class Op> int launch(const Op& op, int64_t count, bool vectors, int device, void* stream) {
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  const int64_t per_block = THREADS * TOGETHER * (vectors ? VECTOR : 1), blocks = (count + per_block - 1) / per_block;
  CHECK(blocks <= INT32_MAX, BAD_SIZE);
  auto kernel = vectors ? elements_kernel<VECTOR, Op> : elements_kernel<1, Op>;
  return LAUNCH(kernel, dim3(unsigned(blocks)), dim3(THREADS), 0, stream, op, count);
}

template <class E> struct Activate {
  E* x;
  int op;
  float scale;
  template <int WIDTH> struct Values {
    float x[WIDTH];
  };
  template <int WIDTH> __device__ void load(int64_t at, Values<WIDTH>& v) const { load_width(x + at, v.x); }
  template <int WIDTH> __device__ void finish(int64_t at, Values<WIDTH>& v) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v.x[i] = activated(op, v.x[i] * scale);
    store_width(x + at, v.x);
  }
};

template <class E> struct GatedAdd {
  float* x;
  const E *product, *gate;
  float scale;
  template <int WIDTH> struct Values {
    float x[WIDTH], product[WIDTH], gate[WIDTH];
  };
  template <int WIDTH> __device__ void load(int64_t at, Values<WIDTH>& v) const {
    load_width(x + at, v.x);
    load_width(product + at, v.product);
    load_width(gate + at, v.gate);
  }
  template <int WIDTH> __device__ void finish(int64_t at, Values<WIDTH>& v) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v.x[i] = fmaf(sigmoid(v.gate[i]), v.product[i] * scale, v.x[i]);
    store_width(x + at, v.x);
  }
};

template <class E> struct Mix {
  E* out;
  const E* product;
  const float *u, *d, *weight;
  int64_t channels;
  template <int WIDTH> struct Values {
    float product[WIDTH], u[WIDTH], d[WIDTH];
  };
  template <int WIDTH> __device__ void load(int64_t at, Values<WIDTH>& v) const {
    load_width(product + at, v.product);
    load_width(u + at, v.u);
    load_width(d + at, v.d);
  }
  template <int WIDTH> __device__ void finish(int64_t at, Values<WIDTH>& v) const {
    float share[WIDTH];
    load_width(weight + at % channels, share);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) v.u[i] = fmaf(v.d[i], share[i] + v.product[i], v.u[i]);
    store_width(out + at, v.u);
  }
};

template <class E> struct AllFinite {
  const E* x;
  int32_t* flag;
  template <int WIDTH> struct Values {
    float x[WIDTH];
  };
  template <int WIDTH> __device__ void load(int64_t at, Values<WIDTH>& v) const { load_width(x + at, v.x); }
  template <int WIDTH> __device__ void finish(int64_t, Values<WIDTH>& v) const {
    float zero = 0.0f;  // stays 0 unless a factor is NaN or Inf
#pragma unroll
    for (int i = 0; i < WIDTH; i++) zero = fmaf(v.x[i], 0.0f, zero);
    if (zero != 0.0f) atomicMax(flag, 1);
  }
};

template <class From, class To> struct Convert {
  const From* x;
  To* out;
  template <int WIDTH> struct Values {
    float x[WIDTH];
  };
  template <int WIDTH> __device__ void load(int64_t at, Values<WIDTH>& v) const { load_width(x + at, v.x); }
  template <int WIDTH> __device__ void finish(int64_t at, Values<WIDTH>& v) const { store_width(out + at, v.x); }
};

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// x, `count` of `dtype`, becomes op(scale * x).
extern "C" int rwkvmpi_cuda_activate(void* x, int64_t count, int op, float scale, int dtype, int device, void* stream) {
  CHECK(count >= 0 && count <= MOST, BAD_SIZE);
  CHECK(op >= NONE && op <= RELU_SQUARED, UNSUPPORTED);
  if (count == 0) return OK;
  CHECK(x, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(sizeof(E), {x}), MISALIGNED);
    return launch(Activate<E>{(E*)x, op, scale}, count, all_on(16, {x}), device, stream);
  });
}

// x += sigmoid(gate) * scale * product; x: float32 [rows, channels], the others the same in `dtype`.
extern "C" int rwkvmpi_cuda_gated_add(float* x, const void* product, const void* gate, int64_t rows, int64_t channels,
                                      float scale, int dtype, int device, void* stream) {
  CHECK(rows >= 0 && channels > 0 && rows <= MOST / channels, BAD_SIZE);
  if (rows == 0) return OK;
  CHECK(x && product && gate, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(4, {x}) && all_on(sizeof(E), {product, gate}), MISALIGNED);
    const GatedAdd<E> op = {x, (const E*)product, (const E*)gate, scale};
    return launch(op, rows * channels, all_on(16, {x, product, gate}), device, stream);
  });
}

// out = u + d * (weight + product); out and product: [rows, channels] in `dtype`; u, d: float32 the same; weight:
// float32 [channels].
extern "C" int rwkvmpi_cuda_mix(void* out, const void* product, const float* u, const float* d, const float* weight,
                                int64_t rows, int64_t channels, int dtype, int device, void* stream) {
  CHECK(rows >= 0 && channels > 0 && rows <= MOST / channels, BAD_SIZE);
  if (rows == 0) return OK;
  CHECK(out && product && u && d && weight, BAD_POINTER);
  CHECK(all_on(4, {u, d, weight}), MISALIGNED);
  const bool vectors = channels % VECTOR == 0 && all_on(16, {out, product, u, d, weight});
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(sizeof(E), {out, product}), MISALIGNED);
    const Mix<E> op = {(E*)out, (const E*)product, u, d, weight, channels};
    return launch(op, rows * channels, vectors, device, stream);
  });
}

// *flag becomes 1 if one of `count` values of x is NaN or Inf, and stays what it is otherwise.
extern "C" int rwkvmpi_cuda_all_finite(const void* x, int32_t* flag, int64_t count, int dtype, int device,
                                       void* stream) {
  CHECK(count >= 0 && count <= MOST, BAD_SIZE);
  if (count == 0) return OK;
  CHECK(x && flag, BAD_POINTER);
  return dispatch_dtype(dtype, [&](auto tag) -> int {
    using E = typename decltype(tag)::type;
    CHECK(all_on(sizeof(E), {x}) && all_on(4, {flag}), MISALIGNED);
    return launch(AllFinite<E>{(const E*)x, flag}, count, all_on(16, {x}), device, stream);
  });
}

// out[i] = x[i], rounded to the nearest even where the other type is narrower; float16 ends at +-65504.
extern "C" int rwkvmpi_cuda_convert(const void* x, void* out, int64_t count, int from_dtype, int to_dtype, int device,
                                    void* stream) {
  CHECK(count >= 0 && count <= MOST, BAD_SIZE);
  if (count == 0) return OK;
  CHECK(x && out, BAD_POINTER);
  return dispatch_dtype(from_dtype, [&](auto from) {
    return dispatch_dtype(to_dtype, [&](auto to) -> int {
      using From = typename decltype(from)::type;
      using To = typename decltype(to)::type;
      CHECK(all_on(sizeof(From), {x}) && all_on(sizeof(To), {out}), MISALIGNED);
      return launch(Convert<From, To>{(const From*)x, (To*)out}, count, all_on(16, {x, out}), device, stream);
    });
  });
}
