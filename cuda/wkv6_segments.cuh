// The segments of a chunk, read from device memory, and the rows that none of them holds.
#pragma once
#include "device.cuh"

namespace rwkv {
namespace {

// Whether the tensors lie on boundaries of their elements.
template <typename... E> bool hold_elements(const E*... p) { return (((uintptr_t)p % sizeof(E) == 0) && ...); }

struct Segment {
  int64_t first, count;
};

// Segment d; empty where it is padding, or does not lie within the chunk. rows null: the chunk in equal parts.
__device__ __forceinline__ Segment segment_of(const int32_t* rows, int64_t d, int64_t segments, int64_t tokens) {
  if (!rows) return {d * (tokens / segments), tokens / segments};
  const int64_t first = rows[2 * d], count = rows[2 * d + 1];
  if (first < 0 || count <= 0 || first + count > tokens) return {0, 0};
  return {first, count};
}

// The grid is [units of work per segment, segments + gap_parts]; the blocks beyond the segments clear the rows that no
// segment holds, GAP_ROWS of them each, so one launch does it all without knowing the segments.
constexpr int GAP_ROWS = 16;
inline int64_t gap_parts(const int32_t* rows, int64_t segments, int64_t tokens, int64_t units) {
  return rows || segments == 0 ? (tokens + units * GAP_ROWS - 1) / (units * GAP_ROWS) : 0;
}

// One warp per row, whose lanes share the segments.
template <typename E>
__device__ void clear_gaps(E* out, int64_t columns, const int32_t* rows, int64_t segments, int64_t tokens) {
  const int64_t part = ((int64_t)blockIdx.y - segments) * gridDim.x + blockIdx.x;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t row = part * GAP_ROWS + threadIdx.x / 32; row < (part + 1) * GAP_ROWS && row < tokens; row += warps) {
    bool held = false;
    for (int64_t d = lane; d < segments; d += 32) {
      const Segment segment = segment_of(rows, d, segments, tokens);
      held |= row >= segment.first && row < segment.first + segment.count;
    }
    if (__ballot_sync(0xffffffffu, held)) continue;
    for (int64_t i = lane; i < columns; i += 32) out[row * columns + i] = from_float<E>(0.0f);
  }
}

}  // namespace
}  // namespace rwkv
