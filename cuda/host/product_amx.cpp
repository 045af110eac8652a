// The order in which a product's tiles are computed on the tile unit. An instruction takes 1 KiB of rows and 1 KiB of
// weights and about 16 cycles, so what is read again and again must lie in the first two caches; the sizes are for
// 48 KiB and 2 MiB of them.
#include "product_amx.h"

#if defined(RWKV_AMX)

#include "product_amx_tiles.h"
#include "product_parts.h"
#include "product_quantise.h"
#include "product_scratch.h"

namespace rwkv {

namespace {

constexpr int64_t DEPTH = 16 * TILE_GROUPS;  // of inputs at a time: 32 KiB of rows, which stay in the first-level cache
constexpr int64_t MOST_PANELS = 16;          // so deep: 512 KiB of weights, a quarter of the second-level cache
constexpr int64_t TILES_IN_DEPTH = 8;        // blocks of rows whose sums wait for the next part of the inputs: as much

// The rows as tiles read them: `stride` bytes apart, whole tile rows, zeros behind the last input.
struct TileRows {
  const char* data;
  int64_t stride;
};

// An odd number of cache lines, so that the rows of a tile do not fall on the same few sets of a cache.
constexpr int64_t padded_stride(int64_t groups) { return (parts_of(groups, TILE_GROUPS) | 1) * TILE_ROW_BYTES; }

// Whether tiles can read the rows where they lie: no zeros are missing, no line is split, and at least every second of
// the first-level cache's 64 sets holds some.
bool lie_well(const Activations& x, const PackedWeights& w) {
  const int64_t stride = x.stride * (int64_t)sizeof(bf16);
  return w.kind == BFLOAT16 && !x.index && w.inputs % (TILE_GROUPS * group_size(BFLOAT16)) == 0 &&
         (x.count == 1 || (stride % TILE_ROW_BYTES == 0 && stride % 2048 != 0));
}

// One thread's part of a product.
template <class K> struct TilePart {
  const TileRows& x;
  const PackedWeights& w;
  const float* row_scales;  // int8
  const Receiver& receiver;
  int64_t piece;  // panels that the receiver takes

  void run(Range rows, Range panels) const {
    if (rows.size() <= 0 || panels.size() <= 0) return;
    static thread_local Scratch scratch;
    const int64_t groups = w.groups(), tiles = parts_of(rows.size(), MOST_TILE_ROWS);
    const int64_t depth = tiles == 1 ? std::max<int64_t>(groups, 1) : DEPTH;
    const int64_t depths = std::max<int64_t>(parts_of(groups, depth), 1);
    // Weights that are used once come panel by panel, as memory sends them.
    const int64_t block = std::max<int64_t>((tiles == 1 ? 2 : MOST_PANELS) / piece, 1) * piece;
    const int64_t waiting = depths > 1 ? TILES_IN_DEPTH : 1;
    const int64_t stride = std::min(block, panels.size()) * PANEL + PANEL / 2;  // an odd number of cache lines
    const int64_t tile_sums = std::min(rows.size(), MOST_TILE_ROWS) * stride;
    float* sums = scratch.get<float>(std::min(waiting, tiles) * tile_sums);
    TileUnit unit;

    for (int64_t p = panels.begin; p < panels.end; p += block) {
      const Range some = {p, std::min(p + block, panels.end)};
      for (int64_t first = 0; first < tiles; first += waiting)
        for (int64_t d = 0; d < depths; d++)
          for (int64_t t = first; t < std::min(first + waiting, tiles); t++) {
            const int64_t begin = rows.begin + t * MOST_TILE_ROWS;
            const Range own = {begin, std::min(begin + MOST_TILE_ROWS, rows.end)};
            unit.configure(own.size());
            add(own, some, {d * depth, std::min((d + 1) * depth, groups)}, sums + (t - first) * tile_sums, stride);
            if (d + 1 == depths) finish(own, some, sums + (t - first) * tile_sums, stride);
          }
    }
  }

  void add(Range rows, Range panels, Range inputs, float* sums, int64_t stride) const {
    for (int64_t p = panels.begin, count; p < panels.end; p += count) {
      count = rows.size() <= TILE_ROWS && p + 2 <= panels.end ? 2 : 1;
      multiply_block<K>({x.data + rows.begin * x.stride + inputs.begin * 4, x.stride,
                         w.panel(p) + inputs.begin * STEP_BYTES, w.panel_bytes(), inputs.size(),
                         (char*)(sums + (p - panels.begin) * PANEL), stride * (int64_t)sizeof(float),
                         inputs.begin > 0},
                        rows.size(), count);
    }
  }

  void finish(Range rows, Range panels, float* sums, int64_t stride) const {
    for (int64_t p = panels.begin; p < panels.end; p += piece, sums += piece * PANEL) {
      const int64_t count = std::min(piece, panels.end - p);
      for (int64_t q = p; q < p + count && row_scales; q++) {
        float* const at = sums + (q - p) * PANEL;
        dequantise(at, stride, rows.size(), row_scales + rows.begin, w.scales() + q * PANEL, w.sums() + q * PANEL, 0,
                   at, stride);
      }
      receiver.take(rows.begin, rows.size(), p, count, sums, stride);
    }
  }
};

}  // namespace

void multiply_on_tiles(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece,
                       int threads) {
  static thread_local Scratch rows_scratch, scales_scratch;
  const bool in_place = lie_well(x, w);
  const int64_t stride = in_place ? x.stride * (int64_t)sizeof(bf16) : padded_stride(w.groups());
  char* copies = rows_scratch.get<char>(in_place ? 0 : x.count * stride);
  float* scales = w.kind == INT8 ? scales_scratch.get<float>(x.count) : nullptr;
  const TileRows rows = {in_place ? (const char*)x.data : copies, stride};
  const auto prepare = [&](int part, int count) {
    if (in_place) return;
    const Range own = Range{0, x.count}.part(part, count);
    for (int64_t t = own.begin; t < own.end; t++) {
      char* to = copies + t * stride;
      const int64_t bytes = w.kind == INT8 ? w.groups() * 4 : w.inputs * (int64_t)sizeof(bf16);
      if (w.kind == INT8)
        scales[t] = quantise(x.row<bf16>(t), w.inputs, 0, (int8_t*)to);
      else
        std::memcpy(to, x.row<bf16>(t), bytes);
      std::memset(to + bytes, 0, parts_of(w.groups(), TILE_GROUPS) * TILE_ROW_BYTES - bytes);
    }
  };
  const auto in_parts = [&](auto part) {
    rwkv::in_parts(x.count, MOST_TILE_ROWS, w, piece, threads, prepare,
                   [&](Range some, Range panels) { part.run(some, panels); });
  };
  if (w.kind == INT8)
    in_parts(TilePart<OnTilesInt8>{rows, w, scales, receiver, piece});
  else
    in_parts(TilePart<OnTilesBFloat16>{rows, w, nullptr, receiver, piece});
}

}  // namespace rwkv

#endif
