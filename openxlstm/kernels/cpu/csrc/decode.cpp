// One token through a whole model in one parallel region: the decoding step of both architectures (models/xlstm.py,
// models/xlstm_large.py) as a list of operations. The states are updated in place, the memory of the mLSTM in one pass.
//
// A thread's share of an operation is contiguous and depends on sizes alone; a row's numbers do not depend on its company.

#include <cmath>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "matrices.h"
#include "openxlstm.h"

namespace XL_ISA {
namespace {

constexpr int MOST_X = 4;  // rows of x that pass together: 4 rows of the matrix times 4 are 16 sums in registers

struct Share {
    int64_t begin, end;
};

class Step {
  public:
    Step(const xl_decode &call, int64_t thread, int64_t threads) : call(call), thread(thread), threads(threads) {}

    void run(const xl_operation &op) {
        switch (op.kind) {
            case XL_EMBED: embed(op); break;
            case XL_NORM: norm(op); break;
            case XL_LINEAR: linear(op); break;
            case XL_HEADWISE: headwise(op); break;
            case XL_CONV: conv(op); break;
            case XL_MLSTM_GATE: mlstm_gate(op); break;
            case XL_MLSTM: mlstm(op); break;
            case XL_SLSTM: slstm(op); break;
            default: elementwise(op); break;
        }
    }

  private:
    const xl_decode &call;
    const int64_t thread, threads;

    Share share(int64_t count, int64_t grain) const {
        const int64_t grains = (count + grain - 1) / grain;
        const int64_t begin = grains * thread / threads * grain, end = grains * (thread + 1) / threads * grain;
        return {begin < count ? begin : count, end < count ? end : count};
    }

    float *at(int64_t offset, int64_t ld, int64_t row) const { return call.memory + offset + row * ld; }

    void embed(const xl_operation &op) const {
        const Share own = share(op.width, BLOCK_NUMBERS);
        for (int64_t row = 0; row < call.rows; ++row) {
            const int64_t token = call.tokens[row];
            float *to = at(op.to, op.to_ld, row);
            switch (op.format) {
                case XL_F32: read<F32>(op, token, own, to); break;
                case XL_BF16: read<BF16>(op, token, own, to); break;
                case XL_Q8_0: read<Q8_0>(op, token, own, to); break;
                case XL_Q4_0: read<Q4_0>(op, token, own, to); break;
                default: read<Q4_1>(op, token, own, to); break;
            }
        }
    }

    template <typename Format>
    static int64_t row_bytes(int64_t width) {
        return width / BLOCK_NUMBERS * Format::SIZE + width % BLOCK_NUMBERS * (Format::SIZE / BLOCK_NUMBERS);
    }

    template <typename Format>
    static void read(const xl_operation &op, int64_t token, Share own, float *to) {
        const uint8_t *from = static_cast<const uint8_t *>(op.weight) + token * row_bytes<Format>(op.width);
        int64_t e = own.begin;
        for (; e + BLOCK_NUMBERS <= own.end; e += BLOCK_NUMBERS) {
            const uint8_t *p = from + e / BLOCK_NUMBERS * Format::SIZE;
            vf w[PARTS];
            Format::values(p, w);
            for (int s = 0; s < PARTS; ++s) store(to + e + s * W, w[s] * Format::scale(p) + Format::shift(p));
        }
        const float one = 1.0f;
        for (; e < own.end; ++e) to[e] = tail(op.format, from + e * (Format::SIZE / BLOCK_NUMBERS), 0, 1, &one);
    }

    void norm(const xl_operation &op) const {
        const int64_t part = op.width / op.heads;
        const Share own = share(call.rows * op.heads, 1);
        const float *weight = static_cast<const float *>(op.weight);
        for (int64_t task = own.begin; task < own.end; ++task) {
            const int64_t row = task / op.heads, first = task % op.heads * part;
            const float *from = at(op.from, op.from_ld, row) + first;
            float *to = at(op.to, op.to_ld, row) + first;
            float mean = 0.0f;
            if (op.mode == 0) {
                mean = total(from, part, [](vf x) { return x; }) / static_cast<float>(part);
            }
            const float square = total(from, part, [mean](vf x) { return (x - mean) * (x - mean); });
            const float padded = static_cast<float>((part + W - 1) / W * W - part);  // lanes of `total` that hold no number
            const float variance = (square - padded * mean * mean) / static_cast<float>(part);
            const float factor = 1.0f / std::sqrt(variance + static_cast<float>(op.eps));
            for (int64_t e = 0; e < part; e += W) {
                const int left = static_cast<int>(part - e < W ? part - e : W);
                vf y = (load_some(from + e, left) - mean) * factor * load_some(weight + first + e, left);
                if (op.add) y += load_some(to + e, left);
                store_some(to + e, y, left);
            }
        }
    }

    template <typename Function>
    static float total(const float *x, int64_t count, Function function) {
        vf sum = {};
        for (int64_t e = 0; e < count; e += W)
            sum += function(load_some(x + e, static_cast<int>(count - e < W ? count - e : W)));
        return lanes(sum);
    }

    void linear(const xl_operation &op) const {
        switch (op.format) {
            case XL_F32: product<F32>(op); break;
            case XL_BF16: product<BF16>(op); break;
            case XL_Q8_0: product<Q8_0>(op); break;
            case XL_Q4_0: product<Q4_0>(op); break;
            default: product<Q4_1>(op); break;
        }
    }

    template <typename Format>
    void product(const xl_operation &op) const {
        const Share own = share(op.out, 4);
        if (own.begin == own.end) return;
        int64_t row = 0;
        while (row < call.rows) {
            const int64_t left = call.rows - row;
            if (left >= 4) {
                product<Format, 4>(op, own, row), row += 4;
            } else if (left >= 2) {
                product<Format, 2>(op, own, row), row += 2;
            } else {
                product<Format, 1>(op, own, row), row += 1;
            }
        }
    }

#if defined(__AVX512VNNI__)
    template <typename Format, int ROWS_X>
    void product_of_bytes(const xl_operation &op, Share own, int64_t row) const {
        const int64_t blocks = op.width / BLOCK_NUMBERS, bytes = row_bytes<Format>(op.width);
        static thread_local std::vector<int8_t> highs, lows;  // of this thread, as long as it lives
        static thread_local std::vector<int32_t> corrections, folded;
        static thread_local std::vector<float> steps;
        const size_t count = static_cast<size_t>(blocks) * ROWS_X;
        highs.resize(32 * count), lows.resize(32 * count), corrections.resize(8 * count);
        folded.resize(8 * count), steps.resize(count + 7);
        Integers x[ROWS_X];
        for (int m = 0; m < ROWS_X; ++m) {
            const int64_t at_block = m * blocks;
            int8_t *high = highs.data() + 32 * at_block, *low = lows.data() + 32 * at_block;
            int32_t *back = corrections.data() + 8 * at_block, *twice = folded.data() + 8 * at_block;
            float *step = steps.data() + at_block;
            to_integers(at(op.from, op.from_ld, row + m), blocks, offset_of(Format{}), high, low, back, twice, step);
            x[m] = {high, low, back, twice, step};
        }
        const uint8_t *weight = static_cast<const uint8_t *>(op.weight);
        int64_t o = own.begin;
        for (; o + 4 <= own.end; o += 4) {
            float y[4][ROWS_X];
            if constexpr (std::is_same_v<Format, Q4_0>) {
                four_of_nibbles<ROWS_X>(weight + o * bytes, bytes, op.width, x, y);
            } else {
                few_bytes<Format, 4, ROWS_X>(weight + o * bytes, bytes, op.width, x, y);
            }
            finish<4, ROWS_X>(op, o, row, y);
        }
        for (; o < own.end; ++o) {
            float y[1][ROWS_X];
            few_bytes<Format, 1, ROWS_X>(weight + o * bytes, bytes, op.width, x, y);
            finish<1, ROWS_X>(op, o, row, y);
        }
    }
#endif

    template <int COUNT, int ROWS_X>
    void finish(const xl_operation &op, int64_t o, int64_t row, const float (&y)[COUNT][ROWS_X]) const {
        for (int r = 0; r < COUNT; ++r)
            for (int m = 0; m < ROWS_X; ++m) {
                const float value = op.bias == nullptr ? y[r][m] : y[r][m] + op.bias[o + r];
                float *to = at(op.to, op.to_ld, row + m) + o + r;
                *to = op.add ? *to + value : value;
            }
    }

    template <typename Format, int ROWS_X>
    void product(const xl_operation &op, Share own, int64_t row) const {
#if defined(__AVX512VNNI__)
        if constexpr (std::is_same_v<Format, Q8_0> || std::is_same_v<Format, Q4_0>) {
            product_of_bytes<Format, ROWS_X>(op, own, row);
            return;
        }
#endif
        const float *x = at(op.from, op.from_ld, row);
        float sums_x[MOST_X * 4096];
        const int64_t blocks = op.width / BLOCK_NUMBERS, lds = 4096;
        if constexpr (Format::SHIFTED)
            for (int m = 0; m < ROWS_X; ++m)
                for (int64_t block = 0; block < blocks; ++block) {
                    vf sum = {};
                    for (int s = 0; s < PARTS; ++s) sum += load(x + m * op.from_ld + block * BLOCK_NUMBERS + s * W);
                    sums_x[m * lds + block] = lanes(sum);
                }
        const int64_t bytes = row_bytes<Format>(op.width);
        const uint8_t *weight = static_cast<const uint8_t *>(op.weight);
        int64_t o = own.begin;
        for (; o + 4 <= own.end; o += 4) some<Format, 4, ROWS_X>(op, weight, bytes, o, row, x, sums_x, lds);
        for (; o < own.end; ++o) some<Format, 1, ROWS_X>(op, weight, bytes, o, row, x, sums_x, lds);
    }

    template <typename Format, int COUNT, int ROWS_X>
    void some(
        const xl_operation &op, const uint8_t *weight, int64_t bytes, int64_t o, int64_t row, const float *x,
        const float *sums_x, int64_t lds
    ) const {
        float y[COUNT][ROWS_X];
        few<Format, COUNT, ROWS_X>(weight + o * bytes, bytes, op.width, x, op.from_ld, sums_x, lds, y);
        const int64_t whole = op.width / BLOCK_NUMBERS * BLOCK_NUMBERS;
        if (whole < op.width)
            for (int r = 0; r < COUNT; ++r)
                for (int m = 0; m < ROWS_X; ++m)
                    y[r][m] += tail(op.format, weight + (o + r) * bytes, whole, op.width, x + m * op.from_ld);
        finish<COUNT, ROWS_X>(op, o, row, y);
    }

    void headwise(const xl_operation &op) const {
        const int64_t P = op.width / op.heads;
        const Share own = share(op.heads, 1);
        const float *weight = static_cast<const float *>(op.weight);
        for (int64_t row = 0; row < call.rows; ++row) {
            const float *from = at(op.from, op.from_ld, row);
            float *to = at(op.to, op.to_ld, row);
            for (int64_t block = own.begin; block < own.end; ++block)
                for (int64_t o = 0; o < P; ++o) {
                    const float *w = weight + (block * P + o) * P, *x = from + block * P;
                    float sum = 0.0f;
                    if (P >= W) {
                        vf sums = {};
                        for (int64_t e = 0; e < P; e += W) {
                            const int left = static_cast<int>(P - e < W ? P - e : W);
                            sums += load_some(w + e, left) * load_some(x + e, left);
                        }
                        sum = lanes(sums);
                    } else {
                        for (int64_t e = 0; e < P; ++e) sum += w[e] * x[e];
                    }
                    to[block * P + o] = op.bias == nullptr ? sum : sum + op.bias[block * P + o];
                }
        }
    }

    void conv(const xl_operation &op) const {
        const Share own = share(op.width, W);
        const int64_t J = op.taps, tail_size = (J - 1) * op.width;
        const float *weight = static_cast<const float *>(op.weight);  // [J, width], oldest tap first
        for (int64_t row = 0; row < call.rows; ++row) {
            const float *from = at(op.from, op.from_ld, row);
            float *to = at(op.to, op.to_ld, row), *past = op.state + row * tail_size;
            for (int64_t e = own.begin; e < own.end; e += W) {
                const int left = static_cast<int>(own.end - e < W ? own.end - e : W);
                vf sum = load_some(op.bias + e, left);
                const vf now = load_some(from + e, left);
                for (int64_t j = 0; j < J; ++j) {
                    const vf x = j < J - 1 ? load_some(past + j * op.width + e, left) : now;
                    sum += x * load_some(weight + j * op.width + e, left);
                }
                for (int64_t j = 0; j + 1 < J; ++j) {
                    const vf next = j + 2 < J ? load_some(past + (j + 1) * op.width + e, left) : now;
                    store_some(past + j * op.width + e, next, left);
                }
                store_some(to + e, sum * vsigmoid(sum), left);
            }
        }
    }

    // The gates of every head, n and m, and what the memory needs: keep, write, and 1 / d with the query's scale.
    void mlstm_gate(const xl_operation &op) const {
        const int64_t H = op.heads, K = op.width / H;
        const Share own = share(call.rows * H, 1);
        const float scale = 1.0f / std::sqrt(static_cast<float>(K));
        for (int64_t task = own.begin; task < own.end; ++task) {
            const int64_t row = task / H, head = task % H;
            const float raw_i = at(op.from, op.from_ld, row)[head], raw_f = at(op.other, op.other_ld, row)[head];
            const float *q = at(op.third, op.third_ld, row) + head * K, *k = at(op.fourth, op.fourth_ld, row) + head * K;
            float *n = op.state2 + task * K, *m = op.state3 + task;
            const float log_f = log_sigmoid(raw_f), log_i = op.mode == 0 ? raw_i : log_sigmoid(raw_i);
            const float decayed = log_f + *m;
            const float now = op.mode != 0 ? 0.0f : (decayed > log_i || decayed != decayed ? decayed : log_i);
            const float keep = std::exp(decayed - now), write = std::exp(log_i - now);
            *m = now;
            float factor = scale;
            if (op.mode != 1) {
                vf sum = {};
                for (int64_t x = 0; x < K; x += W) {
                    const int left = static_cast<int>(K - x < W ? K - x : W);
                    const vf next = load_some(n + x, left) * keep + load_some(k + x, left) * write;
                    store_some(n + x, next, left);
                    sum += next * load_some(q + x, left);
                }
                const float a = lanes(sum) * scale, size = std::fabs(a);
                const float low = std::exp(std::fmin(std::fmax(-now, -80.0f), 80.0f));
                factor = scale / ((size > low || a != a ? size : low) + static_cast<float>(op.eps));
            }
            float *to = at(op.to, op.to_ld, row) + 3 * head;
            to[0] = keep, to[1] = write, to[2] = factor;
        }
    }

    static float log_sigmoid(float x) { return (x < 0.0f || x != x ? x : 0.0f) - std::log1p(std::exp(-std::fabs(x))); }

    // One pass over the memory: a task is some columns of one head of one row, so that all threads have work.
    void mlstm(const xl_operation &op) const {
        const int64_t H = op.heads, K = op.width / H, V = op.out / H;
        const int64_t columns = 4 * W, cuts = (V + columns - 1) / columns;
        const Share own = share(call.rows * H * cuts, 1);
        for (int64_t task = own.begin; task < own.end; ++task) {
            const int64_t head_at = task / cuts, row = head_at / H, head = head_at % H, first = task % cuts * columns;
            const float *factors = at(op.fourth, op.fourth_ld, row) + 3 * head;
            const float *q = at(op.from, op.from_ld, row) + head * K, *k = at(op.other, op.other_ld, row) + head * K;
            const float *v = at(op.third, op.third_ld, row) + head * V + first;
            float *h = at(op.to, op.to_ld, row) + head * V + first;
            float *C = op.state + head_at * K * V + first;
            if (first + columns <= V) {
                memory<4>(C, V, K, q, k, v, h, factors, W);
            } else {
                for (int64_t y = 0; first + y < V; y += W)
                    memory<1>(C + y, V, K, q, k, v + y, h + y, factors, static_cast<int>(V - first - y < W ? V - first - y : W));
            }
        }
    }

    template <int VECTORS>
    static void memory(
        float *C, int64_t V, int64_t K, const float *q, const float *k, const float *v, float *h, const float *factors, int left
    ) {
        vf value[VECTORS], sum[VECTORS] = {};
        const float keep = factors[0];
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) value[s] = load_some(v + s * W, left) * factors[1];
        for (int64_t x = 0; x < K; ++x, C += V)
            XL_UNROLL for (int s = 0; s < VECTORS; ++s) {
                const vf now = load_some(C + s * W, left) * keep + value[s] * k[x];
                sum[s] += now * q[x];
                store_some(C + s * W, now, left);
            }
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) store_some(h + s * W, sum[s] * factors[2], left);
    }

    void slstm(const xl_operation &op) const {
        const int64_t H = op.heads, D = op.width, K = D / H;
        const Share own = share(call.rows * H, 1);
        const float *R = static_cast<const float *>(op.weight);
        for (int64_t task = own.begin; task < own.end; ++task) {
            const int64_t row = task / H, head = task % H;
            float *gates = at(op.from, op.from_ld, row);
            float *h = op.state + task * K, *c = op.state2 + task * K, *n = op.state3 + task * K, *m = op.state4 + task * K;
            for (int64_t gate = 0; gate < 4; ++gate)
                for (int64_t e = 0; e < K; e += W) {
                    const int left = static_cast<int>(K - e < W ? K - e : W);
                    const int64_t place = gate * D + head * K + e;
                    vf sum = load_some(gates + place, left) + load_some(op.bias + place, left);
                    const float *r = R + head * K * 4 * K + gate * K + e;
                    for (int64_t x = 0; x < K; ++x, r += 4 * K) sum += load_some(r, left) * h[x];
                    store_some(gates + place, sum, left);
                }
            float *to = at(op.to, op.to_ld, row) + head * K;
            for (int64_t e = 0; e < K; e += W) {
                const int left = static_cast<int>(K - e < W ? K - e : W);
                vf raw[4];
                for (int64_t gate = 0; gate < 4; ++gate) raw[gate] = load_some(gates + gate * D + head * K + e, left);
                const vf log_f = op.mode == 1 ? raw[1] : at_most(raw[1], 0.0f) - vlog1p(vexp(-absolute(raw[1])));
                const vf before = load_some(n + e, left), decayed = log_f + load_some(m + e, left);
                // Where n is 0 nothing is remembered, and what m holds is ignored.
                const vf now = before == 0.0f ? raw[0] : (decayed > raw[0] ? decayed : raw[0]);
                const vf keep = before == 0.0f ? vf{} : vexp(decayed - now), write = vexp(raw[0] - now);
                const vf cell = load_some(c + e, left) * keep + write * vtanh(raw[2]), weight = before * keep + write;
                const vf out = vsigmoid(raw[3]) * cell / weight;
                store_some(c + e, cell, left), store_some(n + e, weight, left), store_some(m + e, now, left);
                store_some(to + e, out, left);
            }
            std::memcpy(h, to, sizeof(float) * static_cast<size_t>(K));
        }
    }

    void elementwise(const xl_operation &op) const {
        const Share own = share(op.width, W);
        const float *weight = static_cast<const float *>(op.weight);
        const float scale = static_cast<float>(op.scale);
        for (int64_t row = 0; row < call.rows; ++row) {
            float *to = at(op.to, op.to_ld, row);
            const float *from = at(op.from, op.from_ld, row), *other = at(op.other, op.other_ld, row);
            const float *third = at(op.third, op.third_ld, row);
            for (int64_t e = own.begin; e < own.end; e += W) {
                const int left = static_cast<int>(own.end - e < W ? own.end - e : W);
                vf y;
                switch (op.kind) {
                    case XL_SOFT_CAP: y = vtanh(load_some(to + e, left) * (1.0f / scale)) * scale; break;
                    case XL_GATED: {
                        const vf z = load_some(third + e, left);
                        y = (load_some(from + e, left) + load_some(weight + e, left) * load_some(other + e, left)) * z * vsigmoid(z);
                        break;
                    }
                    case XL_SIGMOID: y = load_some(from + e, left) * vsigmoid(load_some(other + e, left)); break;
                    case XL_SWIGLU: {
                        const vf g = load_some(from + e, left);
                        y = g * vsigmoid(g) * load_some(other + e, left);
                        break;
                    }
                    default: {  // XL_GEGLU, with the error function
                        float g[W];
                        store(g, load_some(from + e, left));
                        for (int lane = 0; lane < W; ++lane) g[lane] *= 0.5f * (1.0f + std::erf(g[lane] * 0.70710678f));
                        y = load(g) * load_some(other + e, left);
                    }
                }
                store_some(to + e, y, left);
            }
        }
    }
};

}  // namespace

int decode(const xl_decode &call) {
    const int threads = static_cast<int>(call.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        Step step(call, omp_get_thread_num(), omp_get_num_threads());
#else
        Step step(call, 0, 1);
#endif
        for (int64_t index = 0; index < call.count; ++index) {
            step.run(call.operations[index]);
            if (call.operations[index].barrier) {
#pragma omp barrier
            }
        }
    }
    return XL_OK;
}

}  // namespace XL_ISA
