// Shuffles, votes and reductions of a warp. They carry values, but order no memory.
#pragma once
#include <cstring>

#include "barriers.h"

namespace emulation {

// What a lane gave; all bits set (NaN) if it took no part, where CUDA leaves the value undefined.
template <typename T>
EMULATION_UNTRACKED inline T given(const Meeting& meeting, unsigned lane) {
  T value;
  if (meeting.arrived >> lane & 1)
    __builtin_memcpy(&value, meeting.given[lane], sizeof(T));
  else
    __builtin_memset(&value, 0xff, sizeof(T));
  return value;
}

template <typename T>
EMULATION_UNTRACKED inline T shuffle(unsigned mask, T value, unsigned source) {
  Meeting& meeting = meet(mask, Operation::SHUFFLE, value);
  const T result = given<T>(meeting, source);
  leave(meeting);
  return result;
}

template <typename T, typename F>
EMULATION_UNTRACKED inline T reduce(unsigned mask, T value, F combine) {
  Meeting& meeting = meet(mask, Operation::REDUCE, value);
  T result = value;
  bool first = true;
  for (unsigned i = 0; i < WARP; ++i)
    if (meeting.arrived >> i & 1) {
      const T other = given<T>(meeting, i);
      result = first ? other : combine(result, other);
      first = false;
    }
  leave(meeting);
  return result;
}

EMULATION_UNTRACKED inline unsigned ballot(unsigned mask, bool predicate, unsigned* present = nullptr) {
  Meeting& meeting = meet(mask, Operation::VOTE, predicate);
  unsigned votes = 0;
  for (unsigned i = 0; i < WARP; ++i)
    if ((meeting.arrived >> i & 1) && meeting.given[i][0]) votes |= 1u << i;
  if (present != nullptr) *present = meeting.arrived;
  leave(meeting);
  return votes;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulation::lane(), part = unsigned(width) - 1;
  return emulation::shuffle(mask, value, (lane & ~part) | (unsigned(source) & part));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane ^ unsigned(lanes), last = lane | (unsigned(width) - 1);
  return emulation::shuffle(mask, value, source <= last ? source : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, value, (lane & (unsigned(width) - 1)) >= distance ? lane - distance : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulation::lane(), last = lane | (unsigned(width) - 1);
  return emulation::shuffle(mask, value, lane + distance <= last ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  unsigned present;
  return emulation::ballot(mask, predicate != 0, &present) == present;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, [](T a, T b) { return a < b ? b : a; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

template <typename T>
EMULATION_UNTRACKED unsigned __match_any_sync(unsigned mask, T value) {
  using namespace emulation;
  Meeting& meeting = meet(mask, Operation::MATCH, value);
  unsigned same = 0;
  for (unsigned i = 0; i < WARP; ++i)
    if ((meeting.arrived >> i & 1) && given<T>(meeting, i) == value) same |= 1u << i;
  leave(meeting);
  return same;
}
