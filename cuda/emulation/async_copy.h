// cp.async. The data land only when their group is waited for, and until then the target holds NaN: so a missing wait
// shows, and to ThreadSanitizer a copy writes both when it is issued and when it lands.
#pragma once
#include "block.h"

namespace emulation {

struct alignas(16) Bytes16 {
  uint64_t words[2];
};

inline void check_alignment(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("%s at %p, which is not a multiple of 16", what, p);
}

}  // namespace emulation

inline void cp_async16(void* shared, const void* global, bool valid) {
  using namespace emulation;
  check_alignment(shared, "cp.async to shared memory");
  if (valid) check_alignment(global, "cp.async from global memory");
  *static_cast<Bytes16*>(shared) = {{~uint64_t(0), ~uint64_t(0)}};
  block->current->copies.push_back({shared, valid ? global : nullptr});
}
inline void cp_async16(void* shared, const void* global) { cp_async16(shared, global, true); }

inline void cp_async_commit() {
  emulation::Thread& self = *emulation::block->current;
  self.groups.push_back(self.copies.size());
}

template <int N>
void cp_async_wait() {
  using namespace emulation;
  Thread& self = *block->current;
  if (self.groups.size() <= size_t(N)) return;
  const size_t groups = self.groups.size() - N, landing = self.groups[groups - 1];
  for (size_t i = 0; i < landing; ++i) {
    const Copy& copy = self.copies[i];
    Bytes16 data = {};
    if (copy.from != nullptr) data = *static_cast<const Bytes16*>(copy.from);
    *static_cast<Bytes16*>(copy.to) = data;
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + (ptrdiff_t)landing);
  self.groups.erase(self.groups.begin(), self.groups.begin() + (ptrdiff_t)groups);
  for (size_t& end : self.groups) end -= landing;
}
