// Up to 32 rows times one or two panels on the tile unit, all sums in tiles.
//
// Tiles 0 to 3 are sums of up to 16 rows and 16 outputs, so that there are four independent ones to hide an addition's
// latency; the others are rows (4, 5) and weights (6, 7; 5 where there is one tile of rows).
#pragma once
#include "product.h"
#include "product_amx_unit.h"

namespace rwkv {

constexpr int64_t TILE_ROWS = 16, TILE_ROW_BYTES = 64;
constexpr int64_t TILE_GROUPS = 16;             // of inputs that one instruction takes
constexpr int64_t MOST_TILE_ROWS = 2 * TILE_ROWS;  // of one `Block`

struct OnTilesBFloat16 {
  template <int SUM, int X, int W> static RWKV_INLINE void add() { add_bfloat16<SUM, X, W>(); }
};
struct OnTilesInt8 {
  template <int SUM, int X, int W> static RWKV_INLINE void add() { add_int8<SUM, X, W>(); }
};

// The unit of this thread, configured for some number of rows until it is released at the end.
class TileUnit {
  int64_t rows_ = 0;

 public:
  TileUnit() = default;
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
  ~TileUnit() {
    if (rows_) release_tiles();
  }
  // 1 to MOST_TILE_ROWS
  void configure(int64_t rows) {
    if (rows == rows_) return;
    const bool wide = rows > TILE_ROWS;
    const uint8_t first = wide ? TILE_ROWS : rows, second = wide ? rows - TILE_ROWS : rows;
    const uint8_t of_tile[8] = {first, first, second, second, first, wide ? second : (uint8_t)TILE_GROUPS,
                                (uint8_t)TILE_GROUPS, (uint8_t)TILE_GROUPS};
    TileConfiguration c;
    for (int tile = 0; tile < 8; tile++) {
      c.row_bytes[tile] = TILE_ROW_BYTES;
      c.rows[tile] = of_tile[tile];
    }
    configure_tiles(c);
    rows_ = rows;
  }
};

// sums (+)= rows times weights over some groups of inputs. All strides in bytes. Behind the last group the rows hold
// zeros up to a multiple of TILE_GROUPS; the weights need not go on there.
struct Block {
  const char* x;
  int64_t x_stride;
  const char* w;
  int64_t panel_bytes, groups;
  char* sums;
  int64_t sums_stride;
  bool go_on;

  // f(x, w, bytes from one panel of w to the next) for every TILE_GROUPS groups of PANELS panels.
  template <int PANELS, class F> RWKV_INLINE void steps(F f) const {
    const int64_t whole = groups / TILE_GROUPS, rest = groups % TILE_GROUPS;
    constexpr int64_t BYTES = TILE_GROUPS * STEP_BYTES;
    for (int64_t s = 0; s < whole; s++) f(x + s * TILE_ROW_BYTES, w + s * BYTES, panel_bytes);
    if (!rest) return;
    alignas(64) char padded[PANELS * BYTES];
    for (int p = 0; p < PANELS; p++) {
      std::memcpy(padded + p * BYTES, w + p * panel_bytes + whole * BYTES, rest * STEP_BYTES);
      std::memset(padded + p * BYTES + rest * STEP_BYTES, 0, BYTES - rest * STEP_BYTES);
    }
    f(x + whole * TILE_ROW_BYTES, (const char*)padded, BYTES);
  }
};

constexpr int64_t HALF_STEP = STEP_BYTES / 2;  // 16 outputs of a panel, in packed weights as well as in sums

template <int TILE> RWKV_INLINE void begin_sums(const Block& b, int64_t row, int64_t half) {
  if (b.go_on)
    load_tile<TILE>(b.sums + row * b.sums_stride + half * HALF_STEP, b.sums_stride);
  else
    zero_tile<TILE>();
}
template <int TILE> RWKV_INLINE void end_sums(const Block& b, int64_t row, int64_t half) {
  store_tile<TILE>(b.sums + row * b.sums_stride + half * HALF_STEP, b.sums_stride);
}

// 17 to 32 rows, one panel.
template <class K> void multiply_two_tiles_of_rows(const Block& b) {
  begin_sums<0>(b, 0, 0);
  begin_sums<1>(b, 0, 1);
  begin_sums<2>(b, TILE_ROWS, 0);
  begin_sums<3>(b, TILE_ROWS, 1);
  b.steps<1>([&](const char* x, const char* w, int64_t) {
    load_tile<4>(x, b.x_stride);
    load_tile<6>(w, STEP_BYTES);
    K::template add<0, 4, 6>();
    load_tile<7>(w + HALF_STEP, STEP_BYTES);
    K::template add<1, 4, 7>();
    load_tile<5>(x + TILE_ROWS * b.x_stride, b.x_stride);
    K::template add<2, 5, 6>();
    K::template add<3, 5, 7>();
  });
  end_sums<0>(b, 0, 0);
  end_sums<1>(b, 0, 1);
  end_sums<2>(b, TILE_ROWS, 0);
  end_sums<3>(b, TILE_ROWS, 1);
}

// 1 to 16 rows, two panels.
template <class K> void multiply_two_panels(const Block& b) {
  begin_sums<0>(b, 0, 0);
  begin_sums<1>(b, 0, 1);
  begin_sums<2>(b, 0, 2);
  begin_sums<3>(b, 0, 3);
  b.steps<2>([&](const char* x, const char* w, int64_t panel_bytes) {
    load_tile<4>(x, b.x_stride);
    load_tile<6>(w, STEP_BYTES);
    K::template add<0, 4, 6>();
    load_tile<7>(w + HALF_STEP, STEP_BYTES);
    K::template add<1, 4, 7>();
    load_tile<5>(w + panel_bytes, STEP_BYTES);
    K::template add<2, 4, 5>();
    load_tile<6>(w + panel_bytes + HALF_STEP, STEP_BYTES);
    K::template add<3, 4, 6>();
  });
  end_sums<0>(b, 0, 0);
  end_sums<1>(b, 0, 1);
  end_sums<2>(b, 0, 2);
  end_sums<3>(b, 0, 3);
}

// 1 to 16 rows, one panel.
template <class K> void multiply_one_panel(const Block& b) {
  begin_sums<0>(b, 0, 0);
  begin_sums<1>(b, 0, 1);
  b.steps<1>([&](const char* x, const char* w, int64_t) {
    load_tile<4>(x, b.x_stride);
    load_tile<6>(w, STEP_BYTES);
    K::template add<0, 4, 6>();
    load_tile<7>(w + HALF_STEP, STEP_BYTES);
    K::template add<1, 4, 7>();
  });
  end_sums<0>(b, 0, 0);
  end_sums<1>(b, 0, 1);
}

// `panels` is 1, or 2 for at most 16 rows; the unit is configured for `rows`.
template <class K> void multiply_block(const Block& b, int64_t rows, int64_t panels) {
  if (rows > TILE_ROWS)
    multiply_two_tiles_of_rows<K>(b);
  else if (panels == 2)
    multiply_two_panels<K>(b);
  else
    multiply_one_panel<K>(b);
}

}  // namespace rwkv
