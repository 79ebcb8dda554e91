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
    int64_t grain() const { return packed() ? GROUP : 1; }  // rows that lie together

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

// Some rows of a matrix as a thread walks them: in STREAMS parts side by side, and then what is left over. A turn is a row, or
// a group of rows, of every part, or one that is left over.
class Walk {
  public:
    // Rows begin .. end, begin a multiple of the matrix's grain.
    Walk(const Matrix &matrix, int64_t begin, int64_t end) : matrix(matrix), grain(matrix.grain()), begin(begin) {
        const int64_t rows = end - begin, count = grain == GROUP ? (rows + GROUP - 1) / GROUP : rows;
        length = count / STREAMS, left = count % STREAMS;
        step = grain * matrix.row_bytes(), first = matrix.row(begin);
    }

    int64_t turns() const { return length + left; }
    int streams(int64_t turn) const { return turn < length ? STREAMS : 1; }
    int64_t row(int64_t turn, int stream) const { return begin + grain * place(turn, stream); }
    const uint8_t *at(int64_t turn, int stream) const { return first + step * place(turn, stream); }

    // From the beginning of one part to that of the next.
    int64_t part_bytes() const { return length * step; }

    const Matrix matrix;

  private:
    const int64_t grain, begin;
    int64_t length, left, step;  // turns with all streams and with one, bytes from one place to the next
    const uint8_t *first;

    int64_t place(int64_t turn, int stream) const {
        return turn < length ? stream * length + turn : (STREAMS - 1) * length + turn;
    }
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

    // All turns of a walk. `next`: what this thread will walk afterwards.
    void run(const Walk &walk, const float *x, int64_t ldx, int64_t rows, const Walk &next, const Results &to) {
        for (int64_t turn = 0; turn < walk.turns(); ++turn)
            run(walk, turn, turn + 1 < walk.turns() ? turn + 1 : -1, x, ldx, rows, next, to);
    }

    // One turn, and `then` comes another of the same walk, or, if it is negative, the next walk.
    void run(
        const Walk &walk, int64_t turn, int64_t then, const float *x, int64_t ldx, int64_t rows, const Walk &next,
        const Results &to
    ) {
        const Matrix &matrix = walk.matrix;
        Streams streams;
        for (int s = 0; s < walk.streams(turn); ++s) {
            streams.at[s] = walk.at(turn, s);
            streams.ahead[s] = then >= 0 && s < walk.streams(then) ? walk.at(then, s) : next.at(0, s);
        }
        const Turn now = {walk, turn, streams, x, ldx, rows, to};
        switch (matrix.format) {
            case XL_F32: by_four<F32>(now); break;
            case XL_BF16: by_four<BF16>(now); break;
            case XL_Q8_0: by_four<Q8_0>(now); break;
            case XL_Q4_0: by_four<Q4_0>(now); break;
            case XL_Q4_1: by_four<Q4_1>(now); break;
#if defined(__AVX512VNNI__)
            case XL_Q8_0_PACKED: by_sixteen<Q8_0>(now); break;
            case XL_Q4_0_PACKED: by_sixteen<Q4_0>(now); break;
#endif
            default: break;  // packed matrices are made for the set that multiplies bytes, by those who call
        }
    }

  private:
    struct Turn {
        const Walk &walk;
        int64_t turn;
        const Streams &streams;
        const float *x;
        int64_t ldx, rows;
        const Results &to;
    };

    float *scratch = nullptr;
    const float *known = nullptr;  // whose numbers `scratch` holds in the form that `known_format` needs
    int64_t known_format = 0, known_width = 0;

    bool prepared(const Turn &now) {
        const Matrix &matrix = now.walk.matrix;
        const bool done = known == now.x && known_format == matrix.format && known_width == matrix.width;
        known = now.x, known_format = matrix.format, known_width = matrix.width;
        return done;
    }

    template <typename Format>
    void by_four(const Turn &now) {
        const int64_t blocks = now.walk.matrix.width / BLOCK_NUMBERS;
        if constexpr (Format::SHIFTED)
            if (!prepared(now))
                for (int64_t m = 0; m < now.rows; ++m)
                    for (int64_t block = 0; block < blocks; ++block) {
                        vf sum = {};
                        for (int s = 0; s < PARTS; ++s) sum += load(now.x + m * now.ldx + block * BLOCK_NUMBERS + s * W);
                        scratch[m * blocks + block] = lanes(sum);
                    }
        if (now.walk.streams(now.turn) == STREAMS) {
            rows_of_x([&](auto most, auto ahead, int64_t m) { each<Format, STREAMS, most, ahead>(now, m); }, now.rows);
        } else {
            rows_of_x([&](auto most, auto ahead, int64_t m) { each<Format, 1, most, ahead>(now, m); }, now.rows);
        }
    }

    // Calls function(how many, whether to ask for memory, first) for the rows of x, four at a time and what is left.
    template <typename Function>
    static void rows_of_x(Function function, int64_t rows) {
        constexpr std::integral_constant<int, 4> four;
        int64_t m = 0;
        if (rows >= 4) function(four, std::true_type(), 0), m = 4;
        for (; m + 4 <= rows; m += 4) function(four, std::false_type(), m);
        if (rows - m >= 2) {
            constexpr std::integral_constant<int, 2> two;
            m == 0 ? function(two, std::true_type(), m) : function(two, std::false_type(), m);
            m += 2;
        }
        if (rows > m) {
            constexpr std::integral_constant<int, 1> one;
            m == 0 ? function(one, std::true_type(), m) : function(one, std::false_type(), m);
        }
    }

    template <typename Format, int COUNT, int MOST, bool AHEAD>
    void each(const Turn &now, int64_t m) {
        const Matrix &matrix = now.walk.matrix;
        float y[COUNT][MOST];
        const int64_t blocks = matrix.width / BLOCK_NUMBERS, whole = blocks * BLOCK_NUMBERS;
        const float *x = now.x + m * now.ldx;
        few<Format, COUNT, MOST, AHEAD>(now.streams, matrix.width, x, now.ldx, scratch + m * blocks, blocks, y);
        for (int r = 0; r < COUNT; ++r)
            for (int e = 0; e < MOST; ++e) {
                if (whole < matrix.width)
                    y[r][e] += tail(matrix.format, now.streams.at[r], whole, matrix.width, x + e * now.ldx);
                put(now.to, m + e, now.walk.row(now.turn, r), y[r][e]);
            }
    }

#if defined(__AVX512VNNI__)
    template <typename Format>
    void by_sixteen(const Turn &now) {
        const int64_t width = now.walk.matrix.width, size = integers_size(width);
        if (!prepared(now))
            for (int64_t m = 0; m < now.rows; ++m)
                to_integers(now.x + m * now.ldx, width, offset_of(Format{}), scratch + m * size);
        if (now.walk.streams(now.turn) == STREAMS) {
            rows_of_x([&](auto most, auto ahead, int64_t m) { groups<Format, STREAMS, most, ahead>(now, m); }, now.rows);
        } else {
            rows_of_x([&](auto most, auto ahead, int64_t m) { groups<Format, 1, most, ahead>(now, m); }, now.rows);
        }
    }

    template <typename Format, int COUNT, int MOST, bool AHEAD>
    void groups(const Turn &now, int64_t m) {
        const int64_t width = now.walk.matrix.width;
        Integers x[MOST];
        for (int e = 0; e < MOST; ++e) x[e] = integers_at(scratch + (m + e) * integers_size(width), width);
        float y[COUNT][MOST][GROUP];
        sixteen<Format, COUNT, MOST, AHEAD>(now.streams, width, x, y);
        for (int g = 0; g < COUNT; ++g) {
            const int64_t o = now.walk.row(now.turn, g), end = now.walk.matrix.out;
            const int count = static_cast<int>(end - o < GROUP ? end - o : GROUP);
            for (int e = 0; e < MOST; ++e)
                for (int r = 0; r < count; ++r) put(now.to, m + e, o + r, y[g][e][r]);
        }
    }
#endif

    static void put(const Results &to, int64_t row, int64_t o, float value) {
        float *place = to.to + row * to.ld + o;
        if (to.bias != nullptr) value += to.bias[o];
        *place = to.add ? *place + value : value;
    }
};

}  // namespace XL_ISA
