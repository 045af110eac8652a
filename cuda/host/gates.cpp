// What stands between the matrix products and the WKV recurrence: decays, gates, keys, group norms.
#include "functions.h"
#include "parallel.h"
#include "tensors.h"

using namespace rwkv;

namespace {

constexpr int64_t ROWS_PER_THREAD = 16;

// f(row, lanes left) for the registers of `count` values beginning at `at`
template <class F> RWKV_INLINE void each_register(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += LANES) f(i, count - i);
}

}  // namespace

// RWKV-7: from the products k, v, w_lin, a_lin, v_lin [tokens, heads * n] (float or bfloat16, bit i of bf16_mask for
// the i-th of them) to the operands of WKV-7. v_first, v_lin, v0 are null in the first layer.
//   w = exp(-e^(-1/2) sigmoid(w0 + w_lin)),  a = sigmoid(a0 + a_lin),  kk = k*k_k of length 1 per head,
//   k' = k (1 + (a-1) k_a),  v' = v + (v_first - v) sigmoid(v0 + v_lin);  out: w, k', v', -kk, kk*a
RWKV_API void rwkvmpi_v7_prepare(const void* k_in, const void* v_in, const void* w_lin, const void* a_lin, const void* v_lin,
                                 int bf16_mask, const float* v_first, const float* w0, const float* a0, const float* v0,
                                 const float* k_k, const float* k_a, float* w_out, float* k_out, float* v_out,
                                 float* minus_kk, float* kk_a, int64_t tokens, int64_t heads, int64_t n, int threads) {
  const Source ks = {k_in, bf16_mask & 1}, vs = {v_in, bf16_mask & 2}, ws = {w_lin, bf16_mask & 4},
               as = {a_lin, bf16_mask & 8}, vls = {v_lin, bf16_mask & 16};
  const vf one = splat(1.0f), decay = splat(-0.6065306597126334f);
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < heads * n; c += n) {
        const int64_t at = t * heads * n + c;
        const float squares = row_sum(n, [&](int64_t i, int64_t left) {
          const vf kk = ks(at + i, left) * load(k_k + c + i, left);
          return kk * kk;
        });
        const float length = __builtin_sqrtf(squares);
        const vf inverse = splat(1.0f / (length < 1e-12f ? 1e-12f : length));  // NaN stays
        each_register(n, [&](int64_t i, int64_t left) {
          const int64_t o = at + i, p = c + i;
          const vf k = ks(o, left), kk = k * load(k_k + p, left) * inverse;
          const vf a = sigmoid(load(a0 + p, left) + as(o, left));
          store(w_out + o, exp(decay * sigmoid(load(w0 + p, left) + ws(o, left))), left);
          store(k_out + o, k * fma(a - one, load(k_a + p, left), one), left);
          store(minus_kk + o, -kk, left);
          store(kk_a + o, kk * a, left);
          vf v = vs(o, left);
          if (v_first) v = fma(load(v_first + o, left) - v, sigmoid(load(v0 + p, left) + vls(o, left)), v);
          store(v_out + o, v, left);
        });
      }
  });
}

// RWKV-7 behind WKV: (groupnorm(y) + (sum over head of r k r_k) v) * g; r (bit 0 of bf16_mask) and g (bit 1) may be
// bfloat16.
RWKV_API void rwkvmpi_v7_output(const float* y, const void* r_in, const float* k, const float* v, const void* g_in,
                                int bf16_mask, const float* r_k, const float* weight, const float* bias, void* out,
                                int out_bf16, int64_t tokens, int64_t heads, int64_t n, float eps, int threads) {
  const Source rs = {r_in, bf16_mask & 1}, gs = {g_in, bf16_mask & 2};
  const Sink sink = {out, out_bf16};
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < heads * n; c += n) {
        const int64_t at = t * heads * n + c;
        const Moments m = moments(y + at, n, eps);
        const vf bonus = splat(row_sum(n, [&](int64_t i, int64_t left) {
          return rs(at + i, left) * load(k + at + i, left) * load(r_k + c + i, left);
        }));
        each_register(n, [&](int64_t i, int64_t left) {
          const int64_t o = at + i, p = c + i;
          const vf normal = normalised(load(y + o, left), m, load(weight + p, left), load(bias + p, left));
          sink(o, fma(bonus, load(v + o, left), normal) * gs(o, left), left);
        });
      }
  });
}

// RWKV-5, 6 behind WKV: groupnorm(y) * silu(gate); gate may be null or bfloat16.
RWKV_API void rwkvmpi_group_norm_gate(const float* y, const void* gate, int gate_bf16, const float* weight,
                                      const float* bias, void* out, int out_bf16, int64_t tokens, int64_t heads, int64_t n,
                                      float eps, int threads) {
  const Source gs = {gate, gate_bf16};
  const Sink sink = {out, out_bf16};
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < heads * n; c += n) {
        const int64_t at = t * heads * n + c;
        const Moments m = moments(y + at, n, eps);
        each_register(n, [&](int64_t i, int64_t left) {
          vf x = normalised(load(y + at + i, left), m, load(weight + c + i, left), load(bias + c + i, left));
          if (gate) x = x * silu(gs(at + i, left));
          sink(at + i, x, left);
        });
      }
  });
}

// RWKV-6: exp(-exp(time_decay + w_lin)).
RWKV_API void rwkvmpi_v6_decay(const void* w_lin, int w_bf16, const float* time_decay, float* out, int64_t tokens,
                               int64_t channels, int threads) {
  const Source ws = {w_lin, w_bf16};
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      each_register(channels, [&](int64_t i, int64_t left) {
        store(out + t * channels + i, exp(-exp(load(time_decay + i, left) + ws(t * channels + i, left))), left);
      });
  });
}
