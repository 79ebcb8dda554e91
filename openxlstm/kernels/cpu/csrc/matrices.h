// Products of a few rows with a matrix that is read once: weights in fp32, bf16, or in ggml's blocks of 32 numbers.
//
// Weights become fp32 in registers and activations stay fp32, so a product is that of the dequantised matrix but for the
// order of its sum. The order does not depend on how many rows or threads there are. Four rows of the matrix go by
// together: their sums hide each other's latency, and each is one stream of memory.
#pragma once

#include <cmath>

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace XL_ISA {

constexpr int BLOCK_NUMBERS = 32;
constexpr int PARTS = BLOCK_NUMBERS / W;  // vectors of a block

static inline float half(const uint8_t *p) {
    _Float16 x;
    std::memcpy(&x, p, sizeof x);
    return static_cast<float>(x);
}

// GCC takes a vector conversion from 8 to 32 bits apart into single numbers, which is ten times as slow as reading them
// from memory; so the wide sets have it spelt out, and the others go by 16 bits.
#if defined(__AVX512F__)
static inline void signed_bytes(const uint8_t *p, vf (&w)[PARTS]) {
    for (int s = 0; s < 2; ++s)
        w[s] = (vf)_mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 16 * s)))
        );
}

// Nibbles are looked up, so that one widening serves two of them; a look-up minds the lowest four bits alone.
static inline void nibbles(const uint8_t *p, vf (&w)[PARTS], float first) {
    const vf table = vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first;
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    w[0] = (vf)_mm512_permutexvar_ps(both, (__m512)table);
    w[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)table);
}

static inline vf half_everywhere(const uint8_t *p) {
    int16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (vf)_mm512_cvtph_ps(_mm256_set1_epi16(bits));
}
#elif defined(__AVX2__)
static inline void signed_bytes(const uint8_t *p, vf (&w)[PARTS]) {
    for (int s = 0; s < 4; ++s)
        w[s] = (vf)_mm256_cvtepi32_ps(
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * s)))
        );
}

static inline void nibbles(const uint8_t *p, vf (&w)[PARTS], float first) {
    for (int s = 0; s < 2; ++s) {
        const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 8 * s)));
        w[s] = (vf)_mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15))) + first;
        w[s + 2] = (vf)_mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)) + first;
    }
}

static inline vf half_everywhere(const uint8_t *p) {
    int16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return (vf)_mm256_cvtph_ps(_mm_set1_epi16(bits));
}
#else
typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef int8_t signed16 __attribute__((vector_size(16)));
typedef int16_t words16 __attribute__((vector_size(32)));
typedef int16_t vw __attribute__((vector_size(2 * W)));

static inline void widen_words(words16 q, vf *w) {  // 16 words to 16 / W vectors of floats
    vw parts[16 / W];
    std::memcpy(parts, &q, sizeof q);
    for (int s = 0; s < 16 / W; ++s) w[s] = __builtin_convertvector(__builtin_convertvector(parts[s], vi), vf);
}

static inline void signed_bytes(const uint8_t *p, vf (&w)[PARTS]) {
    for (int part = 0; part < 2; ++part) {
        signed16 q;
        std::memcpy(&q, p + 16 * part, sizeof q);
        widen_words(__builtin_convertvector(q, words16), w + part * 16 / W);
    }
}

static inline void nibbles(const uint8_t *p, vf (&w)[PARTS], float first) {
    bytes16 q;
    std::memcpy(&q, p, sizeof q);
    widen_words(__builtin_convertvector(q & 15, words16), w);
    widen_words(__builtin_convertvector(q >> 4, words16), w + 16 / W);
    for (vf &part : w) part += first;
}

static inline vf half_everywhere(const uint8_t *p) { return all(half(p)); }
#endif

// What each format says of 32 numbers: w = scale * values + shift.
struct F32 {
    static constexpr int SIZE = 128;
    static constexpr bool SCALED = false, SHIFTED = false;
    static void values(const uint8_t *p, vf (&w)[PARTS]) {
        for (int s = 0; s < PARTS; ++s) w[s] = load(reinterpret_cast<const float *>(p) + s * W);
    }
    static vf scale(const uint8_t *) { return all(1.0f); }
    static float shift(const uint8_t *) { return 0.0f; }
};

struct BF16 {
    static constexpr int SIZE = 64;
    static constexpr bool SCALED = false, SHIFTED = false;
    static void values(const uint8_t *p, vf (&w)[PARTS]) {
        for (int s = 0; s < PARTS; ++s) w[s] = load(reinterpret_cast<const uint16_t *>(p) + s * W);
    }
    static vf scale(const uint8_t *) { return all(1.0f); }
    static float shift(const uint8_t *) { return 0.0f; }
};

struct Q8_0 {
    static constexpr int SIZE = 34;
    static constexpr bool SCALED = true, SHIFTED = false;
    static void values(const uint8_t *p, vf (&w)[PARTS]) { signed_bytes(p + 2, w); }
    static vf scale(const uint8_t *p) { return half_everywhere(p); }
    static float shift(const uint8_t *) { return 0.0f; }
};

struct Q4_0 {
    static constexpr int SIZE = 18;
    static constexpr bool SCALED = true, SHIFTED = false;
    static void values(const uint8_t *p, vf (&w)[PARTS]) { nibbles(p + 2, w, -8.0f); }
    static vf scale(const uint8_t *p) { return half_everywhere(p); }
    static float shift(const uint8_t *) { return 0.0f; }
};

struct Q4_1 {
    static constexpr int SIZE = 20;
    static constexpr bool SCALED = true, SHIFTED = true;
    static void values(const uint8_t *p, vf (&w)[PARTS]) { nibbles(p + 4, w, 0.0f); }
    static vf scale(const uint8_t *p) { return half_everywhere(p); }
    static float shift(const uint8_t *p) { return half(p + 2); }
};

static inline float lanes(vf x) {
    float row[W], sum = 0.0f;
    store(row, x);
    for (int e = 0; e < W; ++e) sum += row[e];
    return sum;
}

// COUNT rows of the matrix times ROWS_X rows of x. sums_x: the sum of every block of 32 numbers of x, for shifts.
template <typename Format, int COUNT, int ROWS_X>
static inline void few(
    const uint8_t *weight, int64_t bytes, int64_t width, const float *x, int64_t ldx, const float *sums_x, int64_t lds,
    float (&y)[COUNT][ROWS_X]
) {
    vf sums[COUNT][ROWS_X] = {};
    float shifts[COUNT][ROWS_X] = {};
    const int64_t blocks = width / BLOCK_NUMBERS;
    for (int64_t block = 0; block < blocks; ++block) {
        const float *at = x + block * BLOCK_NUMBERS;
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            const uint8_t *p = weight + r * bytes + block * Format::SIZE;
            __builtin_prefetch(p + COUNT * bytes);  // the same place of the next rows: 57 % of the bandwidth without
            vf w[PARTS];
            Format::values(p, w);
            const vf scale = Format::scale(p);
            const float shift = Format::shift(p);
            XL_UNROLL for (int m = 0; m < ROWS_X; ++m) {
                if constexpr (Format::SCALED) {
                    vf own = w[0] * load(at + m * ldx);
                    XL_UNROLL for (int s = 1; s < PARTS; ++s) own += w[s] * load(at + m * ldx + s * W);
                    sums[r][m] += own * scale;
                } else {
                    XL_UNROLL for (int s = 0; s < PARTS; ++s) sums[r][m] += w[s] * load(at + m * ldx + s * W);
                }
                if constexpr (Format::SHIFTED) shifts[r][m] += shift * sums_x[m * lds + block];
            }
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int m = 0; m < ROWS_X; ++m) y[r][m] = lanes(sums[r][m]) + shifts[r][m];
}

// Where a processor multiplies bytes four at a time, activations become integers of 15 bits for every block of 32, split
// into two bytes: x = step (128 high + low). Two byte products are then as good as fp32, 3e-5 of the largest number of a
// block, and need a third of the instructions. Weights are made unsigned (+ OFFSET), which `corrections` takes back.
#if defined(__AVX512VNNI__)
struct Integers {
    const int8_t *high, *low;      // 32 of a block
    const int32_t *corrections;    // 8 of a block, for four bytes each
    const int32_t *folded;         // the same, first half plus second, twice: for two rows of 16 bytes side by side
    const float *steps;            // 1 of a block, and room for 7 more behind the last
};

// 32 weights of a block as unsigned bytes.
static inline __m256i unsigned_bytes(const uint8_t *p, Q8_0) {
    return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 2)), _mm256_set1_epi8(-128));
}

static inline __m256i unsigned_bytes(const uint8_t *p, Q4_0) {
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 2)), low = _mm_set1_epi8(15);
    return _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(q, 4), low), _mm_and_si128(q, low));
}

static constexpr int offset_of(Q8_0) { return 128; }
static constexpr int offset_of(Q4_0) { return 8; }

static inline void to_integers(
    const float *x, int64_t blocks, int offset, int8_t *high, int8_t *low, int32_t *corrections, int32_t *folded, float *steps
) {
    for (int64_t block = 0; block < blocks; ++block, x += 32, high += 32, low += 32, corrections += 8, folded += 8) {
        const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
        const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        const float step = most / 16256.0f;  // 127 * 128
        const bool finite = std::isfinite(_mm512_reduce_add_ps(_mm512_sub_ps(a, a)) + _mm512_reduce_add_ps(_mm512_sub_ps(b, b)));
        const __m512 inverse = _mm512_set1_ps(most > 0.0f ? 16256.0f / most : 0.0f);
        __m256i sums = _mm256_setzero_si256();
        const __m256i ones = _mm256_set1_epi8(1);
        __m128i highs[2], lows[2];
        for (int s = 0; s < 2; ++s) {
            const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(s ? b : a, inverse));
            const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), 7);
            highs[s] = _mm512_cvtepi32_epi8(h);
            lows[s] = _mm512_cvtepi32_epi8(_mm512_sub_epi32(v, _mm512_slli_epi32(h, 7)));
        }
        const __m256i all_high = _mm256_set_m128i(highs[1], highs[0]), all_low = _mm256_set_m128i(lows[1], lows[0]);
        sums = _mm256_slli_epi32(_mm256_dpbusd_epi32(sums, ones, all_high), 7);
        sums = _mm256_dpbusd_epi32(sums, ones, all_low);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(high), all_high);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(low), all_low);
        const __m256i back = _mm256_mullo_epi32(sums, _mm256_set1_epi32(-offset));
        const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(back), _mm256_extracti128_si256(back, 1));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(corrections), back);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(folded), _mm256_broadcastsi128_si256(both));
        // What is not finite comes out as NaN, not as some integer.
        steps[block] = finite ? step : NAN;
    }
}

// The scales of 8 blocks in a row, `count` of which exist. They lie a block apart, so they are gathered together: to widen
// and spread every one by itself costs a third of the instructions of a 4-bit block.
template <typename Format>
static inline __m256 eight_scales(const uint8_t *p, int count) {
    constexpr int S = Format::SIZE;
    const __m256i places = _mm256_setr_epi32(0, S, 2 * S, 3 * S, 4 * S, 5 * S, 6 * S, 7 * S);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i words = _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), reinterpret_cast<const int *>(p), places, there, 1);
    return _mm256_cvtph_ps(_mm256_cvtepi32_epi16(words));
}

template <typename Format, int COUNT, int ROWS_X>
static inline void few_bytes(
    const uint8_t *weight, int64_t bytes, int64_t width, const Integers (&x)[ROWS_X], float (&y)[COUNT][ROWS_X]
) {
    __m256 sums[COUNT][ROWS_X];
    XL_UNROLL for (int r = 0; r < COUNT; ++r)
        XL_UNROLL for (int m = 0; m < ROWS_X; ++m) sums[r][m] = _mm256_setzero_ps();
    const int64_t blocks = width / BLOCK_NUMBERS;
    for (int64_t first = 0; first < blocks; first += 8) {
        const int count = static_cast<int>(blocks - first < 8 ? blocks - first : 8);
        float factors[COUNT][ROWS_X][8];
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            const __m256 scales = eight_scales<Format>(weight + r * bytes + first * Format::SIZE, count);
            XL_UNROLL for (int m = 0; m < ROWS_X; ++m)
                _mm256_storeu_ps(factors[r][m], _mm256_mul_ps(scales, _mm256_loadu_ps(x[m].steps + first)));
        }
        for (int b = 0; b < count; ++b) {
            const int64_t block = first + b;
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                const uint8_t *p = weight + r * bytes + block * Format::SIZE;
                __builtin_prefetch(p + COUNT * bytes);
                const __m256i w = unsigned_bytes(p, Format{});
                XL_UNROLL for (int m = 0; m < ROWS_X; ++m) {
                    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x[m].high + 32 * block));
                    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x[m].low + 32 * block));
                    const __m256i back = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x[m].corrections + 8 * block));
                    const __m256i high = _mm256_slli_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), w, h), 7);
                    const __m256 own = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_dpbusd_epi32(back, w, l), high));
                    sums[r][m] = _mm256_fmadd_ps(own, _mm256_set1_ps(factors[r][m][b]), sums[r][m]);
                }
            }
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int m = 0; m < ROWS_X; ++m) {
            float row[8];
            _mm256_storeu_ps(row, sums[r][m]);
            y[r][m] = ((row[0] + row[4]) + (row[1] + row[5])) + ((row[2] + row[6]) + (row[3] + row[7]));
        }
}

// Four rows of Q4_0, two side by side in a register: the products of both halves of a block meet in the same sums, and what
// follows them is done once for two rows. Ten instructions of a block become six and a half.
template <int ROWS_X>
static inline void four_of_nibbles(
    const uint8_t *weight, int64_t bytes, int64_t width, const Integers (&x)[ROWS_X], float (&y)[4][ROWS_X]
) {
    constexpr int S = Q4_0::SIZE;
    const auto twice = [](const int8_t *p) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    };
    const __m256i lowest = _mm256_set1_epi8(15);
    __m256 sums[2][ROWS_X];
    XL_UNROLL for (int pair = 0; pair < 2; ++pair)
        XL_UNROLL for (int m = 0; m < ROWS_X; ++m) sums[pair][m] = _mm256_setzero_ps();
    const int64_t blocks = width / BLOCK_NUMBERS;
    for (int64_t first = 0; first < blocks; first += 8) {
        const int count = static_cast<int>(blocks - first < 8 ? blocks - first : 8);
        float factors[4][ROWS_X][8];
        XL_UNROLL for (int r = 0; r < 4; ++r) {
            const __m256 scales = eight_scales<Q4_0>(weight + r * bytes + first * S, count);
            XL_UNROLL for (int m = 0; m < ROWS_X; ++m)
                _mm256_storeu_ps(factors[r][m], _mm256_mul_ps(scales, _mm256_loadu_ps(x[m].steps + first)));
        }
        for (int b = 0; b < count; ++b) {
            const int64_t block = first + b;
            XL_UNROLL for (int pair = 0; pair < 2; ++pair) {
                const uint8_t *p = weight + 2 * pair * bytes + block * S;
                __builtin_prefetch(p + 4 * bytes);
                __builtin_prefetch(p + 5 * bytes);
                const __m256i q = _mm256_inserti128_si256(
                    _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 2))),
                    _mm_loadu_si128(reinterpret_cast<const __m128i *>(p + bytes + 2)), 1
                );
                const __m256i below = _mm256_and_si256(q, lowest);
                const __m256i above = _mm256_and_si256(_mm256_srli_epi16(q, 4), lowest);
                XL_UNROLL for (int m = 0; m < ROWS_X; ++m) {
                    const int8_t *high = x[m].high + 32 * block, *low = x[m].low + 32 * block;
                    __m256i h = _mm256_dpbusd_epi32(_mm256_setzero_si256(), below, twice(high));
                    h = _mm256_slli_epi32(_mm256_dpbusd_epi32(h, above, twice(high + 16)), 7);
                    __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x[m].folded + 8 * block));
                    l = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(l, below, twice(low)), above, twice(low + 16));
                    const __m256 factor = _mm256_mask_broadcastss_ps(
                        _mm256_broadcast_ss(&factors[2 * pair][m][b]), 0xf0, _mm_load_ss(&factors[2 * pair + 1][m][b])
                    );
                    sums[pair][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(h, l)), factor, sums[pair][m]);
                }
            }
        }
    }
    for (int pair = 0; pair < 2; ++pair)
        for (int m = 0; m < ROWS_X; ++m) {
            float row[8];
            _mm256_storeu_ps(row, sums[pair][m]);
            for (int half_of = 0; half_of < 2; ++half_of)
                y[2 * pair + half_of][m] = (row[4 * half_of] + row[4 * half_of + 2]) + (row[4 * half_of + 1] + row[4 * half_of + 3]);
        }
}
#endif

// What is left of a row behind its last whole block: only fp32 and bf16 rows have it.
static inline float tail(int64_t format, const uint8_t *row, int64_t from, int64_t width, const float *x) {
    float sum = 0.0f;
    for (int64_t e = from; e < width; ++e) {
        float w;
        if (format == 0) {
            std::memcpy(&w, row + 4 * e, sizeof w);
        } else {
            uint16_t bits;
            std::memcpy(&bits, row + 2 * e, sizeof bits);
            w = from_bf16(bits);
        }
        sum += w * x[e];
    }
    return sum;
}

}  // namespace XL_ISA
