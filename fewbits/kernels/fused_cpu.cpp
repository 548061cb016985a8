// The work of a training step between its matmuls, one reading each: fp32 inside, rounded once. See fused_cpu.py.
// Sums run over lanes and over pieces whose size depends on the shape alone, so the number of threads does not show.
#include <algorithm>
#include <vector>

#include "elements.hpp"
#include "parallel.hpp"
#include "reductions.hpp"

namespace {
constexpr long PIECE = 16384;  // elements of one piece of work

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
