// Products on the tile unit of processors with AMX, instead of those on vectors: bfloat16 and int8, the same packed
// weights (product.h). RWKV_AMX_EMULATION takes an emulation of the unit (amx_emulation.h) on any processor.
//
// A tile is up to 16 rows of 64 bytes. One instruction adds to 16 rows x 16 outputs the products of 16 groups of
// inputs; a bfloat16 sum therefore has another order than on vectors: of each 16 groups the even and the odd elements
// by themselves, then both together, then added to the sum so far. That order is the same for every row: the 16
// groups always begin at a multiple of 16, whatever the number of rows.
#pragma once
#include "product.h"

#if (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || defined(RWKV_AMX_EMULATION)
#define RWKV_AMX 1

namespace rwkv {

// `multiply` (product.h) for the kinds BFLOAT16 and INT8.
void multiply_on_tiles(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece,
                       int threads);

}  // namespace rwkv
#endif
