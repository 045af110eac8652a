// WKV-7 for training on the CPU: the forward pass that remembers, and the backward pass.
//
//   S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t      S is [value, key]
//
// The forward pass stores the state before every `every`-th token; the backward pass recomputes the states
// between two of them, so memory grows with T / every and nothing is ever divided by a decay.
//
// Inside, a state is kept key first, [key][value padded to 16 lanes]: sums over keys then run down the vector
// lanes, and only the five gradients that are indexed by key need a sum across lanes. One call of `Body` works
// on one head of one sequence; heads and sequences are shared out over the threads, and no sum crosses them,
// so the bits do not depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // training needs speed here; nothing is compared bit by bit across builds
#endif

namespace {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));

inline float lane_sum(const Vec &x) {
    typedef float V8 __attribute__((vector_size(32)));
    typedef float V4 __attribute__((vector_size(16)));
    V8 lo8, hi8;
    std::memcpy(&lo8, &x, 32);
    std::memcpy(&hi8, reinterpret_cast<const char *>(&x) + 32, 32);
    const V8 s8 = lo8 + hi8;
    V4 lo4, hi4;
    std::memcpy(&lo4, &s8, 16);
    std::memcpy(&hi4, reinterpret_cast<const char *>(&s8) + 16, 16);
    const V4 s4 = lo4 + hi4;
    return (s4[0] + s4[1]) + (s4[2] + s4[3]);
}

struct Inputs {
    const float *r, *w, *k, *v, *a, *b;
};

struct Shape {
    int64_t batch, tokens, heads, size, every;
    int64_t marks() const { return (tokens + every - 1) / every; }
};

struct AlignedDelete {
    void operator()(Vec *p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<Vec[], AlignedDelete>;

Scratch scratch(int64_t vectors) {
    return Scratch(static_cast<Vec *>(::operator new[](static_cast<size_t>(vectors) * sizeof(Vec), std::align_val_t(64))));
}

// NV: vectors per row of values. N may be smaller than 16 * NV; the padding lanes stay zero.
template <int NV>
struct Body {
    static void load(Vec *out, const float *in, int64_t n) {
        float row[NV * kLanes] = {};
        std::memcpy(row, in, static_cast<size_t>(n) * sizeof(float));
        std::memcpy(out, row, sizeof(row));
    }

    static void store(float *out, const Vec *in, int64_t n) { std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float)); }

    // [value][key] in memory -> [key][value] vectors, and back.
    static void load_state(Vec *s, const float *state, int64_t n) {
        float *flat = reinterpret_cast<float *>(s);
        std::memset(flat, 0, static_cast<size_t>(n) * NV * sizeof(Vec));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) flat[j * NV * kLanes + i] = state[i * n + j];
    }

    static void store_state(float *state, const Vec *s, int64_t n) {
        const float *flat = reinterpret_cast<const float *>(s);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) state[i * n + j] = flat[j * NV * kLanes + i];
    }

    // One token: `next` = the state after it (may be `s` itself), `sa` = s a, and y = next r when y is wanted.
    template <bool WithOutput>
    static void step(Vec *next, const Vec *s, const Inputs &x, int64_t at, int64_t n, Vec *sa, float *y) {
        Vec v[NV], dot[NV] = {}, out[NV] = {};
        load(v, x.v + at, n);
        for (int64_t j = 0; j < n; ++j) {
            const float a = x.a[at + j];
            for (int q = 0; q < NV; ++q) dot[q] += s[j * NV + q] * a;
        }
        for (int64_t j = 0; j < n; ++j) {
            const float w = x.w[at + j], b = x.b[at + j], k = x.k[at + j], r = WithOutput ? x.r[at + j] : 0.0f;
            for (int q = 0; q < NV; ++q) {
                const Vec now = s[j * NV + q] * w + (dot[q] * b + v[q] * k);
                next[j * NV + q] = now;
                if (WithOutput) out[q] += now * r;
            }
        }
        for (int q = 0; q < NV; ++q) sa[q] = dot[q];
        if (WithOutput) store(y, out, n);
    }

    static void forward(const Shape &p, const Inputs &x, const float *state, float *y, float *last, float *marks, int64_t item) {
        const int64_t n = p.size, row = item / p.heads, head = item % p.heads;
        Scratch s = scratch(n * NV);
        Vec sa[NV];
        load_state(s.get(), state + item * n * n, n);
        for (int64_t t = 0; t < p.tokens; ++t) {
            if (t % p.every == 0) store_mark(marks, p, item, t / p.every, s.get());
            const int64_t at = ((row * p.tokens + t) * p.heads + head) * n;
            step<true>(s.get(), s.get(), x, at, n, sa, y + at);
        }
        store_state(last + item * n * n, s.get(), n);
    }

    // A stored state keeps the key-first order, without the padding.
    static void store_mark(float *marks, const Shape &p, int64_t item, int64_t mark, const Vec *s) {
        float *out = marks + (item * p.marks() + mark) * p.size * p.size;
        for (int64_t j = 0; j < p.size; ++j) store(out + j * p.size, s + j * NV, p.size);
    }

    static void backward(const Shape &p, const Inputs &x, const float *marks, const float *dy, const float *dlast,
                         float *const *grads, float *dstate, int64_t item) {
        const int64_t n = p.size, row = item / p.heads, head = item % p.heads, plane = n * NV;
        Scratch history = scratch((p.every + 1) * plane), products = scratch(p.every * NV), gradient = scratch(plane);
        Vec *g = gradient.get();  // the gradient of the state after the token at hand
        load_state(g, dlast + item * n * n, n);
        for (int64_t mark = p.marks() - 1; mark >= 0; --mark) {
            const int64_t begin = mark * p.every, end = begin + p.every < p.tokens ? begin + p.every : p.tokens;
            const float *saved = marks + (item * p.marks() + mark) * n * n;
            for (int64_t j = 0; j < n; ++j) load(history.get() + j * NV, saved + j * n, n);
            for (int64_t t = begin; t < end; ++t) {
                Vec *s = history.get() + (t - begin) * plane;
                const int64_t at = ((row * p.tokens + t) * p.heads + head) * n;
                step<false>(s + plane, s, x, at, n, products.get() + (t - begin) * NV, nullptr);
            }
            for (int64_t t = end - 1; t >= begin; --t) {
                const Vec *before = history.get() + (t - begin) * plane;
                const int64_t at = ((row * p.tokens + t) * p.heads + head) * n;
                step_back(g, before, before + plane, products.get() + (t - begin) * NV, x, dy, grads, at, n);
            }
        }
        store_state(dstate + item * n * n, g, n);
    }

    static void step_back(Vec *g, const Vec *before, const Vec *after, const Vec *products, const Inputs &x, const float *dy,
                          float *const *grads, int64_t at, int64_t n) {
        float *const dr = grads[0] + at, *const dw = grads[1] + at, *const dk = grads[2] + at, *const dv = grads[3] + at,
                     *const da = grads[4] + at, *const db = grads[5] + at;
        Vec v[NV], out[NV], sa[NV], sum_v[NV] = {}, dsa[NV] = {};
        load(v, x.v + at, n);
        load(out, dy + at, n);
        for (int q = 0; q < NV; ++q) sa[q] = products[q];
        for (int64_t j = 0; j < n; ++j) {
            const float r = x.r[at + j], k = x.k[at + j], b = x.b[at + j];
            Vec pr = {}, pw = {}, pk = {}, pb = {};
            for (int q = 0; q < NV; ++q) {
                const Vec now = g[j * NV + q] + out[q] * r;
                g[j * NV + q] = now;
                sum_v[q] += now * k;
                dsa[q] += now * b;
                pr += after[j * NV + q] * out[q];
                pw += before[j * NV + q] * now;
                pk += now * v[q];
                pb += now * sa[q];
            }
            dr[j] = lane_sum(pr);
            dw[j] = lane_sum(pw);
            dk[j] = lane_sum(pk);
            db[j] = lane_sum(pb);
        }
        store(dv, sum_v, n);
        for (int64_t j = 0; j < n; ++j) {
            const float w = x.w[at + j], a = x.a[at + j];
            Vec pa = {};
            for (int q = 0; q < NV; ++q) {
                pa += before[j * NV + q] * dsa[q];
                g[j * NV + q] = g[j * NV + q] * w + dsa[q] * a;
            }
            da[j] = lane_sum(pa);
        }
    }
};

template <int NV>
void run_forward(const Shape &p, const Inputs &x, const float *state, float *y, float *last, float *marks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < p.batch * p.heads; ++item) Body<NV>::forward(p, x, state, y, last, marks, item);
}

template <int NV>
void run_backward(const Shape &p, const Inputs &x, const float *marks, const float *dy, const float *dlast,
                  float *const *grads, float *dstate, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < p.batch * p.heads; ++item)
        Body<NV>::backward(p, x, marks, dy, dlast, grads, dstate, item);
}

}  // namespace

// r, w, k, v, a, b, y: [B, T, H, N]; state, last: [B, H, N(value), N(key)]; marks: [B, H, ceil(T / every), N, N].
// Returns 0, or 1 when the head size is over 256.
extern "C" int rwkvmpi_wkv7_train_forward(const float *r, const float *w, const float *k, const float *v, const float *a,
                                          const float *b, const float *state, float *y, float *last, float *marks,
                                          int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t every,
                                          int threads) {
    const Shape p{batch, tokens, heads, size, every};
    const Inputs x{r, w, k, v, a, b};
    if (size <= 16) run_forward<1>(p, x, state, y, last, marks, threads);
    else if (size <= 32) run_forward<2>(p, x, state, y, last, marks, threads);
    else if (size <= 64) run_forward<4>(p, x, state, y, last, marks, threads);
    else if (size <= 128) run_forward<8>(p, x, state, y, last, marks, threads);
    else if (size <= 256) run_forward<16>(p, x, state, y, last, marks, threads);
    else return 1;
    return 0;
}

// dy like y, dlast like last; grads: [6, B, T, H, N] in the order r, w, k, v, a, b; dstate like state.
extern "C" int rwkvmpi_wkv7_train_backward(const float *r, const float *w, const float *k, const float *v, const float *a,
                                           const float *b, const float *marks, const float *dy, const float *dlast,
                                           float *grads, float *dstate, int64_t batch, int64_t tokens, int64_t heads,
                                           int64_t size, int64_t every, int threads) {
    const Shape p{batch, tokens, heads, size, every};
    const Inputs x{r, w, k, v, a, b};
    float *parts[6];
    for (int i = 0; i < 6; ++i) parts[i] = grads + i * batch * tokens * heads * size;
    if (size <= 16) run_backward<1>(p, x, marks, dy, dlast, parts, dstate, threads);
    else if (size <= 32) run_backward<2>(p, x, marks, dy, dlast, parts, dstate, threads);
    else if (size <= 64) run_backward<4>(p, x, marks, dy, dlast, parts, dstate, threads);
    else if (size <= 128) run_backward<8>(p, x, marks, dy, dlast, parts, dstate, threads);
    else if (size <= 256) run_backward<16>(p, x, marks, dy, dlast, parts, dstate, threads);
    else return 1;
    return 0;
}
