// The body for 16-bit types whose rows divide into 16 bytes: tensor cores, so that 16 rows cost what one does.
//   Bytes: the matrix once, 2 N K; x comes from the cache, for every 32 outputs again.
//
// A block owns a run of outputs and takes 32 of them (see Layout) at a time. Its warps share the inputs out among
// themselves, 32 at a time in turn; in the end their sums are added in the order of the warps. Every lane copies what
// it will use itself to shared memory, three steps ahead, past the end of one 32 outputs into the next: 64 to 96 KiB
// of the matrix are on their way to each multiprocessor all the time, and no lane waits for another but at the sums.
//
// In m16n8k16 the rows of x are the 16 rows (missing ones are zeros) and 8 outputs the columns, so an output's bits are
// the same whatever else is computed with it. The mma's own order of the inputs is of no account as long as both sides
// have the same: each lane loads 8 neighbouring inputs and uses the first four for one mma, the others for the next.
#pragma once
#include "thin.cuh"

namespace rwkv {
namespace {
namespace thin_tensor {

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int TILE = 8;   // outputs
constexpr int STEP = 32;  // inputs
constexpr int SMALLEST_RUN = 4;

// How much is done at a time; it changes no bit. HALVES: 1 up to 8 rows of x, else 2; TILES of outputs; STAGES: steps
// that have room in shared memory.
template <int HALVES_, int TILES_, int STAGES_> struct Layout {
  static constexpr int HALVES = HALVES_, TILES = TILES_, STAGES = STAGES_, PASS = TILES * TILE;
  struct Shared {
    uint4 ring[STAGES][TILES + HALVES][THREADS];
    float sums[WARPS][8 * HALVES * PASS];
  };
  // Where a sum lies among its warp's, so that the 8 rows of a tile do not meet in the same banks.
  __device__ static int place(int row, int output) { return row * PASS + (output ^ (row % TILES * TILE)); }
};

// Where a block's outputs begin: the first `rest` blocks have one more than the others.
__device__ __forceinline__ int block_begin(int run, int rest, int block) {
  return block * run + (block < rest ? block : rest);
}

template <class E, class L> __global__ void __launch_bounds__(THREADS, 1) kernel(Thin<E> p) {
  constexpr int HALVES = L::HALVES, TILES = L::TILES, STAGES = L::STAGES, PASS = L::PASS;
  DYNAMIC_SHARED(typename L::Shared, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, part = lane % 4;  // the mma's row or column, and its inputs
  const int begin = block_begin(p.run, p.rest, blockIdx.x), end = block_begin(p.run, p.rest, blockIdx.x + 1);
  const int all_steps = ((int)p.inputs + STEP - 1) / STEP;
  const int steps = (all_steps + WARPS - 1 - warp) / WARPS;  // of this warp, for each 32 outputs

  // What is copied next: from where, and how much is left of the inputs and of the outputs.
  const int first_input = warp * STEP + part * 8;
  const E* from_w = p.w + (int64_t)(begin + group) * p.inputs + first_input;
  const E* from_x = p.x + group * p.x_stride + first_input;
  int inputs_left = (int)p.inputs - first_input, outputs_left = end - begin - group, copied = 0, copied_stage = 0;
  const auto copy_next = [&] {
    if (copied < steps && outputs_left > -group) {
      auto& to = shared->ring[copied_stage];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        cp_async16(&to[tile][threadIdx.x], from_w + tile * TILE * p.inputs,
                   inputs_left > 0 && outputs_left > tile * TILE);
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        cp_async16(&to[TILES + half][threadIdx.x], from_x + half * 8 * p.x_stride,
                   inputs_left > 0 && half * 8 + group < (int)p.rows);
      copied_stage = (copied_stage + 1) % STAGES;
      from_w += WARPS * STEP;
      from_x += WARPS * STEP;
      inputs_left -= WARPS * STEP;
      if (++copied == steps) {
        copied = 0;
        outputs_left -= PASS;
        from_w += PASS * p.inputs - steps * WARPS * STEP;
        from_x -= steps * WARPS * STEP;
        inputs_left += steps * WARPS * STEP;
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy_next();

  int stage = 0;
  for (int pass = begin; pass < end; pass += PASS) {
    float d[TILES][4] = {};
    for (int step = 0; step < steps; step++) {
      cp_async_wait<STAGES - 2>();
      const auto& from = shared->ring[stage];
      uint4 x[2] = {from[TILES][threadIdx.x], make_uint4(0, 0, 0, 0)};
      if constexpr (HALVES == 2) x[1] = from[TILES + 1][threadIdx.x];
      uint4 w[TILES];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) w[tile] = from[tile][threadIdx.x];
      stage = (stage + 1) % STAGES;
      const uint32_t first[4] = {x[0].x, x[1].x, x[0].y, x[1].y}, second[4] = {x[0].z, x[1].z, x[0].w, x[1].w};
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint32_t now[2] = {w[tile].x, w[tile].y}, then[2] = {w[tile].z, w[tile].w};
        mma_16816<E>(d[tile], first, now);
        mma_16816<E>(d[tile], second, then);
      }
      copy_next();  // into the stage before this one, which has been read
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        *(float2*)&shared->sums[warp][L::place(half * 8 + group, tile * TILE + part * 2)] =
            make_float2(d[tile][2 * half], d[tile][2 * half + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < (int)p.rows * PASS; i += THREADS) {
      const int at = L::place(i / PASS, i % PASS);
      float sum = shared->sums[0][at];
#pragma unroll
      for (int other = 1; other < WARPS; other++) sum += shared->sums[other][at];
      const int n = pass + i % PASS;
      if (n < end) p.finish(i / PASS, n, sum);
    }
    __syncthreads();
  }
}

template <class E, class L> int launch_layout(const Thin<E>& p, unsigned blocks, void* stream) {
  return LAUNCH((kernel<E, L>), dim3(blocks), dim3(THREADS), sizeof(typename L::Shared), stream, p);
}

template <class E, int HALVES> int launch_halves(const Thin<E>& p, unsigned blocks, int shared_bytes, void* stream) {
  using Wide = Layout<HALVES, 4, 4>;                      // 64 to 96 KiB of the matrix on their way
  using Narrow = Layout<HALVES, 2, HALVES == 1 ? 8 : 6>;  // few outputs to a block, but more steps ahead
  using Frugal = Layout<HALVES, 2, 2>;                    // where a block gets less than Hopper's shared memory
  constexpr size_t wide = sizeof(typename Wide::Shared), narrow = sizeof(typename Narrow::Shared);
  if (shared_bytes < (int)(wide > narrow ? wide : narrow)) return launch_layout<E, Frugal>(p, blocks, stream);
  if (p.run + (p.rest > 0) <= Narrow::PASS) return launch_layout<E, Narrow>(p, blocks, stream);
  return launch_layout<E, Wide>(p, blocks, stream);
}

// processors, shared_bytes: how many multiprocessors there are, and what a block can have of shared memory.
template <class E> int launch(Thin<E> p, int processors, int shared_bytes, void* stream) {
  const int64_t runs = (p.outputs + SMALLEST_RUN - 1) / SMALLEST_RUN;
  const unsigned blocks(runs < processors ? runs : processors);
  p.run = int(p.outputs / blocks);
  p.rest = int(p.outputs % blocks);
  return p.rows <= 8 ? launch_halves<E, 1>(p, blocks, shared_bytes, stream)
                     : launch_halves<E, 2>(p, blocks, shared_bytes, stream);
}

}  // namespace thin_tensor
}  // namespace
}  // namespace rwkv
