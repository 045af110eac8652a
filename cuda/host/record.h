// A second entry point for every exported function, which takes its arguments from an array of 8-byte slots: so that a
// recorded list of calls can be replayed by one C call (see replay.cpp), whatever their signatures.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace rwkv {

template <class T> RWKV_INLINE T from_slot(const uint64_t& slot) {
  static_assert(std::is_pointer<T>::value || std::is_integral<T>::value || std::is_same<T, float>::value,
                "recordable functions take pointers, whole numbers and floats");
  if constexpr (std::is_same<T, float>::value) {  // a slot holds a double
    double wide;
    std::memcpy(&wide, &slot, sizeof wide);
    return (float)wide;
  } else if constexpr (std::is_pointer<T>::value) {
    return (T)(uintptr_t)slot;
  } else {
    return (T)(int64_t)slot;
  }
}

template <class... A, std::size_t... I>
RWKV_INLINE void call_with_slots(void (*f)(A...), const uint64_t* slots, std::index_sequence<I...>) {
  f(from_slot<A>(slots[I])...);
}
template <class... A> RWKV_INLINE void call_with_slots(void (*f)(A...), const uint64_t* slots) {
  call_with_slots(f, slots, std::make_index_sequence<sizeof...(A)>{});
}

}  // namespace rwkv

#define RWKV_RECORDABLE(name) \
  RWKV_API void name##_slots(const uint64_t* slots) { rwkv::call_with_slots(name, slots); }
