// Memory that begins on a cache line.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

struct Freed {
    void operator()(void* memory) const { free(memory); }
};
template <class T>
using Aligned = std::unique_ptr<T, Freed>;

template <class T>
static inline Aligned<T> aligned(long count) {
    const long lines = (count * long(sizeof(T)) + 63) / 64;
    void* found = aligned_alloc(64, (lines ? lines : 1) * 64);  // of 0 bytes it may give none
    if (!found) throw std::bad_alloc();
    return Aligned<T>(static_cast<T*>(found));
}
