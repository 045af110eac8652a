// Symmetric quantisation to int8 and back: q = round(x * (127 / most)), x = about q * (most / 127), where `most` is the
// largest magnitude. No operation here can be contracted or reordered, so every build gives the same bits.
#pragma once
#include <limits>

#include "functions.h"
#include "product.h"

namespace rwkv {

struct QuantiserOf {
  float scale, inverse;
};
// From the bits of the largest magnitude. Too small for a normal scale: 0 and 0. NaN or Inf: NaN and 0, so that the
// product shows it.
RWKV_INLINE QuantiserOf quantiser(int32_t most_bits) {
  float most;
  std::memcpy(&most, &most_bits, sizeof most);
  if (most_bits >= 0x7f800000) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const float scale = most / 127.0f;
  if (!(scale >= std::numeric_limits<float>::min())) return {0.0f, 0.0f};
  return {scale, 127.0f / most};
}

// Round to nearest, ties to even, of |x| < 2^22.
RWKV_INLINE vi nearest(vf x) { return as_int(x + splat(ROUND)) - as_int(splat(ROUND)); }

typedef int8_t vb __attribute__((vector_size(LANES)));

// The bits of the largest magnitude of n numbers.
inline int32_t most_bits(const bf16* x, int64_t n) {
  typedef int16_t words __attribute__((vector_size(64)));
  words most = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    words bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fff;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < 32; lane++) largest = most[lane] > largest ? most[lane] : largest;
  for (; i < n; i++) largest = (x[i].bits & 0x7fff) > largest ? x[i].bits & 0x7fff : largest;
  return largest << 16;
}

// Quantises n numbers of a row into whole words, plus `offset`; the last word's rest stands for 0. Returns the scale.
inline float quantise(const bf16* x, int64_t n, int32_t offset, int8_t* q) {
  const QuantiserOf by = quantiser(most_bits(x, n));
  const int64_t padded = (n + 3) / 4 * 4;
  if (by.inverse == 0.0f) {  // what is not finite is not rounded: to what would be the compiler's affair
    std::memset(q, offset, padded);
    return by.scale;
  }
  const auto bytes = [&](vf some) { return __builtin_convertvector(nearest(some * splat(by.inverse)) + offset, vb); };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vb some = bytes(load(x + i));
    std::memcpy(q + i, &some, sizeof some);
  }
  if (i < padded) {
    const vb some = bytes(i < n ? load(x + i, n - i) : vf{});
    std::memcpy(q + i, &some, padded - i);
  }
  return by.scale;
}

// A panel's int32 sums over `rows` quantised rows, plus `offset` times each channel's weights, become floats.
inline void dequantise(const float* sums, int64_t stride, int64_t rows, const float* row_scales, const float* scales,
                       const int32_t* channel_sums, int32_t offset, float* out, int64_t out_stride) {
  constexpr int V = PANEL / LANES;
  vu excess[V];
  vf scale[V];
  for (int v = 0; v < V; v++) {
    std::memcpy(&excess[v], channel_sums + v * LANES, sizeof excess[v]);
    excess[v] *= (uint32_t)offset;
    scale[v] = load(scales + v * LANES);
  }
  for (int64_t i = 0; i < rows; i++)
    for (int v = 0; v < V; v++) {
      vu sum;
      std::memcpy(&sum, sums + i * stride + v * LANES, sizeof sum);
      store(out + i * out_stride + v * LANES,
            __builtin_convertvector((vi)(sum - excess[v]), vf) * (splat(row_scales[i]) * scale[v]));
    }
}

}  // namespace rwkv
