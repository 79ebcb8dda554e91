// Products of bf16 matrices on AMX tiles, summed in fp32, and the packing of their operands.
//
// A tile is 16 rows of 64 bytes. A product adds A B: a tile of A is 16 rows of 32 numbers as they lie, a tile of B is 16
// pairs of rows by 16 columns with the two numbers of a pair side by side, and their sums are 16 x 16 fp32 numbers. Left
// operands are rows in memory; right ones are packed into whole tiles, 1 KB each, those of one column of tiles in sequence.
// Sizes are rounded up to 32 (`whole`), and what stands beyond the matrix is 0. The unit flushes subnormal numbers to 0.
#pragma once

#include <immintrin.h>

#include "tiles.h"

namespace XL_ISA {

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows of a tile, numbers in one of its rows and in all

inline int64_t whole(int64_t x) { return (x + DEPTH - 1) / DEPTH * DEPTH; }

// The tiles of this thread, all of full size, until the end of the scope.
class Tiles {
  public:
    Tiles() {
        alignas(64) uint8_t shape[64] = {1};  // palette; bytes of a row from 16, rows from 48
        for (int tile = 0; tile < 8; ++tile) shape[16 + 2 * tile] = 64, shape[48 + tile] = SIDE;
        asm volatile("" ::: "memory");  // some compilers take the configuration for 8 bytes and drop the others
        _tile_loadconfig(shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
};

inline __m512i load_words(const uint16_t *p) { return _mm512_loadu_si512(p); }
inline void store_words(uint16_t *p, __m512i x) { _mm512_storeu_si512(p, x); }

// 32 numbers rounded to bf16, to nearest and ties to even.
inline __m512i rounded(vf first, vf second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

inline vf widened(__m256i words) { return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }

// 32 numbers as bf16, and what rounding them left over as another 32: together they have 16 bits.
struct Halves {
    __m512i words, rest;
};

inline Halves halves(vf first, vf second) {
    const __m512i words = rounded(first, second);
    const vf low = widened(_mm512_castsi512_si256(words)), high = widened(_mm512_extracti64x4_epi64(words, 1));
    return {words, rounded(first - low, second - high)};
}

inline void store_rounded(uint16_t *to, vf x, int64_t count) {
    const __m256i words = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
    if (count >= SIDE) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), words);
    } else {
        _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), words);
    }
}

// Two rows of 32 numbers as 32 pairs, one of each.
struct Pairs {
    __m512i low, high;
};

inline Pairs paired(__m512i even, __m512i odd) {
    const __m512i step = _mm512_set1_epi32(0x00200000);  // the second of a pair is 32 words further on, in `odd`
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(_mm512_or_si512(count, _mm512_slli_epi32(count, 16)), step);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x00100010));
    return {_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}

// 16 x 16 pairs, rows and columns exchanged.
inline void turn(__m512i (&r)[SIDE]) {
    vf x[SIDE];
    for (int i = 0; i < SIDE; ++i) x[i] = reinterpret_cast<vf>(r[i]);
    exchange_all<1>(x);
    for (int i = 0; i < SIDE; ++i) r[i] = reinterpret_cast<__m512i>(x[i]);
}

// Rows as they lie, with a pitch of ld; those that do not exist, and what is beyond l and count up to whole tiles, are 0.
inline void read_words(
    const uint16_t *from, int64_t stride, const uint8_t *exists, int64_t l, int64_t count, uint16_t *to, int64_t ld
) {
    const int64_t rows = whole(l);
    for (int64_t t = 0; t < rows; ++t, from += stride, to += ld) {
        if (t >= l || !exists[t]) {
            std::memset(to, 0, sizeof(uint16_t) * static_cast<size_t>(whole(count)));
            continue;
        }
        int64_t x = 0;
        for (; x + DEPTH <= count; x += DEPTH) store_words(to + x, load_words(from + x));
        if (x < count) store_words(to + x, _mm512_maskz_loadu_epi16((1u << (count - x)) - 1, from + x));
    }
}

// The right operand X [inner, N], from its rows.
inline void pack(int64_t inner, int64_t N, const uint16_t *x, int64_t ld, uint16_t *to) {
    const int64_t column = inner / DEPTH * TILE;
    for (int64_t k = 0; k < inner; k += 2)
        for (int64_t n = 0; n < N; n += DEPTH) {
            const Pairs pair = paired(load_words(x + k * ld + n), load_words(x + (k + 1) * ld + n));
            uint16_t *at = to + n / SIDE * column + k / DEPTH * TILE + k % DEPTH * SIDE;
            store_words(at, pair.low), store_words(at + column, pair.high);
        }
}

// The right operand X^T [inner, N], from the rows of X [N, inner].
inline void pack_turned(int64_t N, int64_t inner, const uint16_t *x, int64_t ld, uint16_t *to) {
    for (int64_t n = 0; n < N; n += SIDE)
        for (int64_t k = 0; k < inner; k += DEPTH, to += TILE) {
            __m512i r[SIDE];
            for (int i = 0; i < SIDE; ++i) r[i] = load_words(x + (n + i) * ld + k);
            turn(r);
            for (int i = 0; i < SIDE; ++i) store_words(to + i * DEPTH, r[i]);
        }
}

// The left operand X^T [inner, N] with column n times weights[n], from what `pack_turned` made of X; `rest`, if it is not
// null, takes what rounding it left over.
inline void turned_and_weighted(
    int64_t N, int64_t inner, const uint16_t *tiles, const float *weights, uint16_t *to, uint16_t *rest, int64_t ld
) {
    const int64_t column = inner / DEPTH * TILE;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t n = 0; n < N; n += DEPTH) {
        const vf first = load(weights + n), second = load(weights + n + SIDE);
        for (int64_t k = 0; k < inner; k += 2) {
            const uint16_t *at = tiles + n / SIDE * column + k / DEPTH * TILE + k % DEPTH * SIDE;
            const __m512i x = load_words(at), y = load_words(at + column);
            const vf x_even = reinterpret_cast<vf>(_mm512_slli_epi32(x, 16)), y_even = reinterpret_cast<vf>(_mm512_slli_epi32(y, 16));
            const vf x_odd = reinterpret_cast<vf>(_mm512_and_si512(x, upper)), y_odd = reinterpret_cast<vf>(_mm512_and_si512(y, upper));
            if (rest == nullptr) {
                store_words(to + k * ld + n, rounded(x_even * first, y_even * second));
                store_words(to + (k + 1) * ld + n, rounded(x_odd * first, y_odd * second));
            } else {
                const Halves even = halves(x_even * first, y_even * second), odd = halves(x_odd * first, y_odd * second);
                store_words(to + k * ld + n, even.words), store_words(to + (k + 1) * ld + n, odd.words);
                store_words(rest + k * ld + n, even.rest), store_words(rest + (k + 1) * ld + n, odd.rest);
            }
        }
    }
}

// The left operand X^T of the rows of X [M, M], whose upper triangle is 0 and left alone.
inline void turned_triangle(int64_t M, const uint16_t *x, int64_t ld, uint16_t *to, int64_t ld_to) {
    for (int64_t m = 0; m < M; m += DEPTH)
        for (int64_t n = 0; n <= m; n += DEPTH) {
            __m512i low[SIDE], high[SIDE];
            for (int i = 0; i < SIDE; ++i) {
                const uint16_t *at = x + (m + 2 * i) * ld + n;
                const Pairs pair = paired(load_words(at), load_words(at + ld));
                low[i] = pair.low, high[i] = pair.high;
            }
            turn(low), turn(high);
            for (int i = 0; i < SIDE; ++i) {
                store_words(to + (n + i) * ld_to + m, low[i]);
                store_words(to + (n + SIDE + i) * ld_to + m, high[i]);
            }
        }
}

// 2 x 2 tiles of C from `begin` to `end` of the inner axis, in tiles. The left operand is A, or A + `rest`.
inline void block(
    int64_t begin, int64_t end, const uint16_t *a, const uint16_t *rest, int64_t lda, const uint16_t *b, int64_t column,
    float *c, int64_t ldc, bool add
) {
    const int64_t row = lda * 2, out = ldc * 4;  // bytes
    float *below = c + SIDE * ldc;
    if (add) {
        _tile_loadd(0, c, out);
        _tile_loadd(1, c + SIDE, out);
        _tile_loadd(2, below, out);
        _tile_loadd(3, below + SIDE, out);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = begin; k < end; ++k) {
        _tile_loadd(4, a + k * DEPTH, row);
        _tile_loadd(6, b + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + column + k * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + SIDE * lda + k * DEPTH, row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (rest == nullptr) continue;
        _tile_loadd(4, rest + k * DEPTH, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, rest + SIDE * lda + k * DEPTH, row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, out);
    _tile_stored(1, c + SIDE, out);
    _tile_stored(2, below, out);
    _tile_stored(3, below + SIDE, out);
}

// C [M, N] = A [M, inner] B [inner, N], or C + A B; sizes are whole. `causal`: the lower triangle alone, in
// blocks. `rest`: what rounding A left over, which enters too.
template <Inner INNER = Inner::ALL>
static void product(
    int64_t M, int64_t N, int64_t inner, const uint16_t *a, int64_t lda, const uint16_t *b, float *c, int64_t ldc,
    Ahead &ahead, bool add = false, bool causal = false, const uint16_t *rest = nullptr
) {
    const int64_t column = inner / DEPTH * TILE;
    asm volatile("" ::: "memory");  // the tile instructions of some compilers do not say that they read memory
    for (int64_t n = 0; n < N; n += DEPTH)
        for (int64_t m = causal ? n : 0; m < M; m += DEPTH) {
            const int64_t begin = INNER == Inner::FROM_ROW ? m / DEPTH : 0;
            const int64_t end = INNER == Inner::UP_TO_ROW && m + DEPTH < inner ? m / DEPTH + 1 : inner / DEPTH;
            ahead.some(12);
            const uint16_t *more = rest == nullptr ? nullptr : rest + m * lda;
            block(begin, end, a + m * lda, more, lda, b + n / SIDE * column, column, c + m * ldc + n, ldc, add);
        }
    asm volatile("" ::: "memory");
}

}  // namespace XL_ISA
