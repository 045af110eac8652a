// Log-probability of given tokens from logits that arrive one block of the vocabulary at a time: an online
// log-sum-exp.
#include <cmath>
#include <limits>

#include "functions.h"
#include "parallel.h"
#include "tensors.h"

using namespace rwkv;

namespace {

constexpr int64_t ROWS_PER_THREAD = 2;
constexpr int64_t PIECE = 512;  // logits summed in float before the sum goes on in double

template <class T> void take_row(const T* logits, int64_t n, float& maximum, double& total) {
  Wide most;
  for (auto& p : most.part) p = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE)
    for (int p = 0; p < PARTS; p++) most.part[p] = larger(load(logits + i + p * LANES), most.part[p]);
  float now = largest(most);
  for (; i < n; i++) {
    const float x = load(logits + i, 1)[0];
    now = x > now ? x : now;
  }
  now = maximum > now ? maximum : now;
  total *= (double)exp(splat(maximum - now))[0];
  for (int64_t begin = 0; begin < n; begin += PIECE)
    total += (double)row_sum(n - begin < PIECE ? n - begin : PIECE, [&](int64_t j, int64_t left) {
      return first_lanes(exp(load(logits + begin + j, left) - splat(now)), left);
    });
  maximum = now;
}

template <class T>
void take_block(const T* logits, int64_t rows, int64_t n, int64_t first_id, const int64_t* targets, float* maximum,
                double* total, float* target_logit, int threads) {
  parallel_ranges(rows, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (targets[t] < 0) continue;
      take_row(logits + t * n, n, maximum[t], total[t]);
      const int64_t i = targets[t] - first_id;
      if (i >= 0 && i < n) target_logit[t] = load(logits + t * n + i, 1)[0];
    }
  });
}

}  // namespace

// logits: [rows, n] of the ids first_id .. first_id + n - 1. Before the first block: maximum = -Inf, total = 0.
RWKV_API void rwkvmpi_logprob_block(const void* logits, int is_bf16, int64_t rows, int64_t n, int64_t first_id,
                                    const int64_t* targets, float* maximum, double* total, float* target_logit,
                                    int threads) {
  if (is_bf16)
    take_block((const bf16*)logits, rows, n, first_id, targets, maximum, total, target_logit, threads);
  else
    take_block((const float*)logits, rows, n, first_id, targets, maximum, total, target_logit, threads);
}

RWKV_API void rwkvmpi_logprob_finish(int64_t rows, const int64_t* targets, const float* maximum, const double* total,
                                     const float* target_logit, float* out) {
  for (int64_t t = 0; t < rows; t++)
    out[t] = targets[t] < 0 ? 0.0f : (float)((double)target_logit[t] - (double)maximum[t] - std::log(total[t]));
}
