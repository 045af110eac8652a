// The two roofs of this machine, for `rwkvmpi bench`: how fast the instructions of our products can run at all, and how
// fast memory can be read.
#include "parallel.h"
#include "product_amx.h"
#include "product_kinds.h"
#if defined(RWKV_AMX)
#include "product_amx_tiles.h"
#endif

using namespace rwkv;

namespace {

// Independent sums: an addition waits about 4 cycles for the one before it, and a core begins up to two a cycle. All of
// them stay in registers, beside the two factors: there are 32 (AVX-512, NEON) or 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int CHAINS = 16;
#else
constexpr int CHAINS = 12;
#endif

// x itself, which the compiler must take for another value that is needed: so it moves, merges and drops no step of a
// loop. No instruction comes of it. (By value: an array whose address is taken would live in memory.)
RWKV_INLINE vi opaque(vi x) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(x));
#elif defined(__SSE2__)
  asm volatile("" : "+x"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
  return x;
}

template <class K> void multiply_add(int64_t rounds) {
  vi sums[CHAINS] = {}, w = vi{} + 0x3f803f80, x = vi{} + 0x3f803f80;  // 1 as bfloat16, about 1 as float
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) {
      w = opaque(w);
      sums[c] = opaque(K::add(sums[c], w, x));
    }
  for (auto& sum : sums) sum = opaque(sum);
}

template <class K> int64_t on_vectors(int kind, int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals guard;
    multiply_add<K>(rounds);
  }
  return 2 * group_size(kind) / K::STEPS * LANES * CHAINS * rounds * threads;
}

#if defined(RWKV_AMX)
// With the four sums that the products have (product_amx_tiles.h).
template <class K> int64_t on_tiles(int kind, int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    TileUnit unit;
    unit.configure(MOST_TILE_ROWS);
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    zero_tile<4>(), zero_tile<5>(), zero_tile<6>(), zero_tile<7>();
    for (int64_t round = 0; round < rounds; round++) {
      K::template add<0, 4, 6>();
      K::template add<1, 4, 7>();
      K::template add<2, 5, 6>();
      K::template add<3, 5, 7>();
    }
  }
  return 2 * group_size(kind) * TILE_GROUPS * TILE_ROWS * 16 * 4 * rounds * threads;  // 16 outputs, 4 sums
}
#endif

}  // namespace

// Does the products' multiply-adds for this kind of weights (product.h) in registers alone, on every thread; returns
// how many operations that were, a multiply-add counted as two.
RWKV_API int64_t rwkvmpi_peak(int kind, int64_t rounds, int threads) {
#if defined(RWKV_AMX)
  if (kind == INT8) return on_tiles<OnTilesInt8>(kind, rounds, threads);
  if (kind == BFLOAT16) return on_tiles<OnTilesBFloat16>(kind, rounds, threads);
#endif
  if (kind == INT8) return on_vectors<Int8>(kind, rounds, threads);
  if (kind == BFLOAT16) return on_vectors<BFloat16>(kind, rounds, threads);
  return on_vectors<Float32>(kind, rounds, threads);
}

// Reads `bytes` (a multiple of 512) once, every thread its part.
RWKV_API void rwkvmpi_read_memory(const char* data, int64_t bytes, int threads) {
  constexpr int64_t PIECE = 512;
  constexpr int VECTORS = 8, PARTS_OF_PIECE = PIECE / (VECTORS * sizeof(vi));
  parallel_ranges(bytes / PIECE, 1, threads, [&](int64_t begin, int64_t end) {
    vi sums[VECTORS] = {};
    for (int64_t i = begin * PARTS_OF_PIECE; i < end * PARTS_OF_PIECE; i++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sums[v] += load_words(data + (i * VECTORS + v) * sizeof(vi));
    for (auto& sum : sums) sum = opaque(sum);
  });
}
