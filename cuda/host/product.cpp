// The product with its epilogues.
#include "product.h"

#include "functions.h"
#include "record.h"

using namespace rwkv;

namespace {

enum Op { NONE, TANH, SIGMOID, RELU_SQUARED, ADD, GATED_ADD, MIX };

struct Epilogue final : Receiver {
  int64_t outputs;
  int op, out_bf16;
  void* out;
  const float *gate, *u, *d, *mix;

  template <class T, class F> void each(T* to, int64_t row, int64_t count, int64_t first, int64_t n,
                                        const float* sums, int64_t stride, F f) const {
    for (int64_t t = row; t < row + count; t++, sums += stride) {
      const int64_t at = t * outputs + first;
      if (n == PANEL) {
        for (int64_t i = 0; i < PANEL; i += LANES)
          store(to + at + i, f(load(sums + i), at + i, first + i, (int64_t)LANES));
      } else {
        for (int64_t i = 0; i < n; i += LANES) store(to + at + i, f(load(sums + i), at + i, first + i, n - i), n - i);
      }
    }
  }

  template <class T> void take(T* to, int64_t row, int64_t count, int64_t panel, const float* sums,
                               int64_t stride) const {
    const int64_t first = panel * PANEL, n = outputs - first < PANEL ? outputs - first : PANEL;
    const auto each = [&](auto f) { this->each(to, row, count, first, n, sums, stride, f); };
    switch (op) {
      case NONE: return each([](vf s, int64_t, int64_t, int64_t) { return s; });
      case TANH: return each([](vf s, int64_t, int64_t, int64_t) { return rwkv::tanh(s); });
      case SIGMOID: return each([](vf s, int64_t, int64_t, int64_t) { return sigmoid(s); });
      case RELU_SQUARED: return each([](vf s, int64_t, int64_t, int64_t) { return relu_squared(s); });
      case ADD: return each([&](vf s, int64_t at, int64_t, int64_t left) { return load(to + at, left) + s; });
      case GATED_ADD:
        return each([&](vf s, int64_t at, int64_t, int64_t left) {
          return fma(sigmoid(load(gate + at, left)), s, load(to + at, left));
        });
      case MIX:
        return each([&](vf s, int64_t at, int64_t column, int64_t left) {
          return fma(load(d + at, left), load(mix + column, left) + s, load(u + at, left));
        });
    }
  }

  void take(int64_t row, int64_t count, int64_t panel, int64_t panels, const float* sums,
            int64_t stride) const override {
    for (int64_t p = panel; p < panel + panels; p++, sums += PANEL)
      if (out_bf16)
        take((bf16*)out, row, count, p, sums, stride);
      else
        take((float*)out, row, count, p, sums, stride);
  }
};

}  // namespace

// out [rows, outputs] = op(x w^T); x: `rows` rows of `inputs` elements, `x_stride` apart; float for kind FLOAT32, else
// bfloat16. data: packed weights (product.h). gate, u, d: [rows, outputs]; mix: [outputs].
RWKV_API void rwkvmpi_product(int kind, const void* x, int64_t x_stride, int64_t rows, const void* data,
                              int64_t outputs, int64_t inputs, int op, void* out, int out_bf16, const float* gate,
                              const float* u, const float* d, const float* mix, int threads) {
  Epilogue epilogue;
  epilogue.outputs = outputs;
  epilogue.op = op;
  epilogue.out_bf16 = out_bf16;
  epilogue.out = out;
  epilogue.gate = gate;
  epilogue.u = u;
  epilogue.d = d;
  epilogue.mix = mix;
  if (op == NONE && !out_bf16) {
    epilogue.place = (float*)out;
    epilogue.place_stride = outputs;
  }
  multiply({x, x_stride, rows, nullptr}, {kind, outputs, inputs, (const char*)data}, epilogue, 1, threads);
}
RWKV_RECORDABLE(rwkvmpi_product)
