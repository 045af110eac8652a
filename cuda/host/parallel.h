// Work over threads, and the segments of a chunk. Which thread does what never changes a bit: every item of work is
// computed by itself, in an order of its own. Every parallel region has as many threads as torch's (some may find
// nothing to do): with another number the OpenMP runtime would end threads and start them again.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "vec.h"

namespace rwkv {

// Flushes denormal numbers to zero on this thread while it lives: a state that decays to nothing must not slow the
// machine down, and a thread's inherited mode must not change a bit.
class FlushDenormals {
#if defined(__SSE2__)
  unsigned saved_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  uint64_t saved_;

 public:
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// 0..n-1 in contiguous parts of nearly equal size, at least `grain` items each, at most one for every thread.
struct Parts {
  int64_t n;
  int count;
  Parts(int64_t n, int64_t grain, int threads) : n(n) {
    const int64_t parts = n / grain;
    count = parts < threads ? (parts < 1 ? 1 : (int)parts) : threads;
  }
  int64_t begin(int part) const { return n * part / count; }
};

// f(begin, end) on each of the parts.
template <class F> void parallel_parts(const Parts& parts, int threads, F f) {
  if (parts.count <= 1) {
    FlushDenormals guard;
    f((int64_t)0, parts.n);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < parts.count; part++) {
    FlushDenormals guard;
    f(parts.begin(part), parts.begin(part + 1));
  }
}
template <class F> void parallel_ranges(int64_t n, int64_t grain, int threads, F f) {
  parallel_parts(Parts(n, grain, threads), threads, f);
}

// f(item) for items of unequal size.
template <class F> void parallel_items(int64_t n, int threads, F f) {
  if (threads <= 1 || n <= 1) {
    FlushDenormals guard;
    for (int64_t item = 0; item < n; item++) f(item);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < n; item++) {
    FlushDenormals guard;
    f(item);
  }
}

// This thread's scratch memory, at least `count` floats on a cache line; whoever asks next on this thread gets the
// same. Not on the stack, where the threads of OpenMP may have little room.
inline float* thread_scratch(int64_t count) {
  struct Memory {
    float* data = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.size < count) {
    std::free(memory.data);
    memory.size = 0;
    const int64_t rounded = (count + 15) / 16 * 16;
    memory.data = (float*)std::aligned_alloc(64, rounded * sizeof(float));
    if (!memory.data) throw std::bad_alloc();
    memory.size = rounded;
  }
  return memory.data;
}

// rows: [segments, 2] = first row, number of rows; ascending, disjoint (checked by the caller).
struct Segments {
  const int32_t* rows;
  int64_t count;
  int64_t first(int64_t d) const { return rows[2 * d]; }
  int64_t length(int64_t d) const { return rows[2 * d + 1]; }
  int64_t end(int64_t d) const { return first(d) + length(d); }
  // the first segment with a row at or behind `row`
  int64_t at_or_after(int64_t row) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (end(middle) > row)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
  // f(begin, end) for each run of rows that belongs to no segment
  template <class F> void gaps(int64_t total_rows, F f) const {
    int64_t next = 0;
    for (int64_t d = 0; d < count; d++) {
      if (first(d) > next) f(next, first(d));
      next = end(d);
    }
    if (total_rows > next) f(next, total_rows);
  }
  // the segment of every row, -1 for none
  std::vector<int32_t> of_row(int64_t total_rows) const {
    std::vector<int32_t> segment(total_rows, -1);
    for (int64_t d = 0; d < count; d++)
      for (int64_t t = 0; t < length(d); t++) segment[first(d) + t] = (int32_t)d;
    return segment;
  }
};

}  // namespace rwkv
