// The work of a training step between its matmuls, one reading each: fp32 inside, rounded once. See fused_cpu.py.
// Sums run over lanes and over pieces whose size depends on the shape alone, so the number of threads does not show.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "elements.hpp"
#include "parallel.hpp"

namespace {
constexpr long PIECE = 16384;  // elements of one piece of work
constexpr int LANES = 16;

template <class F>
inline float sum(long n, F of) {
    float lanes[LANES] = {};
    long j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += of(j + l);
    for (int l = 0; j < n; j++, l++) lanes[l] += of(j);
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

// The largest of n numbers; NaN is not looked for.
inline float largest(const float* x, long n) {
    float lanes[LANES];
    std::fill(lanes, lanes + LANES, -INFINITY);
    long j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = lanes[l] > x[j + l] ? lanes[l] : x[j + l];
    for (; j < n; j++) lanes[0] = lanes[0] > x[j] ? lanes[0] : x[j];
    return *std::max_element(lanes, lanes + LANES);
}

// e^x for x <= 88 to within 2 units in the last place (polynomial of Cephes' expf); 0 below -87.3, NaN for NaN.
inline float exponential(float x) {
    float near = x > -87.3f ? x : -87.3f;
    near = near < 88.0f ? near : 88.0f;
    float n = __builtin_rintf(near * 1.44269504088896341f);
    float r = (near - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * (r * r) + r) + 1.0f;
    y = y * float_of(uint32_t(int32_t(n) + 127) << 23);
    y = x < -87.3f ? 0.0f : y;
    return x != x ? x : y;
}

inline long rows_of_piece(long columns) { return std::max(1L, PIECE / std::max(1L, columns)); }

// Rows whose sums are added up together: at most 128 sums are added at the end, whatever the number of rows.
inline long rows_of_sum(long rows) { return std::max(32L, (rows + 127) / 128); }

// Adds up `count` rows of n numbers each, first to last, into out.
inline void add_rows(const float* parts, long count, long n, float* out) {
    std::fill(out, out + n, 0.0f);
    for (long i = 0; i < count; i++)
        for (long j = 0; j < n; j++) out[j] += parts[i * n + j];
}

// gelu(x) = x s with s = sigmoid(x (k + c x^2)), and its derivative s + x z' s (1 - s): numerics/activation.py.
template <class T>
void gelu(int threads, const T* x, long n, T* y, T* slope) {
    const float k = 1.5957691216057308f, c = 0.044715f * 1.5957691216057308f;
    parallel(threads, (n + PIECE - 1) / PIECE, [&](long piece) {
        // the number of turns stands before the loop, in no one's memory: otherwise it would not become vectors
        const long count = std::min(PIECE, n - piece * PIECE);
        const T* from = x + piece * PIECE;
        T *to = y + piece * PIECE, *kept = slope + piece * PIECE;
        for (long j = 0; j < count; j++) {
            float v = load(from[j]);
            float near = v > -30.0f ? v : -30.0f;
            near = near < 30.0f ? near : 30.0f;
            near = v != v ? v : near;
            float square = near * near, z = near * (k + c * square);
            float e = exponential(-z), s = 1.0f / (1.0f + e);  // 1 - s is s e, which loses nothing where s is near 1
            float turn = near * (k + 3 * c * square);
            store(v * s, to[j]);
            store(s + turn * (s * (s * e)), kept[j]);
        }
    });
}

template <class T>
void norm(int threads, const T* x, long rows, long D, const float* w, const float* b, float eps, int centred, T* y,
          float* mean, float* rstd) {
    long some = rows_of_piece(D);
    parallel(threads, (rows + some - 1) / some, [&](long piece) {
        std::vector<float> kept(D);
        float* v = kept.data();
        for (long i = piece * some; i < std::min(rows, (piece + 1) * some); i++) {
            const T* from = x + i * D;
            T* to = y + i * D;
            for (long j = 0; j < D; j++) v[j] = load(from[j]);
            float m = centred ? sum(D, [&](long j) { return v[j]; }) / float(D) : 0.0f;
            float square = sum(D, [&](long j) { return (v[j] - m) * (v[j] - m); }) / float(D);
            float r = 1.0f / std::sqrt(square + eps);
            mean[i] = m;
            rstd[i] = r;
            if (b)
                for (long j = 0; j < D; j++) store((v[j] - m) * r * w[j] + b[j], to[j]);
            else
                for (long j = 0; j < D; j++) store((v[j] - m) * r * w[j], to[j]);
        }
    });
}

template <class T>
void norm_backward(int threads, const T* g, const T* x, long rows, long D, const float* w, const float* mean,
                   const float* rstd, int centred, T* gx, float* gw, float* gb) {
    long some = rows_of_sum(rows), pieces = (rows + some - 1) / some;
    std::vector<float> parts(size_t(pieces) * 2 * D, 0.0f);
    parallel(threads, pieces, [&](long piece) {
        float* sum_w = parts.data() + piece * 2 * D;
        float* sum_b = sum_w + D;
        std::vector<float> kept(2 * D);
        float *h = kept.data(), *normal = h + D;
        for (long i = piece * some; i < std::min(rows, (piece + 1) * some); i++) {
            const float m = mean[i], r = rstd[i];
            for (long j = 0; j < D; j++) {
                float grad = load(g[i * D + j]);
                normal[j] = (load(x[i * D + j]) - m) * r;
                sum_w[j] += grad * normal[j];
                sum_b[j] += grad;
                h[j] = grad * w[j];
            }
            float along = sum(D, [&](long j) { return h[j] * normal[j]; }) / float(D);
            float middle = centred ? sum(D, [&](long j) { return h[j]; }) / float(D) : 0.0f;
            T* to = gx + i * D;
            for (long j = 0; j < D; j++) store(((h[j] - middle) - normal[j] * along) * r, to[j]);
        }
    });
    std::vector<float> total(2 * D);
    add_rows(parts.data(), pieces, 2 * D, total.data());
    std::copy(total.begin(), total.begin() + D, gw);
    if (gb) std::copy(total.begin() + D, total.end(), gb);
}

template <class T>
void column_sums(int threads, const T* x, long rows, long columns, long stride, float* out) {
    long some = rows_of_sum(rows), pieces = (rows + some - 1) / some;
    std::vector<float> parts(size_t(pieces) * columns, 0.0f);
    parallel(threads, pieces, [&](long piece) {
        float* to = parts.data() + piece * columns;
        for (long i = piece * some; i < std::min(rows, (piece + 1) * some); i++)
            for (long j = 0; j < columns; j++) to[j] += load(x[i * stride + j]);
    });
    add_rows(parts.data(), pieces, columns, out);
}

template <class T>
void softmax_gradient(int threads, const float* logits, long rows, long V, const int64_t* labels, float factor,
                      float* losses, T* gradient) {
    long some = rows_of_piece(V);
    parallel(threads, (rows + some - 1) / some, [&](long piece) {
        std::vector<float> kept(V);
        float* e = kept.data();
        for (long i = piece * some; i < std::min(rows, (piece + 1) * some); i++) {
            const float* from = logits + i * V;
            T* to = gradient + i * V;
            const long label = labels[i];
            if (label < 0) {  // ignored
                losses[i] = 0.0f;
                for (long j = 0; j < V; j++) store(0.0f, to[j]);
                continue;
            }
            const float top = largest(from, V);
            for (long j = 0; j < V; j++) e[j] = exponential(from[j] - top);
            const float total = sum(V, [&](long j) { return e[j]; });
            losses[i] = (top - from[label]) + std::log(total);
            const float each = 1.0f / total;
            const float wanted = (e[label] * each - 1.0f) * factor;
            for (long j = 0; j < V; j++) store(e[j] * each * factor, to[j]);
            store(wanted, to[label]);
        }
    });
}

// P[n, first + i, :] = softmax(scale * S[n, i, :seen]) under a causal mask, or mask[n / heads, first + i, :]; zeros beyond.
template <class T>
void attention_softmax(int threads, float* S, long count, long rows, long seen, long first, float scale, long keys,
                       const uint8_t* mask, long heads, T* P) {
    long some = rows_of_piece(seen), each = (rows + some - 1) / some;
    parallel(threads, count * each, [&](long piece) {
        long n = piece / each, begin = piece % each * some;
        for (long i = begin; i < std::min(rows, begin + some); i++) {
            float* s = S + (n * rows + i) * seen;
            T* to = P + (n * keys + first + i) * keys;
            const long most = mask ? seen : std::min(seen, first + i + 1);
            if (mask) {
                const uint8_t* allowed = mask + (n / heads * keys + first + i) * keys;
                for (long j = 0; j < most; j++) s[j] = allowed[j] ? s[j] * scale : -INFINITY;
            } else {
                for (long j = 0; j < most; j++) s[j] *= scale;
            }
            const float top = largest(s, most);
            for (long j = 0; j < most; j++) s[j] = exponential(s[j] - top);
            const float inverse = 1.0f / sum(most, [&](long j) { return s[j]; });
            for (long j = 0; j < most; j++) store(s[j] * inverse, to[j]);
            for (long j = most; j < keys; j++) store(0.0f, to[j]);
        }
    });
}

// dS = scale P (dP - sum(P dP)) for the same rows; zeros beyond `seen`.
template <class T>
void attention_softmax_backward(int threads, const float* dP, const T* P, long count, long rows, long seen, long first,
                                float scale, long keys, T* dS) {
    long some = rows_of_piece(seen), each = (rows + some - 1) / some;
    parallel(threads, count * each, [&](long piece) {
        std::vector<float> kept(seen);
        float* p = kept.data();
        long n = piece / each, begin = piece % each * some;
        for (long i = begin; i < std::min(rows, begin + some); i++) {
            const float* d = dP + (n * rows + i) * seen;
            const T* from = P + (n * keys + first + i) * keys;
            T* to = dS + (n * keys + first + i) * keys;
            for (long j = 0; j < seen; j++) p[j] = load(from[j]);
            const float dot = sum(seen, [&](long j) { return p[j] * d[j]; });
            for (long j = 0; j < seen; j++) store(p[j] * (d[j] - dot) * scale, to[j]);
            for (long j = seen; j < keys; j++) store(0.0f, to[j]);
        }
    });
}

// ---- attention -------------------------------------------------------------------------------------------------------
// A head at a time, in fp32, from memory that stays in the second cache level: of a block of queries the scores with all keys
// that it may see, their softmax, and what follows from it. No probability is kept: the backward pass makes them again.

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 8;  // fp32 numbers of a register; rows of a tile of two registers each
#else
constexpr int WIDTH = 8, ROWS = 4;
#endif
constexpr long QUERIES = 32;  // in a block: of 256 causal positions 9/16 of all scores are made
using Vector = float __attribute__((vector_size(4 * WIDTH), may_alias));

// a * b + c, rounded once where there is an instruction: contraction is off, and two instructions halve the speed.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline long rounded_up(long n, long to) { return (n + to - 1) / to * to; }

struct Freed {
    void operator()(void* memory) const { free(memory); }
};

// fp32 matrices of one head. Rows of transposes lie a register further apart than they are long: at 1 KiB they would share
// the sets of the first cache level.
struct Scratch {
    std::unique_ptr<float, Freed> memory;
    float* next;
    explicit Scratch(long floats) : memory(static_cast<float*>(aligned_alloc(64, 4 * rounded_up(floats, 16)))), next(memory.get()) {}
    float* take(long floats) {
        float* found = next;
        next += floats;
        return found;
    }
};

// c[ROWS, G registers] = or += sum over k < n of a[r * row + k * step] * b[k * apart + ...]
template <int G>
inline void tile(long n, const float* a, long row, long step, const float* b, long apart, float* c, long to, bool add) {
    Vector total[ROWS][G];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int g = 0; g < G; g++)
            total[r][g] = add ? *reinterpret_cast<Vector*>(c + r * to + g * WIDTH) : Vector{};
    for (long k = 0; k < n; k++) {
        Vector right[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) right[g] = *reinterpret_cast<const Vector*>(b + k * apart + g * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Vector left = a[r * row + k * step] - Vector{};  // less nothing is a broadcast alone; plus, an addition
#pragma GCC unroll 2
            for (int g = 0; g < G; g++) total[r][g] = multiply_add(left, right[g], total[r][g]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int g = 0; g < G; g++) *reinterpret_cast<Vector*>(c + r * to + g * WIDTH) = total[r][g];
}

// c[rows, columns] = or += a b, as `tile`; rows and columns are rounded up to whole tiles.
void product(long rows, long columns, long n, const float* a, long row, long step, const float* b, long apart, float* c,
             long to, bool add) {
    long j = 0;
    for (; j + 2 * WIDTH <= rounded_up(columns, WIDTH); j += 2 * WIDTH)
        for (long i = 0; i < rows; i += ROWS) tile<2>(n, a + i * row, row, step, b + j, apart, c + i * to + j, to, add);
    for (; j < columns; j += WIDTH)
        for (long i = 0; i < rows; i += ROWS) tile<1>(n, a + i * row, row, step, b + j, apart, c + i * to + j, to, add);
}

// Rows of one head: `stride` elements from position to position.
template <class T>
struct Head {
    T* x;
    long stride;
};

template <class T>
void widen(const Head<const T>& x, long first, long count, long d, float* out, long D, long padded) {
    for (long i = 0; i < padded; i++) {
        const T* from = x.x + (first + i) * x.stride;
        float* to = out + i * D;
        long j = 0;
        if (i < count)
            for (; j < d; j++) to[j] = load(from[j]);
        for (; j < D; j++) to[j] = 0.0f;
    }
}

// [rows, D] -> [D, rows], a register of rows at a time
void turn(const float* x, long rows, long D, float* out, long apart) {
    for (long i = 0; i < rows; i += WIDTH)
        for (long j = 0; j < D; j++)
            for (int l = 0; l < WIDTH; l++) out[j * apart + i + l] = x[(i + l) * D + j];
}

template <class T>
void narrow(const float* x, long D, const float* factors, long first, long count, long d, const Head<T>& out) {
    for (long i = 0; i < count; i++) {
        const float* from = x + i * D;
        T* to = out.x + (first + i) * out.stride;
        const float factor = factors ? factors[i] : 1.0f;
        for (long j = 0; j < d; j++) store(from[j] * factor, to[j]);
    }
}

struct Attention {
    long B, H, T, d;
    float scale;
    const uint8_t* mask;  // [B, T, T] or nullptr for causal
    long strides[4][3];   // of q, k, v and the gradient: from sequence to sequence, head to head, position to position
};

template <class T>
Head<const T> head(const Attention& m, int which, const void* x, long task) {
    const long* s = m.strides[which];
    return {static_cast<const T*>(x) + task / m.H * s[0] + task % m.H * s[1], s[2]};
}

// exp(scale * s - shift) of the scores s[count, width] of queries first .., zeros where a query may not see a key. The shift is
// logs[i], the logarithm of the sum of exp(scale * s), where that is known; else the largest, and logs and 1 / sums are written.
void softmax_rows(const Attention& m, long task, long first, long count, long seen, long width, long apart, float* S,
                  float* logs, float* inverse) {
    const float scale = m.scale;
    for (long i = 0; i < count; i++) {
        float* s = S + i * apart;
        const long most = m.mask ? seen : std::min(seen, first + i + 1);
        if (m.mask) {
            const uint8_t* allowed = m.mask + (task / m.H * m.T + first + i) * m.T;
            for (long j = 0; j < most; j++) s[j] = allowed[j] ? s[j] : -INFINITY;
        }
        const float shift = inverse ? largest(s, most) * scale : logs[i];
        for (long j = 0; j < most; j++) s[j] = exponential(s[j] * scale - shift);
        for (long j = most; j < width; j++) s[j] = 0.0f;
        if (!inverse) continue;
        const float total = sum(most, [&](long j) { return s[j]; });
        logs[i] = shift + std::log(total);
        inverse[i] = 1.0f / total;
    }
    for (long i = count; i < QUERIES; i++) std::fill(S + i * apart, S + i * apart + width, 0.0f);
}

// y [B, T, H, d] = softmax(scale q k^T) v, and the logarithms of the sums [B, H, T].
template <class T>
void attention(int threads, const Attention& m, const void* q, const void* k, const void* v, void* y, float* logs) {
    const long D = rounded_up(m.d, WIDTH), keys = rounded_up(m.T, WIDTH), apart = keys + WIDTH;
    parallel(threads, m.B * m.H, [&](long task) {
        Scratch scratch(keys * D * 2 + D * apart + QUERIES * (apart + 2 * D + 1));
        float *K = scratch.take(keys * D), *V = scratch.take(keys * D), *KT = scratch.take(D * apart);
        float *S = scratch.take(QUERIES * apart), *Q = scratch.take(QUERIES * D), *Y = scratch.take(QUERIES * D);
        float* inverse = scratch.take(QUERIES);
        widen(head<T>(m, 1, k, task), 0, m.T, m.d, K, D, keys);
        widen(head<T>(m, 2, v, task), 0, m.T, m.d, V, D, keys);
        turn(K, keys, D, KT, apart);
        const Head<T> out{static_cast<T*>(y) + (task / m.H * m.T * m.H + task % m.H) * m.d, m.H * m.d};
        for (long first = 0; first < m.T; first += QUERIES) {
            const long count = std::min(QUERIES, m.T - first), seen = m.mask ? m.T : first + count;
            widen(head<T>(m, 0, q, task), first, count, m.d, Q, D, QUERIES);
            product(QUERIES, seen, D, Q, D, 1, KT, apart, S, apart, false);
            softmax_rows(m, task, first, count, seen, rounded_up(seen, WIDTH), apart, S, logs + task * m.T + first, inverse);
            product(QUERIES, D, seen, S, apart, 1, V, D, Y, D, false);
            narrow(Y, D, inverse, first, count, m.d, out);
        }
    });
}

// Gradients [B, T, ., H, d] of q, k and v, each `stride` elements from position to position, from that of y.
template <class T>
void attention_backward(int threads, const Attention& m, const void* q, const void* k, const void* v, const void* g,
                        const float* logs, void* gq, void* gk, void* gv, long stride) {
    const long D = rounded_up(m.d, WIDTH), keys = rounded_up(m.T, WIDTH), apart = keys + WIDTH;
    parallel(threads, m.B * m.H, [&](long task) {
        Scratch scratch(keys * D * 4 + 2 * D * apart + QUERIES * (2 * apart + 3 * D + 1));
        float *K = scratch.take(keys * D), *V = scratch.take(keys * D);
        float *GK = scratch.take(keys * D), *GV = scratch.take(keys * D);
        float *KT = scratch.take(D * apart), *VT = scratch.take(D * apart);
        float *P = scratch.take(QUERIES * apart), *S = scratch.take(QUERIES * apart);
        float *Q = scratch.take(QUERIES * D), *G = scratch.take(QUERIES * D), *GQ = scratch.take(QUERIES * D);
        widen(head<T>(m, 1, k, task), 0, m.T, m.d, K, D, keys);
        widen(head<T>(m, 2, v, task), 0, m.T, m.d, V, D, keys);
        turn(K, keys, D, KT, apart);
        turn(V, keys, D, VT, apart);
        std::fill(GK, GK + keys * D, 0.0f);
        std::fill(GV, GV + keys * D, 0.0f);
        const long place = task / m.H * m.T * stride + task % m.H * m.d;
        const Head<T> to_q{static_cast<T*>(gq) + place, stride}, to_k{static_cast<T*>(gk) + place, stride};
        const Head<T> to_v{static_cast<T*>(gv) + place, stride};
        for (long first = 0; first < m.T; first += QUERIES) {
            const long count = std::min(QUERIES, m.T - first), seen = m.mask ? m.T : first + count;
            const long width = rounded_up(seen, WIDTH);
            widen(head<T>(m, 0, q, task), first, count, m.d, Q, D, QUERIES);
            widen(head<T>(m, 3, g, task), first, count, m.d, G, D, QUERIES);
            product(QUERIES, seen, D, Q, D, 1, KT, apart, P, apart, false);
            softmax_rows(m, task, first, count, seen, width, apart, P, const_cast<float*>(logs) + task * m.T + first, nullptr);
            product(width, D, QUERIES, P, 1, apart, G, D, GV, D, true);
            product(QUERIES, seen, D, G, D, 1, VT, apart, S, apart, false);
            for (long i = 0; i < QUERIES; i++) {
                float* s = S + i * apart;
                const float* p = P + i * apart;
                const float dot = sum(width, [&](long j) { return p[j] * s[j]; }), scale = m.scale;
                for (long j = 0; j < width; j++) s[j] = p[j] * (s[j] - dot) * scale;
            }
            product(QUERIES, D, seen, S, apart, 1, K, D, GQ, D, false);
            product(width, D, QUERIES, S, 1, apart, Q, D, GK, D, true);
            narrow(GQ, D, nullptr, first, count, m.d, to_q);
        }
        narrow(GK, D, nullptr, 0, m.T, m.d, to_k);
        narrow(GV, D, nullptr, 0, m.T, m.d, to_v);
    });
}
}  // namespace

#define OF(kind) std::remove_pointer_t<decltype(kind)>

EXPORT void gelu(int threads, int format, const void* x, long n, void* y, void* slope) {
    with_type(format, [&](auto* kind) { gelu(threads, (const OF(kind)*)x, n, (OF(kind)*)y, (OF(kind)*)slope); });
}

EXPORT void norm(int threads, int format, const void* x, long rows, long D, const float* w, const float* b, float eps,
                 int centred, void* y, float* mean, float* rstd) {
    with_type(format, [&](auto* kind) {
        norm(threads, (const OF(kind)*)x, rows, D, w, b, eps, centred, (OF(kind)*)y, mean, rstd);
    });
}

EXPORT void norm_backward(int threads, int format, const void* g, const void* x, long rows, long D, const float* w,
                          const float* mean, const float* rstd, int centred, void* gx, float* gw, float* gb) {
    with_type(format, [&](auto* kind) {
        norm_backward(threads, (const OF(kind)*)g, (const OF(kind)*)x, rows, D, w, mean, rstd, centred, (OF(kind)*)gx, gw, gb);
    });
}

EXPORT void column_sums(int threads, int format, const void* x, long rows, long columns, long stride, float* out) {
    with_type(format, [&](auto* kind) { column_sums(threads, (const OF(kind)*)x, rows, columns, stride, out); });
}

// Labels are tokens or `ignored`; returns 1 + the row of the first that is neither, having done nothing, else 0.
EXPORT int softmax_gradient(int threads, int format, const float* logits, long rows, long V, const int64_t* labels,
                            long ignored, float factor, float* losses, void* gradient) {
    for (long i = 0; i < rows; i++)
        if (labels[i] != ignored && (labels[i] < 0 || labels[i] >= V)) return int(i + 1);
    with_type(format, [&](auto* kind) {
        softmax_gradient(threads, logits, rows, V, labels, factor, losses, (OF(kind)*)gradient);
    });
    return 0;
}

EXPORT void attention_softmax(int threads, int format, float* S, long count, long rows, long seen, long first,
                              float scale, long keys, const uint8_t* mask, long heads, void* P) {
    with_type(format, [&](auto* kind) {
        attention_softmax(threads, S, count, rows, seen, first, scale, keys, mask, heads, (OF(kind)*)P);
    });
}

EXPORT void attention_softmax_backward(int threads, int format, const float* dP, const void* P, long count, long rows,
                                       long seen, long first, float scale, long keys, void* dS) {
    with_type(format, [&](auto* kind) {
        attention_softmax_backward(threads, dP, (const OF(kind)*)P, count, rows, seen, first, scale, keys, (OF(kind)*)dS);
    });
}

EXPORT void attention(int threads, int format, const Attention* m, const void* q, const void* k, const void* v, void* y,
                      float* logs) {
    with_type(format, [&](auto* kind) { attention<OF(kind)>(threads, *m, q, k, v, y, logs); });
}

EXPORT void attention_backward(int threads, int format, const Attention* m, const void* q, const void* k, const void* v,
                               const void* g, const float* logs, void* gq, void* gk, void* gv, long stride) {
    with_type(format, [&](auto* kind) { attention_backward<OF(kind)>(threads, *m, q, k, v, g, logs, gq, gk, gv, stride); });
}
