// The tiles: a few rows times 32 outputs, all sums in registers.
#pragma once
#include <utility>

#include "product_kinds.h"

namespace rwkv {

// Registers for sums, of 32 (AVX-512, NEON) or 16: beside them one of x and one or two of weights.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUM_REGISTERS = 24;
#else
constexpr int SUM_REGISTERS = 12;
#endif
constexpr int MOST_ROWS = SUM_REGISTERS / 2;

// Registers of outputs: the fewer rows, the more, so that there are enough independent sums to hide the latency of an
// addition.
constexpr int vectors_of(int rows) {
  int vectors = 2;
  while (vectors * LANES < PANEL && 2 * vectors * rows <= SUM_REGISTERS) vectors *= 2;
  return vectors;
}

// What a tile fetches into the cache for those after it: with every run of groups of inputs `lines` addresses, `gap`
// bytes apart, from an address that moves on by `step`. Runs keep that work, and its registers, out of the innermost
// loop; one or two rows, which wait for memory all the time, do best with an even flow.
struct Ahead {
  const char* from;
  int64_t lines, gap, step;
};
constexpr int64_t run_of(int64_t rows) { return rows <= 2 ? 1 : 8; }  // groups

// sums[i][n] (+)= x[i] w[n] over `groups` groups of inputs, w a panel. Sums are float or int32. `ahead` is a reference:
// a copy of it on the stack would be read while the stores before the call are still under way.
template <class K, int ROWS>
void tile(const int32_t* x, int64_t x_stride, const char* w, int64_t groups, float* sums, int64_t stride, bool go_on,
          const Ahead& ahead) {
  constexpr int V = vectors_of(ROWS);
  constexpr int64_t RUN_BYTES = run_of(ROWS) * STEP_BYTES;
  for (int64_t part = 0; part < PANEL; part += V * LANES) {
    vi c[ROWS][V];
    const auto place = [&](int i, int v) { return sums + i * stride + part + v * LANES; };
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < V; v++) c[i][v] = go_on ? load_words(place(i, v)) : vi{};
    const int32_t* word = x;
    const char *from = w + part * 4, *const end = from + groups * STEP_BYTES;
    const char* fetch = ahead.from;
    while (from < end) {
      if (part == 0)
        for (int64_t i = 0; i < ahead.lines; i++) __builtin_prefetch(fetch + i * ahead.gap);
      fetch += ahead.step;
      const char* const run_end = end - from < RUN_BYTES ? end : from + RUN_BYTES;
      for (; from < run_end; from += STEP_BYTES, word += K::STEPS)
        for (int step = 0; step < K::STEPS; step++) {
          vi weights[V];
          for (int v = 0; v < V; v++) weights[v] = K::weights(from + v * LANES * 4, step);
          for (int i = 0; i < ROWS; i++) {
            const vi splat = splat_word(word + i * x_stride + step);
            for (int v = 0; v < V; v++) c[i][v] = K::add(c[i][v], weights[v], splat);
          }
        }
    }
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < V; v++) std::memcpy(place(i, v), &c[i][v], sizeof(vi));
  }
}

typedef void (*Tile)(const int32_t*, int64_t, const char*, int64_t, float*, int64_t, bool, const Ahead&);

template <class K, int... I> Tile tile_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {tile<K, I + 1>...};
  return tiles[rows - 1];
}
// The tile for so many rows, 1 to MOST_ROWS.
template <class K> Tile tile_for(int64_t rows) {
  return tile_of<K>(rows, std::make_integer_sequence<int, MOST_ROWS>{});
}

}  // namespace rwkv
