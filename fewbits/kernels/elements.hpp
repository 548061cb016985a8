// Elements in memory and as fp32, with the bits at hand.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};
using fp16 = _Float16;

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float load(float x) { return x; }
static inline float load(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline float load(fp16 x) { return float(x); }

// To nearest, ties to even, as torch rounds; every NaN becomes the quiet one.
static inline void store(float x, float& out) { out = x; }
static inline void store(float x, fp16& out) { out = fp16(x); }
static inline void store(float x, bf16& out) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(x != x ? 0x7FC0 : rounded);
}

// Calls f(pointer of the element type) for an element format: 0 fp32, 1 bf16, 2 fp16.
template <class F>
static inline void with_type(int format, F f) {
    if (format == 0) f(static_cast<float*>(nullptr));
    else if (format == 1) f(static_cast<bf16*>(nullptr));
    else f(static_cast<fp16*>(nullptr));
}
