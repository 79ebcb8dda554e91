// Working memory of a task: aligned, zeroed, freed on every way out.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace XL_ISA {

struct Free {
    void operator()(float *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer zeros(size_t count) {
    size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    float *p = static_cast<float *>(std::aligned_alloc(64, bytes));
    if (p == nullptr) throw std::bad_alloc();
    std::memset(p, 0, bytes);
    return Buffer(p);
}

// Large buffers are fresh memory in every call, and a page of 4 KB costs more to get than to fill. With large pages asked
// for, a tape of 64 MB took 8 to 15 ms to write instead of 27 to 37.
inline void ask_for_large_pages(void *p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(p) + bytes;
    if (p != nullptr && end >= first + (size_t{4} << 20))
        madvise(reinterpret_cast<void *>(first), end - first, MADV_HUGEPAGE);  // advice: whether it is taken is all one
#else
    (void)p, (void)bytes;
#endif
}

// Rows of a head are short and far apart, so that the processor does not see them come. They are asked for ahead, a few
// lines between two blocks of a product: more at once would wait for each other.
class Ahead {
  public:
    void forget() { used = now = 0, row = line = 0; }

    // `count` rows of `bytes`, `stride` bytes apart; in order of need.
    void add(const void *at, int64_t count, int64_t bytes, int64_t stride) {
        if (at != nullptr && count > 0) parts[used++] = {static_cast<const char *>(at), count, bytes, stride};
    }

    void some(int lines) {
        asm volatile("");  // GCC takes a function that does nothing but ask for memory without effect, and drops its calls
        while (lines > 0 && now < used) {
            const Part &part = parts[now];
            const char *from = part.at + row * part.stride;
            for (; lines > 0 && line < part.bytes; --lines, line += 64) __builtin_prefetch(from + line, 0, 2);
            if (line < part.bytes) return;
            line = 0;
            if (++row == part.count) row = 0, ++now;
        }
    }

  private:
    struct Part {
        const char *at;
        int64_t count, bytes, stride;
    } parts[10];
    int used = 0, now = 0;
    int64_t row = 0, line = 0;
};

}  // namespace XL_ISA
