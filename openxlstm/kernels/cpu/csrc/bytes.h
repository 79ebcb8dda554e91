// Products with Q8_0 and Q4_0 matrices whose rows lie sixteen side by side, where a processor multiplies bytes.
//
// Packed, sixteen rows are a group, and a group is its blocks of 32 columns one after the other:
//   16 scales (fp16), then 64 bytes for every four columns: four bytes of the first row, four of the second, ...
//   Q8_0: bytes are q + 128.    Q4_0: columns j (low half) and j + 16 (high half) share a byte, as in ggml's blocks.
// That is as many bytes as ggml's rows have. A lane of a register is a row, so scales are one load, and no sum crosses lanes.
//
// Activations become integers of 15 bits for every block of 32, split into two bytes: x = step (128 high + low). Two byte
// products are then as good as fp32, 3e-5 of the largest number of a block.
#pragma once

#include <cmath>
#include <type_traits>

#include "matrices.h"

namespace XL_ISA {

constexpr int GROUP = 16;  // rows side by side

// Sixteen rows of ggml's blocks, `bytes` apart, to a group; `rows` of them exist, the others become zeros.
template <typename Format>
static inline void pack_group(const uint8_t *from, int64_t bytes, int64_t blocks, int64_t rows, uint8_t *to) {
    constexpr int QUANTS = Format::SIZE - 2, FLIP = Format::SIZE == 34 ? 128 : 0;
    for (int64_t block = 0; block < blocks; ++block, to += GROUP * Format::SIZE)
        for (int64_t r = 0; r < GROUP; ++r) {
            uint8_t none[Format::SIZE] = {};
            const uint8_t *p = r < rows ? from + r * bytes + block * Format::SIZE : none;
            std::memcpy(to + 2 * r, p, 2);
            for (int quad = 0; quad < QUANTS / 4; ++quad)
                for (int e = 0; e < 4; ++e)
                    to[2 * GROUP + 64 * quad + 4 * r + e] = static_cast<uint8_t>(p[2 + 4 * quad + e] ^ FLIP);
        }
}

#if defined(__AVX512VNNI__)
struct Integers {
    int8_t *high, *low;  // 32 of a block
    int32_t *back;       // 1 of a block: what the offset of its weights has added, negative
    float *steps;        // 1 of a block
};

static constexpr int offset_of(Q8_0) { return 128; }
static constexpr int offset_of(Q4_0) { return 8; }

// How many floats hold the integers of a row.
static inline int64_t integers_size(int64_t width) { return width / 2 + 2 * (width / BLOCK_NUMBERS); }

static inline Integers integers_at(float *memory, int64_t width) {
    int8_t *high = reinterpret_cast<int8_t *>(memory);
    int32_t *back = reinterpret_cast<int32_t *>(high + 2 * width);
    return {high, high + width, back, reinterpret_cast<float *>(back + width / BLOCK_NUMBERS)};
}

static inline void to_integers(const float *x, int64_t width, int offset, float *memory) {
    const int64_t blocks = width / BLOCK_NUMBERS;
    const Integers to = integers_at(memory, width);
    int8_t *high = to.high, *low = to.low;
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t block = 0; block < blocks; ++block, x += 32, high += 32, low += 32) {
        const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        const __m512 nought = _mm512_add_ps(_mm512_sub_ps(a, a), _mm512_sub_ps(b, b));  // or NaN
        const bool finite = _mm512_cmp_ps_mask(nought, nought, _CMP_UNORD_Q) == 0;
        const __m512 inverse = _mm512_set1_ps(most > 0.0f ? 16256.0f / most : 0.0f);  // 127 * 128
        __m128i highs[2], lows[2];
        for (int s = 0; s < 2; ++s) {
            const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(s ? b : a, inverse));
            const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), 7);
            highs[s] = _mm512_cvtepi32_epi8(h);
            lows[s] = _mm512_cvtepi32_epi8(_mm512_sub_epi32(v, _mm512_slli_epi32(h, 7)));
        }
        const __m256i all_high = _mm256_set_m128i(highs[1], highs[0]), all_low = _mm256_set_m128i(lows[1], lows[0]);
        __m256i sums = _mm256_slli_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, all_high), 7);
        sums = _mm256_dpbusd_epi32(sums, ones, all_low);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(high), all_high);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(low), all_low);
        to.back[block] = -offset * _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
        to.steps[block] = finite ? most / 16256.0f : NAN;  // what is not finite comes out as NaN, not as some integer
    }
}

static inline __m512i four_everywhere(const int8_t *p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

// The products of one block of a group with four columns of weights `w` and of every row of x.
template <int ROWS_X>
static inline void quads(
    __m512i w, const Integers (&x)[ROWS_X], int64_t column, __m512i (&high)[ROWS_X], __m512i (&low)[ROWS_X]
) {
    XL_UNROLL for (int m = 0; m < ROWS_X; ++m) {
        high[m] = _mm512_dpbusd_epi32(high[m], w, four_everywhere(x[m].high + column));
        low[m] = _mm512_dpbusd_epi32(low[m], w, four_everywhere(x[m].low + column));
    }
}

// One block of a group times that of every row of x, added to `sums`.
template <typename Format, int ROWS_X>
static inline void block_of_group(
    const uint8_t *group, const Integers (&x)[ROWS_X], int64_t block, __m512 (&sums)[ROWS_X]
) {
    const __m512i lowest = _mm512_set1_epi8(15);
    const int64_t column = block * BLOCK_NUMBERS;
    __m512i high[ROWS_X], low[ROWS_X];
    XL_UNROLL for (int m = 0; m < ROWS_X; ++m)
        high[m] = _mm512_setzero_si512(), low[m] = _mm512_set1_epi32(x[m].back[block]);
    if constexpr (std::is_same_v<Format, Q8_0>) {
        XL_UNROLL for (int quad = 0; quad < 8; ++quad)
            quads<ROWS_X>(_mm512_loadu_si512(group + 2 * GROUP + 64 * quad), x, column + 4 * quad, high, low);
    } else {
        XL_UNROLL for (int quad = 0; quad < 4; ++quad) {
            const __m512i both = _mm512_loadu_si512(group + 2 * GROUP + 64 * quad);
            quads<ROWS_X>(_mm512_and_si512(both, lowest), x, column + 4 * quad, high, low);
            const __m512i above = _mm512_and_si512(_mm512_srli_epi16(both, 4), lowest);
            quads<ROWS_X>(above, x, column + 16 + 4 * quad, high, low);
        }
    }
    const __m512 scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(group)));
    XL_UNROLL for (int m = 0; m < ROWS_X; ++m) {
        const __m512i own = _mm512_add_epi32(_mm512_slli_epi32(high[m], 7), low[m]);
        const __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(x[m].steps[block]));
        sums[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(own), factor, sums[m]);
    }
}

// COUNT groups times ROWS_X rows of x. AHEAD: as `few` has it.
template <typename Format, int COUNT, int ROWS_X, bool AHEAD>
static inline void sixteen(
    const Streams &groups, int64_t width, const Integers (&x)[ROWS_X], float (&y)[COUNT][ROWS_X][GROUP]
) {
    constexpr int SIZE = GROUP * Format::SIZE;
    __m512 sums[COUNT][ROWS_X];
    XL_UNROLL for (int g = 0; g < COUNT; ++g)
        XL_UNROLL for (int m = 0; m < ROWS_X; ++m) sums[g][m] = _mm512_setzero_ps();
    const int64_t blocks = width / BLOCK_NUMBERS;
    Soon<SIZE, COUNT> soon(groups, blocks);
    for (int64_t block = 0; block < blocks; ++block) {
        if constexpr (AHEAD) soon.fetch_for(block);
        XL_UNROLL for (int g = 0; g < COUNT; ++g)
            block_of_group<Format, ROWS_X>(groups.at[g] + block * SIZE, x, block, sums[g]);
    }
    XL_UNROLL for (int g = 0; g < COUNT; ++g)
        XL_UNROLL for (int m = 0; m < ROWS_X; ++m) _mm512_storeu_ps(y[g][m], sums[g][m]);
}
#endif

}  // namespace XL_ISA
