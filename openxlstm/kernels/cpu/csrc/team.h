// The threads that take a token through a model together: who does what of an operation, and how they wait.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "openxlstm.h"
#include "vec.h"

namespace XL_ISA {

// Everyone arrives before anyone goes on. Threads spin, since a token has dozens of these, some microseconds apart; after a
// while they yield, so that more threads than processors come to an end too.
class Barrier {
  public:
    // `idle()` is what there is to do meanwhile; false if nothing.
    template <typename Idle>
    void wait(int64_t threads, Idle idle) {
        const int64_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t turns = 0; round.load(std::memory_order_acquire) == now; ++turns) {
            if (turns > PATIENCE) {
                std::this_thread::yield();
            } else if (!idle()) {
                relax();
            }
        }
    }

  private:
    static constexpr int64_t PATIENCE = 10'000;
    alignas(64) std::atomic<int64_t> arrived{0};
    alignas(64) std::atomic<int64_t> round{0};

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

struct Share {
    int64_t begin, end;
};

// Units of work that are left of a thread's share of one operation. Its owner takes them from the front; whoever has finished
// takes from the back of the others', because processors of a shared machine are not equally fast.
class alignas(64) Left {
  public:
    void set(int64_t begin, int64_t end) { bounds.store(joined(begin, end), std::memory_order_relaxed); }
    int64_t first() { return take(1, 0); }  // -1 if there is none
    int64_t last() { return take(0, 1); }

  private:
    std::atomic<uint64_t> bounds{0};

    static uint64_t joined(int64_t begin, int64_t end) {
        return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
    }

    int64_t take(int64_t front, int64_t back) {
        uint64_t now = bounds.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t begin = static_cast<int64_t>(now >> 32), end = static_cast<int64_t>(now & 0xffffffff);
            if (begin >= end) return -1;
            if (bounds.compare_exchange_weak(now, joined(begin + front, end - back), std::memory_order_relaxed))
                return front != 0 ? begin : end - 1;
        }
    }
};

// Some columns of a row.
struct Part {
    int64_t row, begin, end;
};

// A call as one thread sees it. A thread's share of an operation is contiguous and depends on sizes alone, so operations
// that are divided alike need no barrier between them.
class Member {
  public:
    Member(const xl_decode &call, int64_t thread, int64_t threads)
        : call(call), thread(thread), threads(threads), own(call.own_memory + thread * call.own) {}

    const xl_decode &call;
    const int64_t thread, threads;
    float *const own;  // memory that no other thread sees

    Share share(int64_t count, int64_t grain) const { return share(count, grain, thread); }

    Share share(int64_t count, int64_t grain, int64_t thread) const {
        const int64_t grains = (count + grain - 1) / grain;
        const int64_t begin = grains * thread / threads * grain, end = grains * (thread + 1) / threads * grain;
        return {begin < count ? begin : count, end < count ? end : count};
    }

    float *at(int64_t offset, int64_t ld, int64_t row) const {
        return (offset < 0 ? own - 1 - offset : call.memory + offset) + row * ld;
    }

    // Whether a thread can keep a head of a row through several operations, with all threads about equally busy.
    bool keeps_heads(const xl_operation &op) const {
        const int64_t tasks = call.rows * op.parts, most = (tasks + threads - 1) / threads;
        return 4 * most * threads <= 5 * tasks;
    }

    // What this thread does of an operation that treats numbers by themselves: some of the columns of every row, or, with
    // `parts`, the columns of some heads of some rows.
    template <typename Function>
    void each_part(const xl_operation &op, Function function) const {
        if (op.parts == 0) {
            const Share columns = share(op.width, op.grain);
            if (columns.begin < columns.end)
                for (int64_t row = 0; row < call.rows; ++row) function(Part{row, columns.begin, columns.end});
            return;
        }
        const int64_t width = op.width / op.parts;
        const Share tasks = share(call.rows * op.parts, 1);
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
            const int64_t row = task / op.parts, first = task % op.parts * width;
            function(Part{row, first, first + width});
        }
    }
};

static inline int least(int64_t count) { return static_cast<int>(count < W ? count : W); }

}  // namespace XL_ISA
