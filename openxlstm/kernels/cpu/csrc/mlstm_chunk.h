// What the forward and the backward sweep of the mLSTM share: a chunk's gates, and rows read into working memory.
#pragma once

#include <cmath>
#include <optional>

#include "memory.h"
#include "openxlstm.h"
#include "tiles.h"

namespace XL_ISA {

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bf16(x); }
inline int64_t padded(int64_t x) { return (x + W - 1) / W * W; }
// Rows of a power of two would share a few sets of the cache: one vector more, and they spread over all.
inline int64_t pitch(int64_t x) { return padded(x) + 16; }

// Consecutive arrays of one allocation, each on a cache line of its own.
class Arena {
  public:
    void reserve(float *&array, int64_t count) { piece({&array, nullptr, (count + 15) / 16 * 16}); }
    void reserve(uint16_t *&array, int64_t count) { piece({nullptr, &array, (count + 31) / 32 * 16}); }

    void allocate() {
        memory = zeros(static_cast<size_t>(total));
        float *at = memory.get();
        for (int p = 0; p < used; at += pieces[p++].size)
            if (pieces[p].array != nullptr) *pieces[p].array = at;
            else *pieces[p].words = reinterpret_cast<uint16_t *>(at);
    }

  private:
    struct Piece {
        float **array;
        uint16_t **words;
        int64_t size;  // in floats
    } pieces[48];
    int64_t total = 0;
    int used = 0;
    Buffer memory;

    void piece(Piece p) { pieces[used++] = p, total += p.size; }
};

// The gates of up to L steps of one head, as weights. With b_j the sum of the log forget gates since the chunk began,
// key_l = log_i_l - b_l and row_j = max(m_in, key_1 .. key_j), which is m_j - b_j: every exponent is at most 0, and the
// maximum of a row of scores is known before there are scores. A reset leaves its forget gate out of b and begins the
// running maximum anew; keys before `first[j]` are of another document. A step that is masked has key = -infinity.
struct Gates {
    float *log_f, *log_i, *b, *key, *row;  // by step
    float *enter;                          // weight of the incoming state in a row, without the query's scale
    float *write;                          // weight of a key in the outgoing state
    float *floor;                          // smallest denominator
    float *df_dx, *di_dx;                  // derivatives of log_f and log_i by the pre-activations
    int32_t first[256];                    // where the row's document begins in this chunk
    uint8_t fresh[256], exists[256];       // reset and mask of a step
    float decay, m_out;                    // of the incoming state in the outgoing one; the outgoing stabiliser

    void reserve(Arena &arena, int64_t L) {
        for (float **array : {&log_f, &log_i, &b, &key, &row, &enter, &write, &floor, &df_dx, &di_dx})
            arena.reserve(*array, L + 31);  // read in two vectors at a time
    }

    // gate: 0 exponential input gate, 1 and 2 sigmoid, without and with normaliser. i, f: `step` apart.
    void compute(
        int64_t L, int64_t gate, const float *i, const float *f, int64_t step, const uint8_t *reset,
        const uint8_t *mask, float m_in
    ) {
        for (int64_t t = 0; t < L; ++t) {
            fresh[t] = reset != nullptr && reset[t] != 0;
            exists[t] = mask == nullptr || mask[t] != 0;
            log_f[t] = exists[t] ? f[t * step] : 0.0f;
            log_i[t] = exists[t] ? i[t * step] : 0.0f;
        }
        for (int64_t t = 0; t < L; t += W) {
            vf x = load(log_f + t);
            store(df_dx + t, vsigmoid(-x));
            store(log_f + t, log_sigmoid(x));
            x = load(log_i + t);
            store(di_dx + t, gate == 0 ? all(1.0f) : vsigmoid(-x));
            if (gate != 0) store(log_i + t, log_sigmoid(x));
        }
        float sum = 0.0f, highest = m_in;
        int32_t begin = 0;
        bool emptied = false;
        for (int64_t t = 0; t < L; ++t) {
            const float forget = exists[t] ? log_f[t] : 0.0f;
            if (fresh[t]) {
                begin = static_cast<int32_t>(t), emptied = true;
                highest = forget - sum;  // of the empty state, whose m is 0, in the frame of this row
            } else {
                sum += forget;
            }
            b[t] = sum;
            key[t] = exists[t] ? log_i[t] - sum : -INFINITY;
            if (key[t] > highest || key[t] != key[t]) highest = key[t];
            row[t] = gate == 0 ? highest : -sum;
            first[t] = begin;
            enter[t] = emptied ? -INFINITY : m_in - row[t];
            floor[t] = b[t] + row[t];
        }
        const float last = row[L - 1];
        m_out = gate == 0 ? sum + last : 0.0f;
        decay = emptied ? 0.0f : std::exp(m_in - last);
        for (int64_t t = 0; t < L; ++t) write[t] = t < begin ? -INFINITY : key[t] - last;
        for (int64_t t = 0; t < L; t += W) {
            store(enter + t, vexp(load(enter + t)));
            store(write + t, vexp(load(write + t)));
            store(floor + t, vexp(at_most(at_least(-load(floor + t), -80.0f), 80.0f)));
        }
    }

    // d of (21) for the query's product a with n; a NaN stays one
    float denominator(int64_t j, float a, double eps) const {
        const float size = std::fabs(a), low = floor[j];
        return (size > low || a != a ? size : low) + static_cast<float>(eps);
    }

    // Which of the W keys from l on stand in row j: none that is later, none of another document.
    vi stand(int64_t j, int64_t l) const {
        vi key = LANES + static_cast<int32_t>(l);
        return (key >= first[j]) & (key <= static_cast<int32_t>(j));
    }

    // weights[l] of keys l <= j of row j's own document; 0 for the rest of its vectors up to `end`.
    void weigh(int64_t j, int64_t end, float *weights) const {
        const int64_t from = first[j] / W * W;
        for (int64_t l = 0; l < from; l += W) store(weights + l, vf{});
        for (int64_t l = from; l <= j; l += W) store(weights + l, vexp(load(key + l) - row[j]));
        for (int64_t l = from; l < first[j]; ++l) weights[l] = 0.0f;
        for (int64_t l = j + 1; l < end; ++l) weights[l] = 0.0f;
    }

  private:
    static vf log_sigmoid(vf x) { return at_most(x, 0.0f) - vlog1p(vexp(-absolute(x))); }
};

// L rows of `count` elements, `stride` apart, as fp32 with a pitch of ld. Rows that do not exist are zeros, and so is the rest
// of a last vector: 0 times what stands there may be NaN.
template <typename Element>
inline void read_rows(
    const Element *from, int64_t stride, const uint8_t *exists, int64_t L, int64_t count, float *to, int64_t ld
) {
    for (int64_t t = 0; t < L; ++t, from += stride, to += ld) {
        if (!exists[t]) {
            std::memset(to, 0, sizeof(float) * static_cast<size_t>(padded(count)));
            continue;
        }
        int64_t x = 0;
        for (; x + W <= count; x += W) store(to + x, load_some(from + x, W));
        if (x < count) store(to + x, load_some(from + x, static_cast<int>(count - x)));
    }
}

template <typename Element>
inline void write_row(const float *from, Element *to, int64_t count, float factor = 1.0f) {
    int64_t x = 0;
    for (; x + W <= count; x += W) store_some(to + x, load(from + x) * factor, W);
    if (x < count) store_some(to + x, load(from + x) * factor, static_cast<int>(count - x));
}

template <typename Number>
inline float dot(const float *x, const Number *y, int64_t count) {  // over padded vectors, whose padding is 0 in one
    vf sum = {};
    for (int64_t e = 0; e < count; e += W) sum += load(x + e) * load(y + e);
    return sum_of(sum);
}

}  // namespace XL_ISA
