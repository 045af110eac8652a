// What tests/ops/test_amx.py asks of the emulated tile unit, compiled together with the products that use it.
#include <sys/mman.h>
#include <unistd.h>

#include "product_amx.h"
#include "product_amx_tiles.h"

using namespace rwkv;

namespace {

TileConfiguration all_tiles(uint8_t rows, uint16_t bytes) {
  TileConfiguration c;
  for (int t = 0; t < 8; t++) {
    c.rows[t] = rows;
    c.row_bytes[t] = bytes;
  }
  return c;
}

char memory[4096];

}  // namespace

// Every product of this library is one on tiles.
void rwkv::multiply(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece, int threads) {
  multiply_on_tiles(x, w, receiver, piece, threads);
}

// Uses the unit wrongly; each number is another mistake.
RWKV_API void amx_misuse(int mistake) {
  TileConfiguration c = all_tiles(16, 64);
  if (mistake == 0) zero_tile<0>();  // not configured
  if (mistake == 1) c.palette = 0;
  if (mistake == 2) c.rows[3] = 17;
  if (mistake == 3) c.row_bytes[3] = 68;
  if (mistake == 4) c.rows[3] = 0;
  if (mistake == 5) c.reserved[2] = 1;
  if (mistake == 6) c.rows[8] = 1;
  if (mistake == 7) c.rows[0] = 15;
  if (mistake == 8) c.rows[2] = 8;
  if (mistake == 9) c.row_bytes[2] = 32;
  if (mistake == 10) c.rows[7] = c.row_bytes[7] = 0;
  if (mistake == 11) c.row_bytes[1] = 62;
  configure_tiles(c);
  if (mistake == 12) load_tile<1>(memory, 60);
  if (mistake == 13) store_tile<1>(memory, 64);
  if (mistake == 14) {  // configured once more: nothing stays in a tile
    zero_tile<1>();
    configure_tiles(c);
    store_tile<1>(memory, 64);
  }
  if (mistake == 15) release_tiles();
  load_tile<0>(memory, 64);
  load_tile<1>(memory, 64);
  if (mistake != 16) load_tile<2>(memory, 64);
  if (mistake == 10) load_tile<7>(memory, 64);
  if (mistake == 17)
    add_bfloat16<0, 1, 1>();
  else if (mistake == 16)
    add_int8<0, 1, 2>();
  else
    add_bfloat16<0, 1, 2>();
  release_tiles();
}

// One instruction on tiles of `rows` x 4 * `outputs` bytes of sums and `groups` groups of inputs; afterwards `sums`,
// 16 x 64 bytes, is all of the tile.
RWKV_API void amx_add(int bfloat16, int rows, int groups, int outputs, const void* x, const void* w, char* sums) {
  TileConfiguration c = all_tiles(16, 64);
  c.rows[0] = c.rows[1] = (uint8_t)rows;
  c.rows[2] = (uint8_t)groups;
  c.row_bytes[0] = c.row_bytes[2] = (uint16_t)(4 * outputs);
  c.row_bytes[1] = (uint16_t)(4 * groups);
  configure_tiles(c);
  load_tile<0>(sums, 64);
  load_tile<1>(x, 64);
  load_tile<2>(w, 64);
  if (bfloat16)
    add_bfloat16<0, 1, 2>();
  else
    add_int8<0, 1, 2>();
  amx_emulation::unit().copy(0, sums);
  release_tiles();
}

RWKV_API int amx_configured_units() { return amx_emulation::configured_units; }

// `size` bytes between two pages that nobody may touch: at the end of what lies between them, or at its beginning.
RWKV_API void* amx_guarded(int64_t size, int at_end) {
  const int64_t page = sysconf(_SC_PAGESIZE), inner = (size + page - 1) / page * page;
  char* all = (char*)mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(all + page, inner, PROT_READ | PROT_WRITE)) return nullptr;
  return all + page + (at_end ? inner - size : 0);
}
