// The instructions of the tile unit that the products use. Written as assembly: the compilers' own intrinsics do not
// say that a load reads memory (GCC 12), so that a store before it could come too late.
#pragma once
#include <cstdint>

#include "vec.h"

#if defined(RWKV_AMX_EMULATION)
#include "amx_emulation.h"
#endif

namespace rwkv {

// What ldtilecfg reads. Palette 1: eight tiles of at most 16 rows of at most 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64, "as the processor defines it");

#if defined(RWKV_AMX_EMULATION)

inline void configure_tiles(const TileConfiguration& c) { amx_emulation::unit().configure(&c); }
inline void release_tiles() { amx_emulation::unit().release(); }
template <int TILE> void zero_tile() { amx_emulation::unit().zero(TILE); }
template <int TILE> void load_tile(const void* from, int64_t stride) {
  amx_emulation::unit().load(TILE, from, stride);
}
template <int TILE> void store_tile(void* to, int64_t stride) { amx_emulation::unit().store(TILE, to, stride); }
template <int SUM, int X, int W> void add_bfloat16() { amx_emulation::unit().dpbf16ps(SUM, X, W); }
template <int SUM, int X, int W> void add_int8() { amx_emulation::unit().dpbssd(SUM, X, W); }

#else

RWKV_INLINE void configure_tiles(const TileConfiguration& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
// Until then the operating system keeps 8 KiB more for this thread, and its core may sleep less deeply.
RWKV_INLINE void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int TILE> RWKV_INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE> RWKV_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> RWKV_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int SUM, int X, int W> RWKV_INLINE void add_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W));
}
template <int SUM, int X, int W> RWKV_INLINE void add_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W));
}

#endif

}  // namespace rwkv
