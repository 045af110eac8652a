// How the rows and the panels of a product are divided among threads.
#pragma once
#include <omp.h>

#include <algorithm>

#include "parallel.h"
#include "product.h"

namespace rwkv {

constexpr int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  Range part(int64_t i, int64_t count) const {
    return {begin + size() * i / count, begin + size() * (i + 1) / count};
  }
};

// How many parts the rows are split into among `threads`; the panels into threads / parts. A tile has `tile_rows` rows.
inline int row_parts(int64_t rows, int64_t tile_rows, int64_t panels, int threads) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int parts = 1; parts <= threads; parts++) {
    if (threads % parts) continue;
    const int64_t work = parts_of(parts_of(rows, parts), tile_rows) * parts_of(panels, threads / parts);
    if (work < least) {
      least = work;
      best = parts;
    }
  }
  return best;
}

// f(rows, panels) for every thread's part, after prepare(i, count) for every i < count.
template <class P, class F>
void in_parts(int64_t rows, int64_t tile_rows, const PackedWeights& w, int64_t piece, int threads, P prepare, F f) {
  constexpr int64_t ALONE = 256 << 10;  // bytes of weights times tiles that are not worth waking threads
  const int64_t panels = w.panels(), multiples = parts_of(panels, piece);
  if (threads <= 1 || w.panel_bytes() * panels * parts_of(rows, tile_rows) < ALONE) {
    FlushDenormals guard;
    prepare(0, 1);
    return f(Range{0, rows}, Range{0, panels});
  }
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals guard;
    const int count = omp_get_num_threads(), own = omp_get_thread_num();
    prepare(own, count);
#pragma omp barrier
    const int parts = row_parts(rows, tile_rows, multiples, count);
    const Range some = Range{0, multiples}.part(own / parts, count / parts);
    f(Range{0, rows}.part(own % parts, parts),
      Range{some.begin * piece, std::min(some.end * piece, panels)});
  }
}

}  // namespace rwkv
