// Codes and scales of a matrix on a CPU, bit for bit those of numerics/quantize.py. See quantize_cpu.py.
#include <algorithm>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SIXTEEN_AT_A_TIME
#include <immintrin.h>
#endif

#include "elements.hpp"
#include "parallel.hpp"

namespace {
constexpr long TILE = 512;      // elements whose fp32 copies stay in the first cache level
constexpr long PIECE = 32768;   // elements of one piece of work
constexpr uint32_t INFINITE = 0x7F800000;

struct Matrix {
    const void* x;
    int format;                    // of its elements: see elements.hpp
    long rows, columns, stride;    // as it lies in memory, row by row
    long block_rows, block_columns, scale_row, scale_column;  // blocks, and the strides of their scales
    long index_row, index_column;  // of the linear index that random bits are keyed by
};

struct Target {
    int integer, mantissa, min_exponent, infinite, carrier_mantissa, carrier_bias;
    float max;
    double exact_max;
    uint32_t max_mantissa;
    int max_exponent;
    int power_of_two, stochastic;
    uint32_t a, b;                 // halves of the spread key
};

// ---- scales ----------------------------------------------------------------------------------------------------------

inline float scale_of(uint32_t amax, const Target& t) {
    if (amax >= INFINITE) return NAN;
    if (t.power_of_two) {
        int k = int(amax >> 23) - 127 - t.max_exponent + ((amax & 0x7FFFFF) > t.max_mantissa);
        return float_of(uint32_t(std::min(std::max(k, -126), 126) + 127) << 23);
    }
    if (amax == 0) return 1.0f;
    return std::max(float(double(float_of(amax)) / t.exact_max), 0x1p-126f);
}

inline float inverse(float scale) { return float(1.0 / double(scale)); }

// ---- maxima ----------------------------------------------------------------------------------------------------------

inline uint32_t magnitude(float x) { return bits_of(x) & 0x7FFFFFFF; }
inline uint32_t magnitude(bf16 x) { return uint32_t(x.bits & 0x7FFF) << 16; }
inline uint32_t magnitude(fp16 x) { return bits_of(float(x)) & 0x7FFFFFFF; }

template <class T>
inline uint32_t amax_of(const T* x, long n) {
    uint32_t most = 0;
    for (long j = 0; j < n; j++) most = std::max(most, magnitude(x[j]));
    return most;
}
template <>
inline uint32_t amax_of(const bf16* x, long n) {
    uint16_t most = 0;
    for (long j = 0; j < n; j++) most = std::max(most, uint16_t(x[j].bits & 0x7FFF));
    return uint32_t(most) << 16;
}

inline void raise(uint32_t* place, uint32_t value) {
    uint32_t seen = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(place, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

// Largest magnitudes of all blocks into amax, which holds zeros. A maximum does not depend on the order.
template <class T>
class Maxima {
    const Matrix& m;
    uint32_t* amax;
    long slab, slabs_per_block;

  public:
    Maxima(const Matrix& m, uint32_t* amax)
        : m(m), amax(amax), slab(std::max(1L, std::min(m.block_rows, PIECE / std::max(1L, m.columns)))),
          slabs_per_block((m.block_rows + slab - 1) / slab) {}

    long pieces() const { return (m.rows + m.block_rows - 1) / m.block_rows * slabs_per_block; }

    void operator()(long piece) const {
        const T* x = static_cast<const T*>(m.x);
        long above = piece / slabs_per_block, first = above * m.block_rows + piece % slabs_per_block * slab;
        long last = std::min({first + slab, (above + 1) * m.block_rows, m.rows});
        uint32_t* found = amax + above * m.scale_row;
        if (first >= last) return;
        if (m.block_columns == 1) {
            std::vector<uint32_t> most(m.columns, 0);
            for (long i = first; i < last; i++) {
                const T* row = x + i * m.stride;
                uint32_t* to = most.data();
                for (long j = 0; j < m.columns; j++) to[j] = std::max(to[j], magnitude(row[j]));
            }
            for (long j = 0; j < m.columns; j++) raise(found + j * m.scale_column, most[j]);
            return;
        }
        for (long j = 0, block = 0; j < m.columns; j += m.block_columns, block++) {
            uint32_t most = 0;
            for (long i = first; i < last; i++)
                most = std::max(most, amax_of(x + i * m.stride + j, std::min(m.block_columns, m.columns - j)));
            raise(found + block * m.scale_column, most);
        }
    }
};

// ---- codes -----------------------------------------------------------------------------------------------------------

// random_bits of numerics/random.py for an index below 2**32.
inline uint32_t random_word(uint32_t index, uint32_t a, uint32_t b) {
    uint32_t h = index ^ a;
    h ^= h >> 17;
    h *= 0xED5AD4BBu;
    h += b;
    h ^= h >> 11;
    h *= 0xAC4C1B51u;
    h ^= h >> 15;
    h *= 0x31848BABu;
    return h ^ (h >> 14);
}

// magnitude >= 0, below 2**32, to an integer: to nearest even, or up where the fraction and 32 random bits carry.
template <bool STOCHASTIC>
inline float to_integer(float magnitude, uint32_t random) {
    if (!STOCHASTIC) return __builtin_rintf(magnitude);
    float whole = __builtin_truncf(magnitude);
    uint32_t fraction = uint32_t((magnitude - whole) * 0x1p32f);
    return whole + (fraction + random < fraction ? 1.0f : 0.0f);
}

template <bool STOCHASTIC>
inline uint8_t integer_code(float x, uint32_t random, float max) {
    x = x == x ? x : 0.0f;
    x = std::min(std::max(x, -max), max);
    float whole = to_integer<STOCHASTIC>(std::fabs(x), random);
    return uint8_t(int32_t(x < 0 ? -whole : whole));
}

template <bool STOCHASTIC>
inline uint8_t float_code(float x, uint32_t random, const Target& t, float ulps, float ulp, float normal, float carried,
                          float carrier_normal) {
    const int shift = 23 - t.mantissa, carrier_shift = 23 - t.carrier_mantissa;
    uint32_t bits = bits_of(x), magnitude = std::min(bits & 0x7FFFFFFF, INFINITE);
    float size = float_of(magnitude);
    uint32_t up = STOCHASTIC ? random >> (32 - shift) : ((magnitude >> shift) & 1) + (1u << (shift - 1)) - 1;
    float rounded = float_of((magnitude + up) & ~((1u << shift) - 1));
    float small = to_integer<STOCHASTIC>(std::min(size, normal) * ulps, random) * ulp;
    float value = std::min(size < normal ? small : rounded, t.max);
    uint32_t code = (bits_of(value) - (uint32_t(127 - t.carrier_bias) << 23)) >> carrier_shift;
    uint32_t subnormal = uint32_t(int32_t(std::min(value, carrier_normal) * carried));
    code = value < carrier_normal ? subnormal : code;
    code = t.infinite && STOCHASTIC && magnitude == INFINITE ? 0x7C : code;
    code = x != x ? 0x7F : code;
    return uint8_t(code | ((bits >> 24) & 0x80));
}

#ifdef SIXTEEN_AT_A_TIME
inline __m512 load16(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load16(const fp16* x, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x)); }
inline __m512 load16(const bf16* x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __m512i random_word(__m512i index, __m512i a, __m512i b) {
    auto mixed = [](__m512i h, int shift) { return _mm512_xor_si512(h, _mm512_srli_epi32(h, shift)); };
    __m512i h = mixed(_mm512_xor_si512(index, a), 17);
    h = _mm512_add_epi32(_mm512_mullo_epi32(h, _mm512_set1_epi32(int(0xED5AD4BBu))), b);
    h = _mm512_mullo_epi32(mixed(h, 11), _mm512_set1_epi32(int(0xAC4C1B51u)));
    h = _mm512_mullo_epi32(mixed(h, 15), _mm512_set1_epi32(int(0x31848BABu)));
    return mixed(h, 14);
}

// `integer_code` of n elements, 16 at a time and no copy in between: rows of int8 take 0.72 of the time of the loops below, with
// random bits, which are two thirds of the work then, 0.94.
template <class T, bool STOCHASTIC, bool EACH>
void integer_run(const T* x, long n, float one, const float* each, uint32_t index, uint32_t step, const Target& t,
                 uint8_t* out) {
    const __m512 most = _mm512_set1_ps(t.max), least = _mm512_set1_ps(-t.max), unit = _mm512_set1_ps(one);
    const __m512i a = _mm512_set1_epi32(int(t.a)), b = _mm512_set1_epi32(int(t.b)), stride = _mm512_set1_epi32(int(16 * step));
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32(int(index)), _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(step))));
    for (long j = 0; j < n; j += 16, place = _mm512_add_epi32(place, stride)) {
        const __mmask16 mask = n - j >= 16 ? 0xFFFF : (1u << (n - j)) - 1;
        __m512 v = _mm512_mul_ps(load16(x + j, mask), EACH ? _mm512_maskz_loadu_ps(mask, each + j) : unit);
        v = _mm512_maskz_max_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v, least);  // 0 for NaN
        v = _mm512_min_ps(v, most);
        __m512i whole;
        if (STOCHASTIC) {
            const __m512 size = _mm512_abs_ps(v);
            whole = _mm512_cvttps_epi32(size);
            const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(size, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(0x1p32f));
            const __m512i fraction = _mm512_cvttps_epu32(rest);
            const __mmask16 up = _mm512_cmplt_epu32_mask(_mm512_add_epi32(fraction, random_word(place, a, b)), fraction);
            whole = _mm512_mask_add_epi32(whole, up, whole, _mm512_set1_epi32(1));
            whole = _mm512_mask_sub_epi32(whole, _mm512_movepi32_mask(_mm512_castps_si512(v)), _mm512_setzero_si512(), whole);
        } else {
            whole = _mm512_cvtps_epi32(v);
        }
        _mm_mask_storeu_epi8(out + j, mask, _mm512_cvtepi32_epi8(whole));
    }
}
#endif

// Codes of n elements under one inv_scale, or one each.
template <class T, bool STOCHASTIC, bool EACH>
void encode_run(const T* x, long n, float one, const float* each, uint32_t index, uint32_t step, const Target& t,
                uint8_t* out) {
#ifdef SIXTEEN_AT_A_TIME
    if (t.integer) return integer_run<T, STOCHASTIC, EACH>(x, n, one, each, index, step, t, out);
#endif
    const float ulp = std::ldexp(1.0f, t.min_exponent - t.mantissa), ulps = 1.0f / ulp;
    const float normal = std::ldexp(1.0f, t.min_exponent), carrier_normal = std::ldexp(1.0f, 1 - t.carrier_bias);
    const float carried = std::ldexp(1.0f, t.carrier_bias - 1 + t.carrier_mantissa);
    float scaled[TILE];
    for (long start = 0; start < n; start += TILE) {
        const long count = std::min(TILE, n - start);
        const uint32_t first = index + uint32_t(start) * step;
        for (long j = 0; j < count; j++) scaled[j] = load(x[start + j]) * (EACH ? each[start + j] : one);
        uint8_t* to = out + start;
        if (t.integer) {
            const float max = t.max;
            for (long j = 0; j < count; j++)
                to[j] = integer_code<STOCHASTIC>(
                    scaled[j], STOCHASTIC ? random_word(first + uint32_t(j) * step, t.a, t.b) : 0, max);
        } else {
            const Target mine = t;
            for (long j = 0; j < count; j++)
                to[j] = float_code<STOCHASTIC>(
                    scaled[j], STOCHASTIC ? random_word(first + uint32_t(j) * step, t.a, t.b) : 0, mine, ulps, ulp,
                    normal, carried, carrier_normal);
        }
    }
}

template <class T, bool STOCHASTIC>
void encode_row(const Matrix& m, const Target& t, long i, const float* inv, const float* each, uint8_t* out) {
    const T* row = static_cast<const T*>(m.x) + i * m.stride;
    uint32_t index = uint32_t(i * m.index_row), step = uint32_t(m.index_column);
    if (each) {
        encode_run<T, STOCHASTIC, true>(row, m.columns, 0, each, index, step, t, out + i * m.columns);
        return;
    }
    for (long j = 0, block = 0; j < m.columns; j += m.block_columns, block++)
        encode_run<T, STOCHASTIC, false>(row + j, std::min(m.block_columns, m.columns - j), inv[block], nullptr,
                                         index + uint32_t(j) * step, step, t, out + i * m.columns + j);
}

// inv_scales of the blocks along row i: made here, packed.
void inverses(const Matrix& m, const float* scale, long i, std::vector<float>& inv) {
    long across = (m.columns + m.block_columns - 1) / m.block_columns;
    inv.resize(across);
    for (long block = 0; block < across; block++)
        inv[block] = inverse(scale[i / m.block_rows * m.scale_row + block * m.scale_column]);
}

template <class T, bool STOCHASTIC>
class Codes {
    const Matrix& m;
    const Target& t;
    const float* scale;
    uint8_t* out;
    long some;

  public:
    Codes(const Matrix& m, const Target& t, const float* scale, uint8_t* out)
        : m(m), t(t), scale(scale), out(out), some(std::max(1L, PIECE / std::max(1L, m.columns))) {}

    long pieces() const { return (m.rows + some - 1) / some; }

    void operator()(long piece) const {
        std::vector<float> inv;
        long known = -1;
        for (long i = piece * some; i < std::min(m.rows, (piece + 1) * some); i++) {
            if (i / m.block_rows != known) inverses(m, scale, i, inv);
            known = i / m.block_rows;
            encode_row<T, STOCHASTIC>(m, t, i, inv.data(), m.block_columns == 1 ? inv.data() : nullptr, out);
        }
    }
};

// Blocks within one row: maxima, scales and codes while the row is at hand.
template <class T, bool STOCHASTIC>
void quantize_rows(int threads, const Matrix& m, const Target& t, float* scale, uint8_t* out) {
    long some = std::max(1L, PIECE / std::max(1L, m.columns)), across = (m.columns + m.block_columns - 1) / m.block_columns;
    parallel(threads, (m.rows + some - 1) / some, [&](long piece) {
        std::vector<float> inv(across);
        for (long i = piece * some; i < std::min(m.rows, (piece + 1) * some); i++) {
            const T* row = static_cast<const T*>(m.x) + i * m.stride;
            for (long block = 0; block < across; block++) {
                long j = block * m.block_columns;
                float found = scale_of(amax_of(row + j, std::min(m.block_columns, m.columns - j)), t);
                scale[i * m.scale_row + block * m.scale_column] = found;
                inv[block] = inverse(found);
            }
            encode_row<T, STOCHASTIC>(m, t, i, inv.data(), m.block_columns == 1 ? inv.data() : nullptr, out);
        }
    });
}

template <class T, bool STOCHASTIC>
void quantize(int threads, const Matrix& m, const Target& t, float* scale, uint8_t* out) {
    if (m.block_rows == 1) return quantize_rows<T, STOCHASTIC>(threads, m, t, scale, out);
    uint32_t* amax = reinterpret_cast<uint32_t*>(scale);  // the scales, all in one piece, take the place of the maxima
    long above = (m.rows + m.block_rows - 1) / m.block_rows, across = (m.columns + m.block_columns - 1) / m.block_columns;
    std::fill(amax, amax + above * across, 0);
    const Maxima<T> maxima(m, amax);
    const Codes<T, STOCHASTIC> codes(m, t, scale, out);
    auto scales = [&] {
        for (long i = 0; i < above * across; i++) scale[i] = scale_of(amax[i], t);
    };
    parallel(threads, maxima.pieces(), maxima, scales, codes.pieces(), codes);
}

// ---- values ----------------------------------------------------------------------------------------------------------

inline float value_of(uint8_t code, int mantissa, int bias) {
    uint32_t low = code & 0x7F;
    uint32_t infinity = mantissa == 3 ? 0x7F : 0x7C;
    float normal = float_of((low << (23 - mantissa)) + (uint32_t(127 - bias) << 23));
    float subnormal = float(int32_t(low)) * float_of(uint32_t(128 - bias - mantissa) << 23);
    float size = low >> mantissa ? normal : subnormal;
    size = low >= infinity ? (mantissa == 2 && low == infinity ? float_of(INFINITE) : NAN) : size;
    return float_of(bits_of(size) | uint32_t(code & 0x80) << 24);
}

template <class T>
void decode_run(const uint8_t* codes, long n, float one, const float* each, int mantissa, int bias, T* out) {
    if (mantissa == 0)
        for (long j = 0; j < n; j++) store(float(int8_t(codes[j])) * (each ? each[j] : one), out[j]);
    else if (mantissa == 3)
        for (long j = 0; j < n; j++) store(value_of(codes[j], 3, 7) * (each ? each[j] : one), out[j]);
    else
        for (long j = 0; j < n; j++) store(value_of(codes[j], 2, 15) * (each ? each[j] : one), out[j]);
}
}  // namespace

EXPORT void block_amax(int threads, const Matrix* m, uint32_t* amax) {
    with_type(m->format, [&](auto* kind) {
        const Maxima<std::remove_pointer_t<decltype(kind)>> maxima(*m, amax);
        parallel(threads, maxima.pieces(), maxima);
    });
}

// Scales from the maxima, then codes; scale: [grid rows, grid columns] in one piece.
EXPORT void quantize(int threads, const Matrix* m, const Target* t, float* scale, uint8_t* out) {
    with_type(m->format, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        (t->stochastic ? quantize<T, true> : quantize<T, false>)(threads, *m, *t, scale, out);
    });
}

EXPORT void encode(int threads, const Matrix* m, const Target* t, const float* scale, uint8_t* out) {
    with_type(m->format, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        auto run = [&](const auto& codes) { parallel(threads, codes.pieces(), codes); };
        if (t->stochastic) run(Codes<T, true>(*m, *t, scale, out));
        else run(Codes<T, false>(*m, *t, scale, out));
    });
}

// code * scale of a matrix of codes (m->x, one byte each) into a matrix in one piece.
EXPORT void decode(int threads, const Matrix* m, const float* scale, int mantissa, int bias, int format, void* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(m->x);
    long some = std::max(1L, PIECE / std::max(1L, m->columns)), across = (m->columns + m->block_columns - 1) / m->block_columns;
    with_type(format, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        parallel(threads, (m->rows + some - 1) / some, [&](long piece) {
            std::vector<float> each(m->block_columns == 1 ? across : 0);
            for (long i = piece * some; i < std::min(m->rows, (piece + 1) * some); i++) {
                const float* own = scale + i / m->block_rows * m->scale_row;
                T* to = static_cast<T*>(out) + i * m->columns;
                for (size_t block = 0; block < each.size(); block++) each[block] = own[block * m->scale_column];
                if (!each.empty()) {
                    decode_run(codes + i * m->stride, m->columns, 0, each.data(), mantissa, bias, to);
                    continue;
                }
                for (long j = 0, block = 0; j < m->columns; j += m->block_columns, block++)
                    decode_run(codes + i * m->stride + j, std::min(m->block_columns, m->columns - j),
                               own[block * m->scale_column], nullptr, mantissa, bias, to + j);
            }
        });
    });
}

// total * row scale * column scale + bias, each step rounded to fp32, then once to the format of out; all in one piece.
EXPORT void rescale(int threads, const int32_t* total, long rows, long columns, const float* row_scale,
                    const float* column_scale, const float* bias, int format, void* out) {
    long some = std::max(1L, PIECE / std::max(1L, columns));
    with_type(format, [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
        parallel(threads, (rows + some - 1) / some, [&](long piece) {
            for (long i = piece * some; i < std::min(rows, (piece + 1) * some); i++) {
                const int32_t* from = total + i * columns;
                T* to = static_cast<T*>(out) + i * columns;
                const float own = row_scale[i];
                if (bias)
                    for (long j = 0; j < columns; j++) store(float(from[j]) * own * column_scale[j] + bias[j], to[j]);
                else
                    for (long j = 0; j < columns; j++) store(float(from[j]) * own * column_scale[j], to[j]);
            }
        });
    });
}
