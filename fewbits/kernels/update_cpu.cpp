// The update of weights in one pass over memory. See update_cpu.py; the arithmetic is that of numerics/update.py, operation by
// operation, each rounded, so that every master kind and every number of threads gives the same bits as the definition.
#include <algorithm>
#include <type_traits>

#include "elements.hpp"
#include "parallel.hpp"

namespace {
constexpr long PIECE = 32768;  // elements of one piece of work: about what a core's second cache holds of all tensors
enum Rule { ADAMW, ADAM, SGD };
enum Kind { SPLIT, WIDE, NONE };  // what is kept beside a weight: 16 bits of it, all of it in fp32, nothing

// To nearest, ties away from zero; every NaN becomes the quiet one.
inline void store_away(float x, float& out) { out = x; }
inline void store_away(float x, bf16& out) { out.bits = uint16_t(x != x ? 0x7FC0 : (bits_of(x) + 0x8000) >> 16); }
inline void store_away(float x, fp16& out) {
    const uint32_t bits = bits_of(x), size = bits & 0x7FFFFFFF;
    const float units = float_of(size) * 16777216.0f;  // 2^-24, of which the numbers below 2^-14 are multiples
    const int32_t whole = int32_t(units < 1024.0f ? units : 1024.0f);
    uint32_t half = size < 0x38800000 ? uint32_t(whole + (units - float(whole) >= 0.5f)) : (size - 0x37FFF000) >> 13;
    half = size >= 0x477FF000 ? 0x7C00 : half;  // 65,520
    half = size > 0x7F800000 ? 0x7E00 : half;
    const uint16_t found = uint16_t(half | ((bits >> 16) & 0x8000));
    memcpy(&out, &found, 2);
}

template <Kind kind, class W, class K>
inline float read(const W* working, const K* kept, long i) {
    if constexpr (kind == SPLIT) return float_of((uint32_t(working[i].bits) << 16) + uint32_t(int32_t(kept[i])));
    else if constexpr (kind == WIDE) return kept[i];
    else return load(working[i]);
}

template <Kind kind, class W, class K>
inline void write(float x, W* working, K* kept, long i) {
    store_away(x, working[i]);
    if constexpr (kind == SPLIT) kept[i] = int16_t(uint16_t(x != x ? 0 : bits_of(x)));
    if constexpr (kind == WIDE) kept[i] = x;
}

// What is kept beside a weight, as elements.
template <Kind kind>
using Kept = std::conditional_t<kind == SPLIT, int16_t, float>;

// Of one piece. Tensors do not overlap: said so, because a compiler that compares all their addresses gives up on vectors.
template <Rule rule, Kind kind, bool remembers, bool clipped, class W, class G>
void update_piece(long n, W* __restrict__ working, const G* __restrict__ gradient, Kept<kind>* __restrict__ kept,
                  float* __restrict__ first, float* __restrict__ second, float factor, float limit, const float* scalars) {
    float s[8];
    std::copy(scalars, scalars + 8, s);
    for (long i = 0; i < n; i++) {
        float g = load(gradient[i]) * factor;
        if constexpr (clipped) {
            g = g < -limit ? -limit : g;
            g = g > limit ? limit : g;
        }
        float x = read<kind>(working, kept, i);
        if constexpr (rule == SGD) {
            g = g + x * s[1];
            if constexpr (remembers) {
                g = first[i] * s[2] + g;
                first[i] = g;
            }
            x = x - g * s[0];
        } else {
            if constexpr (rule == ADAMW)
                x = x * s[0];
            else
                g = g + x * s[1];
            float m = first[i] + (g - first[i]) * s[2];
            float v = second[i] * s[3] + (g * s[4]) * g;
            first[i] = m;
            second[i] = v;
            x = x - (m * s[7]) / (std::sqrt(v) / s[5] + s[6]);
        }
        write<kind>(x, working, kept, i);
    }
}

template <Rule rule, Kind kind, class W, class G>
void update(int threads, long n, W* working, const G* gradient, void* kept, float* first, float* second, float factor,
            int clipped, float limit, const float* scalars) {
    parallel(threads, (n + PIECE - 1) / PIECE, [&](long piece) {
        const long at = piece * PIECE, count = std::min(PIECE, n - at);
        auto here = [&](auto* one) { return one ? one + at : one; };
        auto run = [&](auto remembers, auto clips) {
            update_piece<rule, kind, remembers(), clips(), W, G>(count, working + at, gradient + at,
                                                                 here(static_cast<Kept<kind>*>(kept)), here(first),
                                                                 here(second), factor, limit, scalars);
        };
        auto by_clipping = [&](auto remembers) {
            if (clipped) run(remembers, std::true_type());
            else run(remembers, std::false_type());
        };
        if constexpr (rule != SGD) by_clipping(std::true_type());
        else if (first) by_clipping(std::true_type());
        else by_clipping(std::false_type());
    });
}

template <Kind kind, class W, class G, class... Given>
void by_rule(int rule, Given... given) {
    if (rule == ADAMW) update<ADAMW, kind, W, G>(given...);
    else if (rule == ADAM) update<ADAM, kind, W, G>(given...);
    else update<SGD, kind, W, G>(given...);
}
}  // namespace

// format: of the weight, bf16 for a split one; kept, first, second: null where there is none.
EXPORT int update(int threads, int format, int rule, int kind, int gradient_format, long n, void* working,
                  const void* gradient, void* kept, float* first, float* second, float factor, int clipped, float limit,
                  const float* scalars) {
    with_type(gradient_format, [&](auto* of) {
        using G = std::remove_pointer_t<decltype(of)>;
        auto run = [&](auto kind_of, auto* weight) {
            using W = std::remove_pointer_t<decltype(weight)>;
            by_rule<kind_of(), W, G>(rule, threads, n, weight, static_cast<const G*>(gradient), kept, first, second, factor,
                                     clipped, limit, scalars);
        };
        const std::integral_constant<Kind, WIDE> wide;
        const std::integral_constant<Kind, NONE> none;
        if (kind == SPLIT) run(std::integral_constant<Kind, SPLIT>(), static_cast<bf16*>(working));
        else with_type(format, [&](auto* weight) {
            weight = static_cast<decltype(weight)>(working);
            if constexpr (std::is_same_v<decltype(weight), float*>) run(none, weight);
            else if (kind == WIDE) run(wide, weight);
            else run(none, weight);
        });
    });
    return 0;
}
