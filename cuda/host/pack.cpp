// Weights into the panels of product.h.
#include "functions.h"
#include "parallel.h"
#include "product.h"
#include "product_quantise.h"

using namespace rwkv;

namespace {

enum SourceType { FROM_FLOAT32, FROM_BFLOAT16, FROM_FLOAT16 };

struct half {
  uint16_t bits;
};

RWKV_INLINE float as_float(float x) { return x; }
RWKV_INLINE float as_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// Exact, also where the processor flushes denormal floats: a denormal half is a normal float.
RWKV_INLINE float as_float(half x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = (float)fraction * 0x1p-24f;
  const uint32_t bits = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  if (exponent) std::memcpy(&value, &bits, sizeof value);
  return x.bits & 0x8000 ? -value : value;
}

constexpr int64_t PIECE = 64;  // inputs read at a time

struct Weights {
  const void* data;
  int type;
  int64_t output_stride, input_stride;  // in elements

  template <class T> void read_as(int64_t output, int64_t outputs, int64_t input, int64_t inputs, float* to) const {
    const T* from = (const T*)data + output * output_stride + input * input_stride;
    if (input_stride == 1)
      for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < inputs; k++) to[n * PIECE + k] = as_float(from[n * output_stride + k]);
    else
      for (int64_t k = 0; k < inputs; k++)
        for (int64_t n = 0; n < outputs; n++)
          to[n * PIECE + k] = as_float(from[n * output_stride + k * input_stride]);
  }
  // to[PANEL][PIECE]: what lies beyond `outputs` or `inputs` is 0.
  void read(int64_t output, int64_t outputs, int64_t input, int64_t inputs, float* to) const {
    if (outputs < PANEL || inputs < PIECE) std::memset(to, 0, PANEL * PIECE * sizeof(float));
    if (type == FROM_FLOAT32)
      read_as<float>(output, outputs, input, inputs, to);
    else if (type == FROM_BFLOAT16)
      read_as<bf16>(output, outputs, input, inputs, to);
    else
      read_as<half>(output, outputs, input, inputs, to);
  }
};

// f(first input, groups) after `piece` [PANEL][PIECE] was read, for all inputs of one panel.
template <class F>
void pieces(const Weights& from, const PackedWeights& w, int64_t panel, float* piece, F f) {
  const int64_t first = panel * PANEL, outputs = w.outputs - first < PANEL ? w.outputs - first : PANEL;
  for (int64_t k = 0; k < w.inputs; k += PIECE) {
    const int64_t inputs = w.inputs - k < PIECE ? w.inputs - k : PIECE, size = group_size(w.kind);
    from.read(first, outputs, k, inputs, piece);
    f(k / size, (inputs + size - 1) / size);
  }
}

void pack_float32(const Weights& from, const PackedWeights& w, int64_t panel, float* to) {
  float piece[PANEL * PIECE];
  pieces(from, w, panel, piece, [&](int64_t first, int64_t groups) {
    for (int64_t k = 0; k < groups; k++)
      for (int64_t n = 0; n < PANEL; n++) to[(first + k) * PANEL + n] = piece[n * PIECE + k];
  });
}

void pack_bfloat16(const Weights& from, const PackedWeights& w, int64_t panel, uint32_t* to) {
  float piece[PANEL * PIECE];
  bf16 narrow[PANEL * PIECE];
  pieces(from, w, panel, piece, [&](int64_t first, int64_t groups) {
    for (int64_t i = 0; i < PANEL * PIECE; i += LANES) store(narrow + i, load(piece + i));
    for (int64_t g = 0; g < groups; g++)
      for (int64_t n = 0; n < PANEL; n++)
        std::memcpy(to + (first + g) * PANEL + n, narrow + n * PIECE + 2 * g, sizeof *to);
  });
}

void pack_int8(const Weights& from, const PackedWeights& w, int64_t panel, uint32_t* to, float* scales,
               int32_t* sums) {
  float piece[PANEL * PIECE];
  float most[PANEL] = {};
  pieces(from, w, panel, piece, [&](int64_t, int64_t) {
    for (int64_t n = 0; n < PANEL; n++) {
      Wide largest_of = {};
      for (int64_t k = 0; k < PIECE; k += LANES)
        largest_of.part[0] = larger(magnitude(load(piece + n * PIECE + k)), largest_of.part[0]);
      const float found = largest(largest_of);
      most[n] = found > most[n] ? found : most[n];
    }
  });
  QuantiserOf by[PANEL];
  for (int64_t n = 0; n < PANEL; n++) {
    int32_t bits;
    std::memcpy(&bits, most + n, sizeof bits);
    by[n] = quantiser(bits);
    scales[n] = by[n].scale;
    sums[n] = 0;
  }
  pieces(from, w, panel, piece, [&](int64_t first, int64_t groups) {
    for (int64_t n = 0; n < PANEL; n++) {
      int32_t q[PIECE];
      for (int64_t k = 0; k < PIECE; k += LANES) {
        const vi rounded = nearest(load(piece + n * PIECE + k) * splat(by[n].inverse));
        std::memcpy(q + k, &rounded, sizeof rounded);
      }
      for (int64_t g = 0; g < groups; g++) {
        uint32_t word = 0;
        for (int j = 0; j < 4; j++) {
          sums[n] += q[4 * g + j];
          word |= (uint32_t)(uint8_t)q[4 * g + j] << 8 * j;
        }
        to[(first + g) * PANEL + n] = word;
      }
    }
  });
}

}  // namespace

// weights: [outputs, inputs] with the given strides (in elements), finite; source_type: 0 float, 1 bfloat16, 2 float16.
// out: 64-byte aligned, as product.h describes it.
RWKV_API void rwkvmpi_pack(int kind, const void* weights, int source_type, int64_t output_stride, int64_t input_stride,
                           int64_t outputs, int64_t inputs, void* out, int threads) {
  const Weights from = {weights, source_type, output_stride, input_stride};
  const PackedWeights w = {kind, outputs, inputs, (const char*)out};
  parallel_ranges(w.panels(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      void* to = (void*)w.panel(p);
      if (kind == FLOAT32)
        pack_float32(from, w, p, (float*)to);
      else if (kind == BFLOAT16)
        pack_bfloat16(from, w, p, (uint32_t*)to);
      else
        pack_int8(from, w, p, (uint32_t*)to, (float*)w.scales() + p * PANEL, (int32_t*)w.sums() + p * PANEL);
    }
  });
}
