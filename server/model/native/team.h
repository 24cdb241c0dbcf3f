// A team: the threads of one parallel region, what each of them does of a kernel's work, and where they wait for each other.
// Owns the barrier and the sharing out. Knows no kernel.
//
// OpenMP starts the threads, but its barrier is not used: once a process has more of its threads than processors, which any
// second thread that ran a parallel region brings about, libgomp stops spinning after some microseconds, and then about
// every second kernel of a step ends with a sleep and a wake-up.
#pragma once

#include <omp.h>

#include <atomic>
#include <thread>

#include "simd.h"

namespace adapterd {

struct Range {
    index_t from, to;
};

class Team {
  public:
    // Returns when all `size` members have called it; what they wrote before can be read then, and `take` begins anew.
    void meet(int size) {
        unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived_.store(0, std::memory_order_relaxed);
            taken_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; i < SPINS; i++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            relax();
        }
        while (round_.load(std::memory_order_acquire) == round) std::this_thread::yield();
    }

    // 0, 1, 2 ... to whichever member asks.
    index_t take() { return taken_.fetch_add(1, std::memory_order_relaxed); }

  private:
    // About a millisecond: members differ by less, unless one has lost its processor.
    static constexpr int SPINS = 1 << 14;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<unsigned> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<index_t> taken_{0};
};

// This thread's place in the team it works for at the moment.
struct Member {
    Team *team = nullptr;
    int place = 0, size = 1;

    void meet() const { team->meet(size); }
    Range share(index_t count) const { return {count * place / size, count * (place + 1) / size}; }
};
inline thread_local Member member;

// Runs `work` in every member of a team of `threads`, or of this thread alone.
template <typename F>
void in_team(bool together, F work) {
    Team team;
    if (!together || threads == 1) {
        member = {&team, 0, 1};
        return work();
    }
#pragma omp parallel num_threads(threads)
    {
        member = {&team, omp_get_thread_num(), omp_get_num_threads()};
        work();
    }
}

// What follows is called by every member with the same arguments, and ends when all are done.

// f(i) for every i: the same i in the same member every time.
template <typename F>
ADAPTERD_INLINE void each(index_t count, F f) {
    Range mine = member.share(count);
    for (index_t i = mine.from; i < mine.to; i++) f(i);
    member.meet();
}

// f(i, next) for every i, in whichever member is free: for work of unequal size, and for processors of unequal speed.
// `next` is what this member does afterwards, so that its memory can be fetched; `count` or more when that is nothing.
template <typename F>
ADAPTERD_INLINE void each_taken(index_t count, F f) {
    for (index_t i = member.team->take(), next; i < count; i = next) {
        next = member.team->take();
        f(i, next);
    }
    member.meet();
}

}  // namespace adapterd
