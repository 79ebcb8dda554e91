// Products of a few rows with a matrix that is read once: weights in fp32, bf16, or in ggml's blocks of 32 numbers.
//
// Weights become fp32 in registers and activations stay fp32, so a product is that of the dequantised matrix but for the
// order of its sum. The order does not depend on how many rows or threads there are. Four rows of the matrix go by
// together, from four places far apart: their sums hide each other's latency, and memory answers four streams faster than
// one. bytes.h has the faster way for blocks.
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

// Asks for `bytes` of memory from `line` on, into the second-level cache: what is asked for lies thousands of bytes ahead.
template <int BYTES>
static inline void fetch(const uint8_t *line) {
    XL_UNROLL for (int e = 0; e < BYTES; e += 64) __builtin_prefetch(line + e, 0, 2);
}

// Rows, or groups of them, that go by side by side, and those that this thread will read after them.
constexpr int STREAMS = 4;

struct Streams {
    const uint8_t *at[STREAMS], *ahead[STREAMS];
};

// Which memory to ask for while a block of each stream is computed: what lies DISTANCE bytes further in the stream, and when
// that is beyond what is read now, the beginning of what comes after. Without it half of the bandwidth is lost: several
// streams side by side are more than a processor follows by itself, and one stream is less than memory can give.
template <int SIZE, int COUNT>
class Soon {
  public:
    Soon(const Streams &rows, int64_t blocks) : rows(rows), turn(blocks > EARLY ? blocks - EARLY : 0), shift(EARLY - blocks) {
        XL_UNROLL for (int r = 0; r < COUNT; ++r) from[r] = rows.at[r] + EARLY * SIZE;
    }

    void fetch_for(int64_t block) {
        if (block == turn)
            XL_UNROLL for (int r = 0; r < COUNT; ++r) from[r] = rows.ahead[r] + shift * SIZE;
        XL_UNROLL for (int r = 0; r < COUNT; ++r) fetch<SIZE>(from[r] + block * SIZE);
    }

  private:
    static constexpr int DISTANCE = 1024, EARLY = (DISTANCE + SIZE - 1) / SIZE;
    const Streams &rows;
    const int64_t turn, shift;
    const uint8_t *from[COUNT];
};

// COUNT rows of the matrix times ROWS_X rows of x. sums_x: the sum of every block of 32 numbers of x, for shifts. AHEAD:
// memory is asked for as `Soon` has it.
template <typename Format, int COUNT, int ROWS_X, bool AHEAD>
static inline void few(
    const Streams &rows, int64_t width, const float *x, int64_t ldx, const float *sums_x, int64_t lds,
    float (&y)[COUNT][ROWS_X]
) {
    vf sums[COUNT][ROWS_X] = {};
    float shifts[COUNT][ROWS_X] = {};
    const int64_t blocks = width / BLOCK_NUMBERS;
    Soon<Format::SIZE, COUNT> soon(rows, blocks);
    for (int64_t block = 0; block < blocks; ++block) {
        const float *at = x + block * BLOCK_NUMBERS;
        if constexpr (AHEAD) soon.fetch_for(block);
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            const uint8_t *p = rows.at[r] + block * Format::SIZE;
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
