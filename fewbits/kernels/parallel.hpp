// Spreads pieces of work over the threads of an OpenMP runtime that is handed over, so that no second one is started.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>

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

// Calls first(i) for i = 0 .. count - 1, then between(), then second(i) for i = 0 .. more - 1, in one launch: a thread that
// sleeps until the next one costs 0.1 ms and more to wake where the processor is a virtual one. Whoever has no piece of the
// first left waits awake for those who do, which is at most a piece.
template <class First, class Between, class Second>
static void parallel(int threads, long count, const First& first, const Between& between, long more, const Second& second) {
    std::atomic<long> done{0};
    std::atomic<bool> ready{false};
    auto finish = [&](long pieces) {
        if (done.fetch_add(pieces, std::memory_order_acq_rel) + pieces < count) return;
        between();
        ready.store(true, std::memory_order_release);
    };
    if (count == 0) finish(0);
    const int wanted = int(std::min<long>(threads, std::max(count, more)));  // with one piece each nobody could help
    parallel(wanted, count + more, [&](long piece) {
        if (piece < count) {
            first(piece);
            finish(1);
            return;
        }
        while (!ready.load(std::memory_order_acquire)) std::this_thread::yield();
        second(piece - count);
    });
}
