// The head: log-probabilities of given tokens. The logits of 512 ids at a time exist while they are in the first-level
// cache; of each such block a maximum and a sum of exponentials remain, which are put together in the order of the ids.
#include <cmath>
#include <limits>

#include "functions.h"
#include "parallel.h"
#include "product.h"
#include "product_scratch.h"
#include "tensors.h"

using namespace rwkv;

namespace {

constexpr int64_t BLOCK_PANELS = 16, BLOCK = BLOCK_PANELS * PANEL;
constexpr int64_t ROWS_PER_THREAD = 16;

// Of a row's logits in one block: e^maximum * sum is the sum of their exponentials.
struct Partial {
  float maximum, sum;
};

RWKV_INLINE Partial partial(const float* logits, int64_t n) {
  Wide most;
  for (auto& p : most.part) p = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE)
    for (int p = 0; p < PARTS; p++) most.part[p] = larger(load(logits + i + p * LANES), most.part[p]);
  float maximum = largest(most);
  for (; i < n; i++) maximum = logits[i] > maximum ? logits[i] : maximum;
  return {maximum, row_sum(n, [&](int64_t j, int64_t left) {
            return first_lanes(exp(load(logits + j, left) - splat(maximum)), left);
          })};
}

struct LogProbabilities final : Receiver {
  int64_t vocabulary, blocks;
  const int64_t *index, *targets;  // row t of the product belongs to targets[index[t]]
  Partial* partials;               // [rows, blocks]
  float* target_logits;

  void take(int64_t row, int64_t rows, int64_t panel, int64_t panels, const float* sums,
            int64_t stride) const override {
    for (int64_t i = 0; i < rows; i++, sums += stride) {
      const int64_t target = targets[index[row + i]];
      for (int64_t p = 0; p < panels; p += BLOCK_PANELS) {
        const int64_t first = (panel + p) * PANEL;
        const int64_t n = vocabulary - first < BLOCK ? vocabulary - first : BLOCK;
        partials[(row + i) * blocks + first / BLOCK] = partial(sums + p * PANEL, n);
        if (target >= first && target < first + n) target_logits[row + i] = sums[p * PANEL + target - first];
      }
    }
  }

  float put_together(int64_t row) const {
    const Partial* own = partials + row * blocks;
    float maximum = own[0].maximum;
    for (int64_t b = 1; b < blocks; b++) maximum = own[b].maximum > maximum ? own[b].maximum : maximum;
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b += LANES) {
      const int64_t count = blocks - b < LANES ? blocks - b : LANES;
      float below[LANES] = {};
      for (int64_t i = 0; i < count; i++) below[i] = own[b + i].maximum - maximum;
      store(below, exp(load(below)));
      for (int64_t i = 0; i < count; i++) total += (double)below[i] * (double)own[b + i].sum;
    }
    return (float)((double)target_logits[row] - (double)maximum - std::log(total));
  }
};

}  // namespace

// out[t] = ln softmax(x[t] w^T)[targets[t]], 0 where the target is -1; x: `rows` rows of `inputs` elements, `x_stride`
// apart, float for kind FLOAT32, else bfloat16; data: packed weights of `outputs` ids (product.h).
RWKV_API void rwkvmpi_head_logprobs(int kind, const void* x, int64_t x_stride, int64_t rows, const void* data,
                                    int64_t outputs, int64_t inputs, const int64_t* targets, float* out, int threads) {
  static thread_local Scratch index_scratch, partials_scratch, logits_scratch;
  int64_t *index = index_scratch.get<int64_t>(rows), count = 0;
  for (int64_t t = 0; t < rows; t++) {
    out[t] = 0.0f;
    if (targets[t] >= 0) index[count++] = t;
  }
  if (!count) return;
  LogProbabilities receiver;
  receiver.vocabulary = outputs;
  receiver.blocks = (outputs + BLOCK - 1) / BLOCK;
  receiver.index = index;
  receiver.targets = targets;
  receiver.partials = partials_scratch.get<Partial>(count * receiver.blocks);
  receiver.target_logits = logits_scratch.get<float>(count);
  multiply({x, x_stride, count, index}, {kind, outputs, inputs, (const char*)data}, receiver, BLOCK_PANELS, threads);
  parallel_ranges(count, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) out[index[t]] = receiver.put_together(t);
  });
}
