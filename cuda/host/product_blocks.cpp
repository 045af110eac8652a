// The order in which a product's tiles are computed: which of them share weights or activations in a cache, and which
// thread has which.
#include <algorithm>
#include <type_traits>

#include "product_amx.h"
#include "product_parts.h"
#include "product_quantise.h"
#include "product_scratch.h"
#include "product_tiles.h"

namespace rwkv {

namespace {

// Measured on a processor with 48 KiB and 1 MiB of first and second-level cache.
constexpr int64_t CACHED_BYTES = 512 << 10;  // weights that stay in the second-level cache
constexpr int64_t MOST_PANELS = 16;          // in a block
constexpr int64_t DEPTH = 512;               // groups of inputs at a time, so that a block has several panels
constexpr int64_t DEPTH_IN_PLACE = 1536;     // the same when no copies of the rows have to pay off
constexpr int64_t TILES_IN_DEPTH = 8;        // tiles whose sums wait in the cache for the next part of the inputs
constexpr int64_t STREAMING_TILES = 2;       // no more: weights are used as they arrive from memory
constexpr int64_t AHEAD = 16 << 10;          // bytes of weights that are on their way from memory
constexpr int64_t LINE = 64;                 // bytes of a cache line

// An odd number of cache lines for so many words: the rows of a tile do not fall on the same few sets of a cache.
constexpr int64_t padded_stride(int64_t words) { return (parts_of(words, LINE / 4) | 1) * (LINE / 4); }

// Some rows' words: `stride` words from one row to the next.
struct Words {
  const int32_t* at;
  int64_t stride;
};

// One thread's part of a product.
template <class K, class T> class Part {
  const Activations& x;  // of T: the rows as K::fill takes them
  const PackedWeights& w;
  const Receiver& receiver;
  const int64_t piece;         // panels that the receiver takes
  const int64_t row_elements;  // of T, that K::fill takes
  const float* row_scales;     // int8
  const Range rows, panels;

  // The inputs are used in `depths` parts, one after the other for `waiting` tiles before the next tiles begin.
  const int64_t groups = w.groups(), tiles = parts_of(rows.size(), MOST_ROWS), tile_rows = parts_of(rows.size(), tiles);
  const bool in_place = reads_in_place(), streams = tiles <= STREAMING_TILES;
  const int64_t most_groups = tiles == 1 ? groups : in_place || streams ? DEPTH_IN_PLACE : DEPTH;
  const int64_t depths = groups > most_groups ? parts_of(groups, most_groups) : 1, depth = parts_of(groups, depths);
  const int64_t waiting = depths > 1 ? TILES_IN_DEPTH : 1;
  // Panels whose weights stay in the cache from tile to tile, and those whose sums lie side by side.
  const int64_t cached = std::min(CACHED_BYTES / (depth * STEP_BYTES + 1), MOST_PANELS);
  const int64_t block = streams ? piece : std::max<int64_t>(cached / piece, 1) * piece;
  const int64_t ring = depths > 1 ? block : piece;

 public:
  Part(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece, int64_t row_elements,
       const float* row_scales, Range rows, Range panels)
      : x(x), w(w), receiver(receiver), piece(piece), row_elements(row_elements), row_scales(row_scales), rows(rows),
        panels(panels) {}

  void run() const {
    static thread_local Scratch words_scratch, sums_scratch;
    const int64_t filled_stride = padded_stride((streams ? groups : depth) * K::STEPS);
    const int64_t tile_words = tile_rows * filled_stride, tile_sums = tile_rows * ring * PANEL;
    int32_t* const filled = words_scratch.get<int32_t>(in_place ? 0 : (streams ? tiles : 1) * tile_words);
    float* const sums = sums_scratch.get<float>(waiting * tile_sums);
    if (streams && !in_place)
      for (int64_t t = 0; t < tiles; t++)
        fill(filled + t * tile_words, filled_stride, rows.part(t, tiles), {0, groups});

    for (int64_t p = panels.begin; p < panels.end; p += block)
      for (Turn turn = {0, 0}; turn.tile < tiles; turn = after(turn)) {
        const Range own = rows_of(turn), inputs = inputs_of(turn);
        Words words = {filled, filled_stride};
        if (in_place)
          words = {(const int32_t*)x.row<T>(own.begin) + inputs.begin, x.stride * (int64_t)sizeof(T) / 4};
        else if (streams)
          words.at += turn.tile * tile_words + inputs.begin * K::STEPS;
        else
          fill(filled, filled_stride, own, inputs);
        tile_by_panels(turn, words, {p, std::min(p + block, panels.end)}, sums + turn.tile % waiting * tile_sums);
      }
  }

 private:
  // A tile's rows and a part of the inputs.
  struct Turn {
    int64_t tile, depth;
  };
  Turn after(Turn turn) const {
    const int64_t first = turn.tile / waiting * waiting, next = turn.tile + 1;
    if (next < std::min(first + waiting, tiles)) return {next, turn.depth};
    return turn.depth + 1 < depths ? Turn{first, turn.depth + 1} : Turn{next, 0};
  }
  Range rows_of(Turn turn) const { return rows.part(turn.tile, tiles); }
  Range inputs_of(Turn turn) const { return Range{0, groups}.part(turn.depth, depths); }

  // Whether the tiles can read the rows themselves, and a tile's rows do not all fall on the same sets of a cache.
  bool reads_in_place() const {
    const int64_t bytes = x.stride * sizeof(T);
    return K::IN_PLACE && !x.index && row_elements * sizeof(T) % 4 == 0 && bytes % 4 == 0 &&
           (x.count == 1 || bytes % 4096);
  }

  void fill(int32_t* words, int64_t stride, Range some, Range inputs) const {
    const int64_t elements = 4 / sizeof(T);
    const int64_t begin = inputs.begin * elements, end = std::min(inputs.end * elements, row_elements);
    for (int64_t i = 0; i < some.size(); i++)
      K::fill(words + i * stride, x.row<T>(some.begin + i) + begin, end - begin);
  }

  // One tile's rows with one panel after the other. The first inputs begin the sums, others go on; after the last ones
  // the sums are handed out.
  void tile_by_panels(Turn turn, Words words, Range some, float* sums) const {
    const Range own = rows_of(turn), inputs = inputs_of(turn);
    const Tile tile = tile_for<K>(own.size());
    const bool goes_on = turn.depth > 0, last = turn.depth + 1 == depths;
    Ahead ahead = to_fetch(turn, w.panel(some.begin) + inputs.begin * STEP_BYTES, some.size());
    const int64_t ahead_step = ahead.gap == LINE ? w.panel_bytes() : ahead.lines * ahead.gap;  // weights, or rows
    int64_t begin = some.begin;  // of the piece
    float* to = sums;
    for (int64_t p = some.begin; p < some.end; p++, ahead.from += ahead_step) {
      const char* const weights = w.panel(p) + inputs.begin * STEP_BYTES;
      if (!std::is_same<K, Int8>::value && is_placed(p)) {
        tile(words.at, words.stride, weights, inputs.size(), place(own, p), receiver.place_stride, goes_on, ahead);
        begin = p + 1;
        continue;
      }
      tile(words.at, words.stride, weights, inputs.size(), to, ring * PANEL, goes_on, ahead);
      to += PANEL;
      if (p + 1 - begin < piece && p + 1 < some.end) continue;
      if (last) finish(own, {begin, p + 1}, to - (p + 1 - begin) * PANEL);
      begin = p + 1;
      if (ring == piece) to = sums;
    }
  }

  // What comes into the cache while a tile is computed with the first of `panels` panels: weights that are in memory
  // still, each tile its share, or some of the rows that are filled in next.
  Ahead to_fetch(Turn turn, const char* weights, int64_t panels) const {
    const int64_t run = run_of(rows_of(turn).size()), run_bytes = run * STEP_BYTES;
    if (streams && tiles > 1) {
      const int64_t bytes = inputs_of(turn).size() * STEP_BYTES;
      return {weights + bytes + turn.tile * bytes / tiles, run_bytes / LINE / tiles, LINE, run_bytes / tiles};
    }
    if (turn.tile == 0) return {weights + AHEAD, run_bytes / LINE, LINE, run_bytes};
    if (in_place) return {weights, 0, LINE, 0};
    const Turn next = after(turn);
    const Range coming = rows.part(next.tile % tiles, tiles);
    return {(const char*)x.row<T>(coming.begin) + inputs_of(next).begin * 4, parts_of(coming.size(), panels),
            x.stride * (int64_t)sizeof(T), run * 4};
  }

  // Whether the receiver's place takes this panel: it has no padding.
  bool is_placed(int64_t panel) const { return receiver.place && (panel + 1) * PANEL <= w.outputs; }
  float* place(Range some, int64_t panel) const {
    return receiver.place + some.begin * receiver.place_stride + panel * PANEL;
  }

  void finish(Range some, Range taken, float* sums) const {
    const bool placed = is_placed(taken.begin);
    const int64_t stride = ring * PANEL;
    if constexpr (std::is_same<K, Int8>::value)
      for (int64_t p = taken.begin; p < taken.end; p++) {
        float* const from = sums + (p - taken.begin) * PANEL;
        dequantise(from, stride, some.size(), row_scales + some.begin, w.scales() + p * PANEL, w.sums() + p * PANEL,
                   K::OFFSET, placed ? place(some, p) : from, placed ? receiver.place_stride : stride);
      }
    if (!placed) receiver.take(some.begin, some.size(), taken.begin, taken.size(), sums, stride);
  }
};

}  // namespace

void multiply(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece, int threads) {
#if defined(RWKV_AMX)
  if (w.kind != FLOAT32) return multiply_on_tiles(x, w, receiver, piece, threads);
#endif
  if (!x.count || !w.outputs) return;
  const auto nothing = [](int, int) {};
  const auto in_parts = [&](auto prepare, auto run) {
    rwkv::in_parts(x.count, MOST_ROWS, w, piece, threads, prepare, [&](Range rows, Range panels) {
      if (rows.size() > 0 && panels.size() > 0) run(rows, panels);
    });
  };
  if (w.kind == FLOAT32)
    return in_parts(nothing, [&](Range rows, Range panels) {
      Part<Float32, float>(x, w, receiver, piece, w.inputs, nullptr, rows, panels).run();
    });
  if (w.kind == BFLOAT16)
    return in_parts(nothing, [&](Range rows, Range panels) {
      Part<BFloat16, bf16>(x, w, receiver, piece, w.inputs, nullptr, rows, panels).run();
    });

  static thread_local Scratch quantised_scratch, scales_scratch;
  const int64_t stride = padded_stride(w.groups());
  int32_t* const quantised = quantised_scratch.get<int32_t>(x.count * stride);
  float* const scales = scales_scratch.get<float>(x.count);
  const Activations q = {quantised, stride, x.count, nullptr};
  in_parts(
      [&](int part, int count) {
        const Range rows = Range{0, x.count}.part(part, count);
        for (int64_t t = rows.begin; t < rows.end; t++)
          scales[t] = quantise(x.row<bf16>(t), w.inputs, Int8::OFFSET, (int8_t*)(quantised + t * stride));
      },
      [&](Range rows, Range panels) {
        Part<Int8, int32_t>(q, w, receiver, piece, w.groups(), scales, rows, panels).run();
      });
}

}  // namespace rwkv
