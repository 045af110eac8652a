// ldmatrix and mma.m16n8k16 with the fragment layouts of the PTX manual.
#pragma once
#include "async_copy.h"
#include "warp.h"

namespace emulation {

// Matrix i is 8 rows of 8 16-bit elements, at the addresses of lanes 8i to 8i+7. Each lane reads its elements itself,
// so that ThreadSanitizer sees who reads what.
template <int COUNT, bool TRANSPOSED>
inline void ldmatrix(uint32_t (&r)[COUNT], const void* row) {
  if (lane() < 8 * COUNT) check_alignment(row, "ldmatrix");
  Meeting& meeting = meet(0xffffffffu, Operation::LDMATRIX, row);
  const unsigned group = lane() / 4, pair = lane() % 4 * 2;
  for (unsigned i = 0; i < COUNT; ++i) {
    const auto at = [&](unsigned y) { return given<const uint16_t*>(meeting, 8 * i + y); };
    if constexpr (TRANSPOSED)
      r[i] = at(pair)[group] | (uint32_t)at(pair + 1)[group] << 16;
    else
      r[i] = at(group)[pair] | (uint32_t)at(group)[pair + 1] << 16;
  }
  leave(meeting);
}

struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

template <typename E>
float half_of(uint32_t two, unsigned which) {
  return to_float(E{(uint16_t)(two >> 16 * which)});
}

// The whole product, by the last lane that comes.
template <typename E>
EMULATION_UNTRACKED inline void multiply(Meeting& meeting) {
  float a[16][16], b[16][8], d[16][8];
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Fragments own = given<Fragments>(meeting, lane);
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 8; ++i)
      a[group + (i >> 1 & 1) * 8][pair + (i & 1) + (i >> 2) * 8] = half_of<E>(own.a[i / 2], i & 1);
    for (unsigned i = 0; i < 4; ++i) b[pair + (i & 1) + (i >> 1) * 8][group] = half_of<E>(own.b[i / 2], i & 1);
    for (unsigned i = 0; i < 4; ++i) d[group + (i >> 1) * 8][pair + (i & 1)] = own.d[i];
  }
  typedef float Row __attribute__((vector_size(32), aligned(4), may_alias));
  for (unsigned m = 0; m < 16; ++m) {
    Row sum = {};
    for (unsigned k = 0; k < 16; ++k) sum += a[m][k] * *reinterpret_cast<const Row*>(b[k]);
    *reinterpret_cast<Row*>(d[m]) += sum;
  }
  for (unsigned lane = 0; lane < WARP; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      __builtin_memcpy(meeting.result[lane] + 4 * i, &d[lane / 4 + (i >> 1) * 8][lane % 4 * 2 + (i & 1)], 4);
}

}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) { emulation::ldmatrix<4, false>(r, shared_row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) { emulation::ldmatrix<4, true>(r, shared_row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) { emulation::ldmatrix<2, false>(r, shared_row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) { emulation::ldmatrix<2, true>(r, shared_row); }

// d += a b: 16 x 16 times 16 x 8, float32 sums.
template <typename E>
EMULATION_UNTRACKED void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace emulation;
  const Fragments own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  Meeting& meeting = meet(0xffffffffu, Operation::MMA, own, multiply<E>);
  __builtin_memcpy(d, meeting.result[lane()], sizeof(d));
  leave(meeting);
}
