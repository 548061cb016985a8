// Sums and maxima over lanes, so that their order depends on the length alone, and e^x.
#pragma once
#include <algorithm>

#include "elements.hpp"

constexpr int LANES = 16;

template <class F>
static inline float sum(long n, F of) {
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
static inline float largest(const float* x, long n) {
    float lanes[LANES];
    std::fill(lanes, lanes + LANES, -INFINITY);
    long j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = lanes[l] > x[j + l] ? lanes[l] : x[j + l];
    for (; j < n; j++) lanes[0] = lanes[0] > x[j] ? lanes[0] : x[j];
    return *std::max_element(lanes, lanes + LANES);
}

// e^x for x <= 88 to within 2 units in the last place (polynomial of Cephes' expf); 0 below -87.3, NaN for NaN.
static inline float exponential(float x) {
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
