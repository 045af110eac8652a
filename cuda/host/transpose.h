// A square tile of LANES x LANES floats to its transpose, in registers.
#pragma once
#include "vec.h"

namespace rwkv {

#if defined(__AVX512F__)
RWKV_INLINE vf low_32(vf a, vf b) { return (vf)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
RWKV_INLINE vf high_32(vf a, vf b) { return (vf)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
RWKV_INLINE vf low_64(vf a, vf b) { return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
RWKV_INLINE vf high_64(vf a, vf b) { return (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
// the even and the odd quarters of a, then those of b
RWKV_INLINE vf even_quarters(vf a, vf b) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); }
RWKV_INLINE vf odd_quarters(vf a, vf b) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd); }
#elif defined(__AVX2__) && defined(__FMA__)
RWKV_INLINE vf low_32(vf a, vf b) { return (vf)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
RWKV_INLINE vf high_32(vf a, vf b) { return (vf)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
RWKV_INLINE vf low_64(vf a, vf b) { return (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
RWKV_INLINE vf high_64(vf a, vf b) { return (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
RWKV_INLINE vf low_half(vf a, vf b) { return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20); }
RWKV_INLINE vf high_half(vf a, vf b) { return (vf)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); }
#else
RWKV_INLINE vf low_32(vf a, vf b) { return vf{a[0], b[0], a[1], b[1]}; }
RWKV_INLINE vf high_32(vf a, vf b) { return vf{a[2], b[2], a[3], b[3]}; }
RWKV_INLINE vf low_64(vf a, vf b) { return vf{a[0], a[1], b[0], b[1]}; }
RWKV_INLINE vf high_64(vf a, vf b) { return vf{a[2], a[3], b[2], b[3]}; }
#endif

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < LANES
RWKV_INLINE void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  vf x[LANES];
  for (int i = 0; i < LANES; i++) x[i] = load(from + i * from_stride);
  // every 4 x 4 tile of a quarter: afterwards quarter q of x[i + c] holds column 4 q + c of the rows i .. i + 3
  for (int i = 0; i < LANES; i += 4) {
    const vf a = low_32(x[i], x[i + 1]), b = high_32(x[i], x[i + 1]);
    const vf c = low_32(x[i + 2], x[i + 3]), d = high_32(x[i + 2], x[i + 3]);
    x[i] = low_64(a, c);
    x[i + 1] = high_64(a, c);
    x[i + 2] = low_64(b, d);
    x[i + 3] = high_64(b, d);
  }
  // then the quarters among each other
  for (int c = 0; c < 4; c++) {
    const auto put = [&](int column, vf value) { store(to + column * to_stride, value); };
#if defined(__AVX512F__)
    const vf even = even_quarters(x[c], x[4 + c]), odd = odd_quarters(x[c], x[4 + c]);
    const vf even_below = even_quarters(x[8 + c], x[12 + c]), odd_below = odd_quarters(x[8 + c], x[12 + c]);
    put(c, even_quarters(even, even_below));
    put(4 + c, even_quarters(odd, odd_below));
    put(8 + c, odd_quarters(even, even_below));
    put(12 + c, odd_quarters(odd, odd_below));
#elif defined(__AVX2__) && defined(__FMA__)
    put(c, low_half(x[c], x[4 + c]));
    put(4 + c, high_half(x[c], x[4 + c]));
#else
    put(c, x[c]);
#endif
  }
}

}  // namespace rwkv
