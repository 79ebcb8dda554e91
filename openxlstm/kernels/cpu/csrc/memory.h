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

}  // namespace XL_ISA
