// Products of small matrices that lie in the cache, and their transposes: what the mLSTM's chunks are made of.
//
// A product adds A B to C. The rows of B and C are contiguous and padded to whole vectors; an element of A is broadcast,
// so A may be read along either axis (strides `row` and `inner`). A block of ROWS x 4 vectors stays in registers while
// the inner axis goes by, which makes the order of every sum that of the inner axis, whatever the size of the rest.
#pragma once

#include <utility>

#include "memory.h"
#include "vec.h"

namespace XL_ISA {

// Which part of the inner axis row i of a product needs: all of it, l <= i, or l >= i (a triangle times a matrix).
enum class Inner { ALL, UP_TO_ROW, FROM_ROW };

struct Left {
    const float *at;
    int64_t row, inner;  // strides
};

// What of C is kept: a factor, one for all rows (step 0) or one for each (step 1). 0 forgets even what is not finite.
struct Keep {
    const float *at;
    int64_t step;
};
constexpr float ZERO = 0.0f, ONE = 1.0f;
constexpr Keep NOTHING = {&ZERO, 0}, EVERYTHING = {&ONE, 0};

template <int COUNT, int VECTORS>
static inline void tile(int64_t begin, int64_t end, Left a, const float *b, int64_t ldb, const float *old, float *c, int64_t ldc, Keep keep) {
    vf sums[COUNT][VECTORS];
    XL_UNROLL for (int r = 0; r < COUNT; ++r) {
        const float factor = keep.at[r * keep.step];
        if (factor == 0.0f) {
            XL_UNROLL for (int s = 0; s < VECTORS; ++s) sums[r][s] = vf{};
        } else {
            XL_UNROLL for (int s = 0; s < VECTORS; ++s) sums[r][s] = load(old + r * ldc + s * W) * factor;
        }
    }
    const float *left = a.at + begin * a.inner;
    b += begin * ldb;
    for (int64_t l = begin; l < end; ++l, left += a.inner, b += ldb) {
        vf right[VECTORS];
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) right[s] = load(b + s * W);
        XL_UNROLL for (int r = 0; r < COUNT; ++r)
            XL_UNROLL for (int s = 0; s < VECTORS; ++s) sums[r][s] += right[s] * left[r * a.row];
    }
    XL_UNROLL for (int r = 0; r < COUNT; ++r)
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) store(c + r * ldc + s * W, sums[r][s]);
}

template <Inner INNER, int COUNT, int VECTORS>
static inline void rows(int64_t first, int64_t inner, Left a, const float *b, int64_t ldb, const float *old, float *c, int64_t ldc, Keep keep) {
    const int64_t begin = INNER == Inner::FROM_ROW ? first : 0;
    const int64_t last = first + COUNT;
    const int64_t end = INNER == Inner::UP_TO_ROW && last < inner ? last : inner;
    tile<COUNT, VECTORS>(begin, end, {a.at + first * a.row, a.row, a.inner}, b, ldb, old + first * ldc, c + first * ldc, ldc,
        {keep.at + first * keep.step, keep.step});
}

// Rows `from` to M of a panel of columns.
template <Inner INNER, int VECTORS>
static inline void columns(
    int64_t from, int64_t M, int64_t inner, Left a, const float *b, int64_t ldb, const float *old, float *c, int64_t ldc,
    Keep keep, Ahead &ahead
) {
    int64_t i = from;
    for (; i + ROWS <= M; i += ROWS) {
        ahead.some(28);
        rows<INNER, ROWS, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep);
    }
    switch (M - i) {
        case 5: rows<INNER, 5, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep); break;
        case 4: rows<INNER, 4, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep); break;
        case 3: rows<INNER, 3, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep); break;
        case 2: rows<INNER, 2, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep); break;
        case 1: rows<INNER, 1, VECTORS>(i, inner, a, b, ldb, old, c, ldc, keep); break;
        default: break;
    }
}

template <Inner INNER>
static inline void panel(
    int64_t vectors, int64_t from, int64_t M, int64_t inner, Left a, const float *b, int64_t ldb, const float *old, float *c,
    int64_t ldc, Keep keep, Ahead &ahead
) {
    switch (vectors) {
        case 1: columns<INNER, 1>(from, M, inner, a, b, ldb, old, c, ldc, keep, ahead); break;
        case 2: columns<INNER, 2>(from, M, inner, a, b, ldb, old, c, ldc, keep, ahead); break;
        case 3: columns<INNER, 3>(from, M, inner, a, b, ldb, old, c, ldc, keep, ahead); break;
        default: columns<INNER, 4>(from, M, inner, a, b, ldb, old, c, ldc, keep, ahead); break;
    }
}

// C [M, N] = keep old + A [M, inner] B [inner, N]. N is rounded up to whole vectors, which B, old and C must have room for.
template <Inner INNER = Inner::ALL>
static void multiply(
    int64_t M, int64_t N, int64_t inner, Left a, const float *b, int64_t ldb, const float *old, float *c, int64_t ldc,
    Keep keep, Ahead &ahead
) {
    for (int64_t first = 0; first < N; first += 4 * W) {
        const int64_t vectors = (N - first + W - 1) / W;
        panel<INNER>(vectors, 0, M, inner, a, b + first, ldb, old + first, c + first, ldc, keep, ahead);
    }
}

// C = keep C + A B
template <Inner INNER = Inner::ALL>
static void multiply(
    int64_t M, int64_t N, int64_t inner, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, Keep keep, Ahead &ahead
) {
    multiply<INNER>(M, N, inner, a, b, ldb, c, c, ldc, keep, ahead);
}

// The lower triangle of C [M, M] = A [M, inner] B [inner, M], in vectors: those with none of it are left as they are.
static void multiply_triangle(
    int64_t M, int64_t inner, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, Ahead &ahead
) {
    for (int64_t i = 0; i < M; i += ROWS) {
        const int64_t end = i + ROWS < M ? i + ROWS : M;
        for (int64_t first = 0; first < end; first += 4 * W) {
            const int64_t vectors = (end - first + W - 1) / W;
            panel<Inner::ALL>(vectors, i, end, inner, a, b + first, ldb, c + first, c + first, ldc, NOTHING, ahead);
        }
    }
}

// Lane j of the result: a[j] where bit STEP of j is clear, b[j - STEP] where it is set; and the other halves likewise.
template <int STEP, size_t... J>
static inline void exchange(vf &a, vf &b, std::index_sequence<J...>) {
#if defined(__clang__)
    const vf low = __builtin_shufflevector(a, b, ((J & STEP) ? W + (J ^ STEP) : J)...);
    const vf high = __builtin_shufflevector(a, b, ((J & STEP) ? W + J : (J | STEP))...);
#else
    const vf low = __builtin_shuffle(a, b, vi{static_cast<int>((J & STEP) ? W + (J ^ STEP) : J)...});
    const vf high = __builtin_shuffle(a, b, vi{static_cast<int>((J & STEP) ? W + J : (J | STEP))...});
#endif
    a = low, b = high;
}

template <int HALF = W / 2>
static inline float sum_of(vf x) {
    if constexpr (HALF == 0) {
        return x[0];
    } else {
        vf other = x;
        exchange<HALF>(x, other, std::make_index_sequence<W>{});  // the lower halves, the upper halves
        return sum_of<HALF / 2>(x + other);
    }
}

template <int STEP>
static inline void exchange_all(vf (&r)[W]) {
    if constexpr (STEP < W) {
#if defined(__clang__)
        _Pragma("unroll")
#else
        _Pragma("GCC unroll 16")
#endif
        for (int i = 0; i < W; ++i)
            if (!(i & STEP)) exchange<STEP>(r[i], r[i | STEP], std::make_index_sequence<W>{});
        exchange_all<2 * STEP>(r);
    }
}

// to[j][i] = from[i][j]
static void transpose(int64_t M, int64_t N, const float *from, int64_t ld_from, float *to, int64_t ld_to) {
    const int64_t whole_M = M / W * W, whole_N = N / W * W;
    for (int64_t j = 0; j < whole_N; j += W)
        for (int64_t i = 0; i < whole_M; i += W) {
            vf r[W];
            for (int x = 0; x < W; ++x) r[x] = load(from + (i + x) * ld_from + j);
            exchange_all<1>(r);
            for (int x = 0; x < W; ++x) store(to + (j + x) * ld_to + i, r[x]);
        }
    for (int64_t i = 0; i < M; ++i)
        for (int64_t j = i < whole_M ? whole_N : 0; j < N; ++j) to[j * ld_to + i] = from[i * ld_from + j];
}

}  // namespace XL_ISA
