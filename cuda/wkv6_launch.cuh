// Chooses the body by the shape of the heads.
#pragma once
#include "wkv6_general.cuh"
#include "wkv6_heads64.cuh"

namespace rwkv {
namespace {

template <typename E, bool MIX> int launch_wkv6(const Wkv6<E>& x, int device, void* stream) {
  const int error = check(x, MIX);
  if (error != OK || x.heads == 0 || grid_of(x).y == 0) return error;
  DeviceGuard guard(device);
  if (guard.error) return guard.error;
  if (x.n != 64) return heads_of_any_size::launch<E, MIX>(x, stream);
  using namespace heads_of_64;
  return LAUNCH((kernel<E, MIX>), grid_of(x), dim3(THREADS), sizeof(Shared), stream, x);
}

}  // namespace
}  // namespace rwkv
