// Layer norm; token shift: the normalised rows of a chunk mixed with the row before each, the shift rows of the state
// updated in place; the embedding.
#include "parallel.h"
#include "record.h"
#include "tensors.h"

namespace rwkv {
namespace {

constexpr int64_t ROWS_PER_THREAD = 16;  // below this a second thread is not worth its start

constexpr int TOGETHER = 4;  // rows normalised at a time

struct Norm {
  const float *x, *weight, *bias;
  int64_t channels;
  float eps;

  // Rows t .. t + count - 1, at most TOGETHER, to out.
  template <class T> RWKV_INLINE void rows(int64_t t, int64_t count, T* out) const {
    const float* p = x + t * channels;
    Moments m[TOGETHER];
    if (count == TOGETHER)
      moments(p, channels, channels, eps, m);
    else
      for (int64_t row = 0; row < count; row++) m[row] = moments(p + row * channels, channels, eps);
    for (int64_t row = 0; row < count; row++, p += channels, out += channels) {
      int64_t i = 0;
      for (; i + LANES <= channels; i += LANES)
        store(out + i, normalised(load(p + i), m[row], load(weight + i), load(bias + i)));
      if (const int64_t left = channels - i)
        store(out + i, normalised(load(p + i, left), m[row], load(weight + i, left), load(bias + i, left)), left);
    }
  }
};

struct Shift {
  float* rows;  // of every segment: the normalised row before its first
  int64_t stride;
  float* of(int64_t segment) const { return rows + segment * stride; }
};

// Calls f(t, u, before) for every row t, with the normalised row u and the one before it in its segment (u itself for a
// row outside every segment), and leaves every segment's last u in its shift row.
template <class F>
void shifted_rows(const Norm& norm, const Segments& segments, const Shift& shift, int64_t tokens, int threads, F f) {
  const int64_t channels = norm.channels, row_bytes = channels * sizeof(float);
  const Parts parts(tokens, ROWS_PER_THREAD, threads);
  parallel_parts(parts, threads, [&](int64_t begin, int64_t end) {
    // Normalised rows, in turns at the front and behind, so that the last of the previous ones is still there.
    float *now = thread_scratch(2 * TOGETHER * channels), *other = now + TOGETHER * channels;
    const float* before = other;
    int64_t d = segments.at_or_after(begin);
    if (d < segments.count && segments.first(d) < begin) norm.rows(begin - 1, 1, other);
    for (int64_t group = begin; group < end; group += TOGETHER) {
      const int64_t count = end - group < TOGETHER ? end - group : TOGETHER;
      norm.rows(group, count, now);
      for (int64_t t = group; t < group + count; t++) {
        const float* u = now + (t - group) * channels;
        if (d == segments.count || t < segments.first(d)) {
          f(t, u, u);
        } else {
          f(t, u, t == segments.first(d) ? shift.of(d) : before);
          if (t == segments.end(d) - 1) {
            // Where the segment began in another thread's part, that thread may not have read its shift row yet.
            if (segments.first(d) >= begin) std::memcpy(shift.of(d), u, row_bytes);
            d++;
          }
        }
        before = u;
      }
      std::swap(now, other);
    }
  });
  FlushDenormals guard;
  for (int part = 1; part < parts.count; part++) {
    const int64_t d = segments.at_or_after(parts.begin(part));
    if (d < segments.count && segments.first(d) < parts.begin(part)) norm.rows(segments.end(d) - 1, 1, shift.of(d));
  }
}

// out[m] = u + (before - u) * mixes[m]
template <class T>
RWKV_INLINE void mix_row(const float* u, const float* before, const float* mixes, T* out, int64_t mix_count,
                         int64_t channels, int64_t mix_stride) {
  int64_t i = 0;
  for (; i + 2 * LANES <= channels; i += 2 * LANES) {
    const vf u0 = load(u + i), u1 = load(u + i + LANES), d0 = load(before + i) - u0, d1 = load(before + i + LANES) - u1;
    const float* mix = mixes + i;
    T* to = out + i;
    for (int64_t m = 0; m < mix_count; m++, mix += channels, to += mix_stride)
      store_pair(to, fma(d0, load(mix), u0), fma(d1, load(mix + LANES), u1));
  }
  for (; i < channels; i += LANES) {
    const int64_t left = channels - i;
    const vf now = load(u + i, left), d = load(before + i, left) - now;
    for (int64_t m = 0; m < mix_count; m++)
      store(out + m * mix_stride + i, fma(d, load(mixes + m * channels + i, left), now), left);
  }
}

}  // namespace
}  // namespace rwkv

using namespace rwkv;

// x: [rows, channels]; out the same, float or bfloat16.
RWKV_API void rwkvmpi_layer_norm(const float* x, const float* weight, const float* bias, void* out, int out_bf16,
                                 int64_t rows, int64_t channels, float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  parallel_ranges(rows, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += TOGETHER) {
      const int64_t count = end - t < TOGETHER ? end - t : TOGETHER;
      if (out_bf16)
        norm.rows(t, count, (bf16*)out + t * channels);
      else
        norm.rows(t, count, (float*)out + t * channels);
    }
  });
}
RWKV_RECORDABLE(rwkvmpi_layer_norm)

// mixed[m] = u + d * mixes[m] with u = norm(x) and d = (u of the row before) - u: float or bfloat16 [mix_count, tokens,
// channels]; mixes: [mix_count, channels]; u and d: [tokens, channels], or both null. shift: a row for each of the
// segments, updated in place.
RWKV_API void rwkvmpi_shift_mix(const float* x, const float* weight, const float* bias, float* shift,
                                int64_t shift_stride, const float* mixes, const int32_t* rows, void* mixed,
                                int mixed_bf16, float* u_out, float* d_out, int64_t mix_count, int64_t tokens,
                                int64_t channels, int64_t segments, float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  shifted_rows(norm, {rows, segments}, {shift, shift_stride}, tokens, threads,
               [&](int64_t t, const float* u, const float* before) {
                 const int64_t at = t * channels, stride = tokens * channels;
                 if (mixed_bf16)
                   mix_row(u, before, mixes, (bf16*)mixed + at, mix_count, channels, stride);
                 else
                   mix_row(u, before, mixes, (float*)mixed + at, mix_count, channels, stride);
                 if (!u_out) return;
                 std::memcpy(u_out + at, u, channels * sizeof(float));
                 for (int64_t i = 0; i < channels; i += LANES)
                   store(d_out + at + i, load(before + i, channels - i) - load(u + i, channels - i), channels - i);
               });
}
RWKV_RECORDABLE(rwkvmpi_shift_mix)

namespace {

enum { FLOAT32, BFLOAT16, FLOAT16 };

struct Table {
  const char* data;  // of a file: perhaps not aligned to a value
  int kind;
  int64_t vocabulary, channels;

  int64_t row_bytes() const { return channels * (kind == FLOAT32 ? 4 : 2); }
  bool has(int64_t token) const { return token >= 0 && token < vocabulary; }
  void ask_for(int64_t token) const {
    if (has(token)) prefetch((const float*)(data + token * row_bytes()), row_bytes() / sizeof(float));
  }
  template <class T> void widen(int64_t token, float* out) const {
    const char* p = data + token * row_bytes();
    for (int64_t i = 0; i < channels; i += LANES) {
      const int64_t left = channels - i < LANES ? channels - i : LANES;
      T piece[LANES] = {};
      std::memcpy(piece, p + i * sizeof(T), left * sizeof(T));
      store(out + i, load(piece), left);
    }
  }
};

}  // namespace

// x[t] = row tokens[t] of the table [vocabulary, channels] (float32, bfloat16 or float16), normalised where weight is
// not null; 0 for a token outside the vocabulary.
RWKV_API void rwkvmpi_embed(const void* tokens, int tokens_int64, const void* table, int table_kind,
                            const float* weight, const float* bias, float* x, int64_t count, int64_t vocabulary,
                            int64_t channels, float eps, int threads) {
  const Norm norm = {x, weight, bias, channels, eps};
  const Table rows = {(const char*)table, table_kind, vocabulary, channels};
  const auto token = [&](int64_t t) {
    return tokens_int64 ? ((const int64_t*)tokens)[t] : (int64_t)((const int32_t*)tokens)[t];
  };
  parallel_ranges(count, ROWS_PER_THREAD, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (t + 2 < end) rows.ask_for(token(t + 2));
      float* out = x + t * channels;
      if (!rows.has(token(t))) {
        std::memset(out, 0, channels * sizeof(float));
        continue;
      }
      if (table_kind == FLOAT32) rows.widen<float>(token(t), out);
      if (table_kind == BFLOAT16) rows.widen<bf16>(token(t), out);
      if (table_kind == FLOAT16) rows.widen<fp16>(token(t), out);
      if (weight) norm.rows(t, 1, out);  // in place: a value is written after all that need it have been computed
    }
  });
}
RWKV_RECORDABLE(rwkvmpi_embed)
