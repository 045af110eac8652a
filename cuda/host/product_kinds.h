// How each kind of weights is multiplied on this level of processor: the words that a row becomes, and one step of the
// sum. A group of inputs takes STEPS steps; each step is one word (4 bytes) of a row against one word of each of a
// register's outputs.
#pragma once
#include "product.h"

namespace rwkv {

typedef int16_t vs __attribute__((vector_size(LANES * 4)));

RWKV_INLINE vi load_words(const void* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RWKV_INLINE vi splat_word(const int32_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return vi{} + word;
}

struct Float32 {
  static constexpr int STEPS = 1;
  static constexpr bool IN_PLACE = true;
  static RWKV_INLINE vi weights(const char* p, int) { return load_words(p); }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) { return as_int(fma(as_float(w), as_float(x), as_float(sum))); }
  static void fill(int32_t* words, const float* row, int64_t n) { std::memcpy(words, row, n * sizeof(float)); }
};

// The n bfloat16 numbers of a row as ceil(n / 2) words; what lies behind the row is never read.
template <class F> RWKV_INLINE void for_pairs(const bf16* row, int64_t n, F f) {
  for (int64_t i = 0; i + 1 < n; i += 2) {
    uint32_t pair;
    std::memcpy(&pair, row + i, sizeof pair);
    f(i / 2, pair);
  }
  if (n % 2) f(n / 2, (uint32_t)row[n - 1].bits);
}

#if defined(__AVX512BF16__)
struct BFloat16 {
  static constexpr int STEPS = 1;
  static constexpr bool IN_PLACE = true;
  static RWKV_INLINE vi weights(const char* p, int) { return load_words(p); }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) {
    return (vi)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  static void fill(int32_t* words, const bf16* row, int64_t n) {
    std::memcpy(words, row, n / 2 * sizeof(int32_t));
    if (n % 2) words[n / 2] = row[n - 1].bits;
  }
};
#else
struct BFloat16 {  // the odd elements of the pairs, then the even ones, widened to float: the same bits as vdpbf16ps
  static constexpr int STEPS = 2;
  static constexpr bool IN_PLACE = false;
  static RWKV_INLINE vi weights(const char* p, int step) {
    const vi pairs = load_words(p);
    return step ? pairs << 16 : pairs & (int32_t)0xffff0000;
  }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) { return Float32::add(sum, w, x); }
  static void fill(int32_t* words, const bf16* row, int64_t n) {
    for_pairs(row, n, [&](int64_t i, uint32_t pair) {
      words[2 * i] = (int32_t)(pair & 0xffff0000);
      words[2 * i + 1] = (int32_t)(pair << 16);
    });
  }
};
#endif

// Rows of int8 arrive quantised, with OFFSET added, and padded to whole words.
#if defined(__AVX512VNNI__)
struct Int8 {
  static constexpr int STEPS = 1;
  static constexpr bool IN_PLACE = true;
  static constexpr int32_t OFFSET = 128;  // vpdpbusd wants one factor without sign
  static RWKV_INLINE vi weights(const char* p, int) { return load_words(p); }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
  static void fill(int32_t* words, const int32_t* row, int64_t n) { std::memcpy(words, row, n * sizeof(int32_t)); }
};
#elif defined(__SSE2__)
struct Int8 {  // inputs 0 and 2 of a group, then 1 and 3, widened to 16 bits
  static constexpr int STEPS = 2;
  static constexpr bool IN_PLACE = false;
  static constexpr int32_t OFFSET = 0;
  static RWKV_INLINE vi weights(const char* p, int step) {
    const vs pairs = (vs)load_words(p);
    return (vi)((step ? pairs : pairs << 8) >> 8);
  }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) {
#if defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
    return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)x);
#endif
  }
  static void fill(int32_t* words, const int32_t* row, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const uint32_t group = (uint32_t)row[i];
      const uint32_t zero = (uint16_t)(int8_t)group, one = (uint16_t)(int8_t)(group >> 8);
      const uint32_t two = (uint16_t)(int8_t)(group >> 16), three = (uint16_t)(int8_t)(group >> 24);
      words[2 * i] = (int32_t)(zero | two << 16);
      words[2 * i + 1] = (int32_t)(one | three << 16);
    }
  }
};
#else
struct Int8 {
  static constexpr int STEPS = 4;
  static constexpr bool IN_PLACE = false;
  static constexpr int32_t OFFSET = 0;
  static RWKV_INLINE vi weights(const char* p, int step) { return load_words(p) << (24 - 8 * step) >> 24; }
  static RWKV_INLINE vi add(vi sum, vi w, vi x) { return sum + w * x; }
  static void fill(int32_t* words, const int32_t* row, int64_t n) {
    for (int64_t i = 0; i < n; i++)
      for (int j = 0; j < 4; j++) words[4 * i + j] = (int8_t)((uint32_t)row[i] >> 8 * j);
  }
};
#endif

}  // namespace rwkv
