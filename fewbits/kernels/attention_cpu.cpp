// Attention a head at a time, in fp32, from memory that stays in the second cache level: of a block of queries the scores with
// all keys that it may see, their softmax, and what follows from it. No probability is kept: the backward pass makes them again.
// Sums run in an order that the shape alone decides, so the number of threads does not show. See attention_cpu.py.
#include <algorithm>
#include <type_traits>

#include "elements.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "reductions.hpp"

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>

namespace {
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
#else
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

inline long rounded_up(long n, long to) { return (n + to - 1) / to * to; }

// fp32 matrices of one head. Rows of transposes lie a register further apart than they are long: at 1 KiB they would share
// the sets of the first cache level.
struct Scratch {
    Aligned<float> memory;
    float* next;
    explicit Scratch(long floats) : memory(aligned<float>(floats)), next(memory.get()) {}
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

// c[rows, columns] = or += a b, as `tile`; rows and columns are rounded up to whole tiles, so a has zeros in rows beyond.
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

// How many keys the queries first .. first + count - 1 may see at most.
long keys_seen(const Attention& m, long task, long first, long count) {
    if (!m.mask) return first + count;
    long seen = 1;
    for (long i = first; i < first + count; i++) {
        const uint8_t* allowed = m.mask + (task / m.H * m.T + i) * m.T;
        long last = m.T;
        while (last > seen && !allowed[last - 1]) last--;
        seen = last;
    }
    return seen;
}

// exp(scale * s - shift) of the scores s[count, width] of queries first .., zeros where a query may not see a key. The shift is
// logs[i], the logarithm of the sum of exp(scale * s), where that is known; else the largest, and logs and 1 / sums are written.
// A query that may see nothing has zeros.
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
        float shift = inverse ? largest(s, most) * scale : logs[i];
        if (shift == -INFINITY) shift = 0.0f;
        for (long j = 0; j < most; j++) s[j] = exponential(s[j] * scale - shift);
        for (long j = most; j < width; j++) s[j] = 0.0f;
        if (!inverse) continue;
        const float total = sum(most, [&](long j) { return s[j]; });
        logs[i] = total == 0.0f ? 0.0f : shift + std::log(total);
        inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
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
            const long count = std::min(QUERIES, m.T - first), seen = keys_seen(m, task, first, count);
            widen(head<T>(m, 0, q, task), first, count, m.d, Q, D, QUERIES);
            product(count, seen, D, Q, D, 1, KT, apart, S, apart, false);
            softmax_rows(m, task, first, count, seen, rounded_up(seen, WIDTH), apart, S, logs + task * m.T + first, inverse);
            product(count, D, seen, S, apart, 1, V, D, Y, D, false);
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
            const long count = std::min(QUERIES, m.T - first), seen = keys_seen(m, task, first, count);
            const long width = rounded_up(seen, WIDTH);
            widen(head<T>(m, 0, q, task), first, count, m.d, Q, D, QUERIES);
            widen(head<T>(m, 3, g, task), first, count, m.d, G, D, QUERIES);
            product(count, seen, D, Q, D, 1, KT, apart, P, apart, false);
            softmax_rows(m, task, first, count, seen, width, apart, P, const_cast<float*>(logs) + task * m.T + first, nullptr);
            product(width, D, count, P, 1, apart, G, D, GV, D, true);
            product(count, seen, D, G, D, 1, VT, apart, S, apart, false);
            for (long i = 0; i < count; i++) {
                float* s = S + i * apart;
                const float* p = P + i * apart;
                const float dot = sum(width, [&](long j) { return p[j] * s[j]; }), scale = m.scale;
                for (long j = 0; j < width; j++) s[j] = p[j] * (s[j] - dot) * scale;
            }
            product(count, D, seen, S, apart, 1, K, D, GQ, D, false);
            product(width, D, count, S, 1, apart, Q, D, GK, D, true);
            narrow(GQ, D, nullptr, first, count, m.d, to_q);
        }
        narrow(GK, D, nullptr, 0, m.T, m.d, to_k);
        narrow(GV, D, nullptr, 0, m.T, m.d, to_v);
    });
}
}  // namespace

EXPORT int supported() { return 1; }

EXPORT void attention(int threads, int format, const Attention* m, const void* q, const void* k, const void* v, void* y,
                      float* logs) {
    with_type(format, [&](auto* kind) { attention<std::remove_pointer_t<decltype(kind)>>(threads, *m, q, k, v, y, logs); });
}

EXPORT void attention_backward(int threads, int format, const Attention* m, const void* q, const void* k, const void* v,
                               const void* g, const float* logs, void* gq, void* gk, void* gv, long stride) {
    with_type(format, [&](auto* kind) {
        attention_backward<std::remove_pointer_t<decltype(kind)>>(threads, *m, q, k, v, g, logs, gq, gk, gv, stride);
    });
}
#else
EXPORT int supported() { return 0; }
EXPORT void attention() {}
EXPORT void attention_backward() {}
#endif
