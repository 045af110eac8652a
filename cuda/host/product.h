// Products of activations with packed weights: x [M, K] times w [N, K] transposed, on a processor's own tiles.
//
// Packed weights lie in panels of 32 outputs: [ceil(N / 32)][ceil(K / g)][32][g], where a group of g inputs fills 4
// bytes (1 float, 2 bfloat16, 4 int8), N and K padded with zeros. int8 is followed by the 32-padded channels' float
// scales and the int32 sums of their quantised weights. So a step of any tile is 128 bytes of weights and 4 bytes of
// each row.
//
// Every output element is one chain of additions over K in order (bfloat16: in a pair the odd element first, then the
// even one, as vdpbf16ps adds them; AMX: see product_amx.h), so its bits depend neither on the tile, nor on the number
// of rows, nor on threads.
#pragma once
#include <cstdint>

#include "vec.h"

namespace rwkv {

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

constexpr int64_t PANEL = 32;         // outputs
constexpr int64_t STEP_BYTES = 128;   // of a panel: one group of inputs
constexpr int64_t group_size(int kind) { return kind == INT8 ? 4 : kind == BFLOAT16 ? 2 : 1; }

struct PackedWeights {
  int kind;
  int64_t outputs, inputs;
  const char* data;
  int64_t groups() const { return (inputs + group_size(kind) - 1) / group_size(kind); }
  int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
  int64_t panel_bytes() const { return groups() * STEP_BYTES; }
  const char* panel(int64_t p) const { return data + p * panel_bytes(); }
  const float* scales() const { return (const float*)panel(panels()); }
  const int32_t* sums() const { return (const int32_t*)(scales() + panels() * PANEL); }
};

// Rows of float (kind FLOAT32) or bfloat16; `stride` in elements. With `index`, row t is x[index[t]].
struct Activations {
  const void* data;
  int64_t stride, count;
  const int64_t* index;
  template <class T> const T* row(int64_t t) const { return (const T*)data + (index ? index[t] : t) * stride; }
};

// Takes finished pieces of the product while they are in the first-level cache; called by several threads at once.
struct Receiver {
  // sums: rows `row`.. and outputs 32 * `panel`.., of which the last may be padding
  virtual void take(int64_t row, int64_t rows, int64_t panel, int64_t panels, const float* sums,
                    int64_t stride) const = 0;
  // Where the sums are wanted as they are, rows `place_stride` apart, or null. Panels without padding are put there and
  // not taken. Only for pieces of one panel.
  float* place = nullptr;
  int64_t place_stride = 0;
};

// x times w transposed, given to `receiver` in pieces of `piece` panels, the first panel of each being a multiple of it.
void multiply(const Activations& x, const PackedWeights& w, const Receiver& receiver, int64_t piece, int threads);

}  // namespace rwkv
