// Spreads pieces of work over the threads of an OpenMP runtime that is handed over, so that no second one is started.
#pragma once
#include <atomic>

#define EXPORT extern "C" __attribute__((visibility("default")))

using Body = void (*)(void*);
using Launcher = void (*)(Body, void*, unsigned, unsigned);
static Launcher launcher = nullptr;

EXPORT void use_launcher(void* found) { launcher = reinterpret_cast<Launcher>(found); }

// Calls work(i) for i = 0 .. count - 1. Whoever is free takes the next piece, so pieces must not depend on who does them.
template <class Work>
static void parallel(int threads, long count, const Work& work) {
    struct Shared {
        const Work& work;
        std::atomic<long> next;
        long count;
    } shared{work, {0}, count};
    auto body = [](void* given) {
        Shared& mine = *static_cast<Shared*>(given);
        for (long i = mine.next++; i < mine.count; i = mine.next++) mine.work(i);
    };
    if (launcher && threads > 1 && count > 1)
        launcher(body, &shared, static_cast<unsigned>(count < threads ? count : threads), 0);
    else
        body(&shared);
}
