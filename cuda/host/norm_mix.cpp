// Layer norm, token shift and the mixes of a row with the row before it.
#include "parallel.h"
#include "tensors.h"

namespace rwkv {
namespace {

struct Norm {
  const float *x, *weight, *bias;
  int64_t channels;
  float eps;

  RWKV_INLINE void row(int64_t t, Sink out, int64_t out_at) const {
    const float* p = x + t * channels;
    const Moments m = moments(p, channels, eps);
    for (int64_t i = 0; i < channels; i += LANES) {
      const int64_t left = channels - i;
      out(out_at + i, normalised(load(p + i, left), m, load(weight + i, left), load(bias + i, left)), left);
    }
  }
  void row(int64_t t, float* out) const { row(t, Sink{out, 0}, 0); }
};

// For t in begin..end-1 calls f(t, u, before) with the normalised row u and the row before it in its segment (for the
// first row of a segment: shift[segment]; u itself for a row outside every segment). Fills shift_out with every
// segment's last u.
template <class F>
void shifted_rows(const Norm& norm, const std::vector<int32_t>& segment_of, const Segments& segments, const float* shift,
                  float* shift_out, int64_t begin, int64_t end, F f) {
  const int64_t channels = norm.channels;
  std::vector<float> memory(2 * channels);
  float *u = memory.data(), *before = memory.data() + channels;
  if (begin < end && begin > 0) norm.row(begin - 1, before);
  for (int64_t t = begin; t < end; t++) {
    norm.row(t, u);
    const int64_t d = segment_of[t];
    if (d < 0) {
      f(t, u, u);
    } else {
      f(t, u, t == segments.first(d) ? shift + d * channels : before);
      if (t == segments.first(d) + segments.length(d) - 1)
        std::memcpy(shift_out + d * channels, u, channels * sizeof(float));
    }
    std::swap(u, before);
  }
}

constexpr int64_t ROWS_PER_THREAD = 16;  // below this a second thread is not worth its start

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// x: [rows, channels]; out the same, float or bfloat16.
RWKV_API void rwkvmpi_layer_norm(const float* x, const float* weight, const float* bias, void* out, int out_bf16,
                                 int64_t rows, int64_t channels, float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  parallel_ranges(rows, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) norm.row(t, Sink{out, out_bf16}, t * channels);
  });
}

// u = norm(x) and d = (u of the row before) - u: [tokens, channels]; shift, shift_out: [segments, channels].
RWKV_API void rwkvmpi_norm_shift(const float* x, const float* weight, const float* bias, const float* shift,
                                 const int32_t* rows, float* u_out, float* d_out, float* shift_out, int64_t tokens,
                                 int64_t channels, int64_t segment_count, float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  const Segments segments = {rows, segment_count};
  const auto segment_of = segments.of_row(tokens);
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    shifted_rows(norm, segment_of, segments, shift, shift_out, begin, end,
                 [&](int64_t t, const float* u, const float* before) {
                   std::memcpy(u_out + t * channels, u, channels * sizeof(float));
                   for (int64_t i = 0; i < channels; i += LANES) {
                     const int64_t left = channels - i;
                     store(d_out + t * channels + i, load(before + i, left) - load(u + i, left), left);
                   }
                 });
  });
}

// out[m] = u + d * mixes[m], without u and d ever being stored: out [mix_count, tokens, channels], mixes [mix_count,
// channels].
RWKV_API void rwkvmpi_norm_shift_mix(const float* x, const float* weight, const float* bias, const float* shift,
                                     const float* mixes, const int32_t* rows, void* out, int out_bf16, float* shift_out,
                                     int64_t mix_count, int64_t tokens, int64_t channels, int64_t segment_count,
                                     float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  const Segments segments = {rows, segment_count};
  const auto segment_of = segments.of_row(tokens);
  const Sink sink = {out, out_bf16};
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    shifted_rows(norm, segment_of, segments, shift, shift_out, begin, end,
                 [&](int64_t t, const float* u, const float* before) {
                   for (int64_t i = 0; i < channels; i += LANES) {
                     const int64_t left = channels - i;
                     const vf now = load(u + i, left), d = load(before + i, left) - now;
                     for (int64_t m = 0; m < mix_count; m++)
                       sink((m * tokens + t) * channels + i, fma(d, load(mixes + m * channels + i, left), now), left);
                   }
                 });
  });
}

// out[m] = u + d * (mixes[m] + delta[m]); delta [mix_count, tokens, channels] or null.
RWKV_API void rwkvmpi_mix(const float* u, const float* d, const float* mixes, const void* delta, int delta_bf16, void* out,
                          int out_bf16, int64_t mix_count, int64_t tokens, int64_t channels, int threads) {
  const Sink sink = {out, out_bf16};
  const Source add = {delta, delta_bf16};
  parallel_ranges(tokens, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < mix_count; m++)
      for (int64_t t = begin; t < end; t++)
        for (int64_t i = 0; i < channels; i += LANES) {
          const int64_t left = channels - i, at = t * channels + i, out_at = m * tokens * channels + at;
          vf mix = load(mixes + m * channels + i, left);
          if (delta) mix = mix + add(out_at, left);
          sink(out_at, fma(load(d + at, left), mix, load(u + at, left)), left);
        }
  });
}
