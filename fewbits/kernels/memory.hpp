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
    void* found = aligned_alloc(64, (count * long(sizeof(T)) + 127) / 64 * 64);
    if (!found) throw std::bad_alloc();
    return Aligned<T>(static_cast<T*>(found));
}
