// Rows of x times the rows of a matrix, in any format: every row of the matrix is read from memory once, however many rows
// of x there are, and what a thread reads next is asked for while it computes.
#pragma once

#include <type_traits>

#include "bytes.h"
#include "openxlstm.h"

namespace XL_ISA {

struct Matrix {
    const uint8_t *weight;
    int64_t format, width, out;

    bool packed() const { return format == XL_Q8_0_PACKED || format == XL_Q4_0_PACKED; }
    int64_t grain() const { return packed() ? GROUP : 4; }  // rows that are computed together

    int64_t row_bytes() const {
        switch (format) {
            case XL_F32: return 4 * width;
            case XL_BF16: return 2 * width;
            case XL_Q4_1: return width / BLOCK_NUMBERS * Q4_1::SIZE;
            case XL_Q8_0: case XL_Q8_0_PACKED: return width / BLOCK_NUMBERS * Q8_0::SIZE;
            default: return width / BLOCK_NUMBERS * Q4_0::SIZE;
        }
    }

    const uint8_t *row(int64_t o) const { return weight + o * row_bytes(); }  // packed: of a group's first row
};

struct Results {
    float *to;
    int64_t ld;
    const float *bias;  // or NULL
    bool add;           // to what stands there
};

// Some rows of x, and the products that a thread computes with them. `scratch`: `rows` times `width` floats.
class Product {
  public:
    void bind(float *memory) { scratch = memory, known = nullptr; }

    // x may have changed.
    void forget() { known = nullptr; }

    // Rows begin .. end of the matrix, begin a multiple of its grain. `next`: where this thread will read afterwards.
    void run(
        const Matrix &matrix, int64_t begin, int64_t end, const float *x, int64_t ldx, int64_t rows, const uint8_t *next,
        const Results &to
    ) {
        if (begin >= end) return;
        switch (matrix.format) {
            case XL_F32: by_four<F32>(matrix, begin, end, x, ldx, rows, next, to); break;
            case XL_BF16: by_four<BF16>(matrix, begin, end, x, ldx, rows, next, to); break;
            case XL_Q8_0: by_four<Q8_0>(matrix, begin, end, x, ldx, rows, next, to); break;
            case XL_Q4_0: by_four<Q4_0>(matrix, begin, end, x, ldx, rows, next, to); break;
            case XL_Q4_1: by_four<Q4_1>(matrix, begin, end, x, ldx, rows, next, to); break;
#if defined(__AVX512VNNI__)
            case XL_Q8_0_PACKED: by_sixteen<Q8_0>(matrix, begin, end, x, ldx, rows, next, to); break;
            case XL_Q4_0_PACKED: by_sixteen<Q4_0>(matrix, begin, end, x, ldx, rows, next, to); break;
#endif
            default: break;  // packed matrices are made for the set that multiplies bytes, by those who call
        }
    }

  private:
    float *scratch = nullptr;
    const float *known = nullptr;  // whose numbers `scratch` holds in the form that `known_format` needs
    int64_t known_format = 0, known_width = 0;

    bool prepared(const float *x, const Matrix &matrix) {
        const bool done = known == x && known_format == matrix.format && known_width == matrix.width;
        known = x, known_format = matrix.format, known_width = matrix.width;
        return done;
    }

    template <typename Format>
    void by_four(
        const Matrix &matrix, int64_t begin, int64_t end, const float *x, int64_t ldx, int64_t rows, const uint8_t *next,
        const Results &to
    ) {
        const int64_t blocks = matrix.width / BLOCK_NUMBERS;
        if constexpr (Format::SHIFTED)
            if (!prepared(x, matrix))
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t block = 0; block < blocks; ++block) {
                        vf sum = {};
                        for (int s = 0; s < PARTS; ++s) sum += load(x + m * ldx + block * BLOCK_NUMBERS + s * W);
                        scratch[m * blocks + block] = lanes(sum);
                    }
        int64_t o = begin;
        for (; o + 4 <= end; o += 4) {
            const uint8_t *ahead = o + 4 < end ? matrix.row(o + 4) : next;
            int64_t m = each<Format, 4, 4, true>(matrix, o, 0, x, ldx, rows, ahead, to);
            for (; m < rows;) m = each<Format, 4, 4, false>(matrix, o, m, x, ldx, rows, nullptr, to);
        }
        for (; o < end; ++o)
            for (int64_t m = 0; m < rows;) m = each<Format, 1, 4, false>(matrix, o, m, x, ldx, rows, nullptr, to);
    }

    // As many rows of x as there are, at most MOST; returns the one after them.
    template <typename Format, int COUNT, int MOST, bool AHEAD>
    int64_t each(
        const Matrix &matrix, int64_t o, int64_t m, const float *x, int64_t ldx, int64_t rows, const uint8_t *ahead,
        const Results &to
    ) {
        if constexpr (MOST > 1)
            if (rows - m < MOST) return each<Format, COUNT, MOST / 2, AHEAD>(matrix, o, m, x, ldx, rows, ahead, to);
        float y[COUNT][MOST];
        const int64_t bytes = matrix.row_bytes(), blocks = matrix.width / BLOCK_NUMBERS, whole = blocks * BLOCK_NUMBERS;
        const uint8_t *weight = matrix.row(o);
        few<Format, COUNT, MOST, AHEAD>(
            weight, bytes, matrix.width, x + m * ldx, ldx, scratch + m * blocks, blocks, ahead, y
        );
        for (int r = 0; r < COUNT; ++r)
            for (int e = 0; e < MOST; ++e) {
                if (whole < matrix.width)
                    y[r][e] += tail(matrix.format, weight + r * bytes, whole, matrix.width, x + (m + e) * ldx);
                put(to, m + e, o + r, y[r][e]);
            }
        return m + MOST;
    }

#if defined(__AVX512VNNI__)
    template <typename Format>
    void by_sixteen(
        const Matrix &matrix, int64_t begin, int64_t end, const float *x, int64_t ldx, int64_t rows, const uint8_t *next,
        const Results &to
    ) {
        const int64_t size = integers_size(matrix.width);
        if (!prepared(x, matrix))
            for (int64_t m = 0; m < rows; ++m) to_integers(x + m * ldx, matrix.width, offset_of(Format{}), scratch + m * size);
        for (int64_t o = begin; o < end; o += GROUP) {
            const uint8_t *ahead = o + GROUP < end ? matrix.row(o + GROUP) : next;
            int64_t m = group<Format, 4, true>(matrix, o, 0, rows, ahead, to);
            for (; m < rows;) m = group<Format, 4, false>(matrix, o, m, rows, nullptr, to);
        }
    }

    template <typename Format, int MOST, bool AHEAD>
    int64_t group(const Matrix &matrix, int64_t o, int64_t m, int64_t rows, const uint8_t *ahead, const Results &to) {
        if constexpr (MOST > 1)
            if (rows - m < MOST) return group<Format, MOST / 2, AHEAD>(matrix, o, m, rows, ahead, to);
        Integers x[MOST];
        for (int e = 0; e < MOST; ++e) x[e] = integers_at(scratch + (m + e) * integers_size(matrix.width), matrix.width);
        float y[MOST][GROUP];
        sixteen<Format, MOST, AHEAD>(matrix.row(o), matrix.width, x, ahead, y);
        const int count = static_cast<int>(matrix.out - o < GROUP ? matrix.out - o : GROUP);
        for (int e = 0; e < MOST; ++e)
            for (int r = 0; r < count; ++r) put(to, m + e, o + r, y[e][r]);
        return m + MOST;
    }
#endif

    static void put(const Results &to, int64_t row, int64_t o, float value) {
        float *place = to.to + row * to.ld + o;
        if (to.bias != nullptr) value += to.bias[o];
        *place = to.add ? *place + value : value;
    }
};

}  // namespace XL_ISA
