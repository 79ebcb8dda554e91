// One token through a whole model in one parallel region: the decoding step of both architectures (models/xlstm.py,
// models/xlstm_large.py) as a list of operations, which infer/program.py writes. A row's numbers do not depend on its company,
// nor on how many threads there are.

#include <cmath>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "decode_cells.h"
#include "linear.h"
#include "openxlstm.h"
#include "team.h"

namespace XL_ISA {
namespace {

constexpr int64_t AHEAD = 256 << 10;  // bytes of the next matrix that a waiting thread asks for: an eighth of its cache

// Numbers of `x` at `places`, in every lane's own.
inline vf permute(vf x, vi places) {
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)places, (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)places);
#else
    vf out;
    for (int e = 0; e < W; ++e) out[e] = x[places[e]];
    return out;
#endif
}

class Step {
  public:
    Step(const Member &on, Barrier &barrier, Left *left) : on(on), call(on.call), barrier(barrier), left(left) {
        product.bind(on.own + call.scratch);
    }

    void run() {
        for (int64_t index = 0; index < call.count; ++index) {  // before the first barrier, which no product precedes
            const xl_operation &op = call.operations[index];
            if (op.steal == 0) continue;
            left_of(op, on.thread).set(0, walk_of(op, on.thread).turns());
        }
        for (int64_t index = 0; index < call.count; ++index) {
            const xl_operation &op = call.operations[index];
            if (op.kind == XL_LINEAR) {
                linear(op, index);
            } else {
                product.forget();
                other(op);
            }
            if (op.barrier == XL_EVERYONE || (op.barrier == XL_UNLESS_HEADS_ARE_KEPT && !on.keeps_heads(op)))
                barrier.wait(on.threads, [this] { return fetch_next(); });
        }
    }

  private:
    const Member &on;
    const xl_decode &call;
    Barrier &barrier;
    Left *const left;
    Product product;
    Streams ahead = {};  // what this thread will read next
    int64_t asked = 0, ask = 0, stream = 0;  // bytes of each stream that have been asked for, and that shall be

    void other(const xl_operation &op) const {
        switch (op.kind) {
            case XL_EMBED: embed(op); break;
            case XL_NORM: norm(op); break;
            case XL_HEADWISE: headwise(op); break;
            case XL_CONV: conv(op); break;
            case XL_GATE: gate(on, op); break;
            case XL_MLSTM_GATE: mlstm_gate(on, op); break;
            case XL_MLSTM: mlstm(on, op); break;
            case XL_SLSTM: slstm(on, op); break;
            default: elementwise(op); break;
        }
    }

    static Matrix matrix_of(const xl_operation &op) {
        return {static_cast<const uint8_t *>(op.weight), op.format, op.width, op.out};
    }

    void linear(const xl_operation &op, int64_t index) {
        int64_t after = index;
        do after = after + 1 < call.count ? after + 1 : 0;
        while (call.operations[after].kind != XL_LINEAR);
        const Walk own = walk_of(op, on.thread), next = walk_of(call.operations[after], on.thread);
        const Results to = {on.at(op.to, op.to_ld, 0), op.to_ld, op.bias, op.add != 0};
        const float *x = on.at(op.from, op.from_ld, 0);
        if (op.steal == 0) {
            product.run(own, x, op.from_ld, call.rows, next, to);
        } else {
            const int64_t last = own.turns() - 1;
            for (int64_t turn; (turn = left_of(op, on.thread).first()) >= 0;)
                product.run(own, turn, turn < last ? turn + 1 : -1, x, op.from_ld, call.rows, next, to);
            for (int64_t other = 1; other < on.threads; ++other) {
                const int64_t thread = (on.thread + other) % on.threads;
                const Walk theirs = walk_of(op, thread);
                for (int64_t turn; (turn = left_of(op, thread).last()) >= 0;)
                    product.run(theirs, turn, turn - 1, x, op.from_ld, call.rows, next, to);
            }
        }
        for (int s = 0; s < STREAMS; ++s) ahead.at[s] = next.at(0, s);
        asked = 0, stream = 0, ask = next.part_bytes() < AHEAD / STREAMS ? next.part_bytes() : AHEAD / STREAMS;
    }

    // A thread's rows of a product.
    Walk walk_of(const xl_operation &op, int64_t thread) const {
        const Share share = on.share(op.out, op.grain, thread);
        return {matrix_of(op), share.begin, share.end};
    }

    Left &left_of(const xl_operation &op, int64_t thread) const { return left[(op.steal - 1) * on.threads + thread]; }

    // A line of the next matrix; memory has nothing else to do while a thread waits.
    bool fetch_next() {
        if (asked >= ask) return false;
        fetch<64>(ahead.at[stream] + asked);
        if (++stream == STREAMS) stream = 0, asked += 64;
        return true;
    }

    void embed(const xl_operation &op) const {
        const Share own = on.share(op.width, BLOCK_NUMBERS);
        for (int64_t row = 0; row < call.rows; ++row) {
            const uint8_t *from = matrix_of(op).row(call.tokens[row]);
            float *to = on.at(op.to, op.to_ld, row);
            switch (op.format) {
                case XL_F32: read<F32>(op, from, own, to); break;
                case XL_BF16: read<BF16>(op, from, own, to); break;
                case XL_Q8_0: read<Q8_0>(op, from, own, to); break;
                case XL_Q4_0: read<Q4_0>(op, from, own, to); break;
                default: read<Q4_1>(op, from, own, to); break;
            }
        }
    }

    template <typename Format>
    static void read(const xl_operation &op, const uint8_t *from, Share own, float *to) {
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

    // Of a whole row by every thread for itself, which is cheaper than waiting for a share; or of heads.
    void norm(const xl_operation &op) const {
        if (op.parts == 0) {
            for (int64_t row = 0; row < call.rows; ++row) norm(op, {row, 0, op.width});
        } else {
            on.each_part(op, [&](Part part) { norm(op, part); });
        }
    }

    void norm(const xl_operation &op, Part part) const {
        const int64_t width = part.end - part.begin;
        const float *weight = static_cast<const float *>(op.weight) + part.begin;
        const float *from = on.at(op.from, op.from_ld, part.row) + part.begin;
        const float *past = on.at(op.other, op.other_ld, part.row) + part.begin;
        float *to = on.at(op.to, op.to_ld, part.row) + part.begin;
        float mean = 0.0f;
        if (op.mode == 0) mean = total(from, width, [](vf x) { return x; }) / static_cast<float>(width);
        const float square = total(from, width, [mean](vf x) { return (x - mean) * (x - mean); });
        const float padded = static_cast<float>((width + W - 1) / W * W - width);  // lanes of `total` that hold no number
        const float variance = (square - padded * mean * mean) / static_cast<float>(width);
        const float factor = 1.0f / std::sqrt(variance + static_cast<float>(op.eps));
        for (int64_t e = 0; e < width; e += W) {
            const int left = least(width - e);
            vf y = (load_some(from + e, left) - mean) * factor * load_some(weight + e, left);
            if (op.add) y += load_some(past + e, left);
            store_some(to + e, y, left);
        }
    }

    template <typename Function>
    static float total(const float *x, int64_t count, Function function) {
        vf sum = {};
        for (int64_t e = 0; e < count; e += W) sum += function(load_some(x + e, least(count - e)));
        return lanes(sum);
    }

    // Blocks of P numbers, each with its own matrix; the weight is [P, width], a row for every place in a block.
    void headwise(const xl_operation &op) const {
        const int64_t P = op.width / op.heads;
        on.each_part(op, [&](Part part) {
            const float *x = on.at(op.from, op.from_ld, part.row);
            float *to = on.at(op.to, op.to_ld, part.row);
            if (P < W) {
                narrow_blocks(op, P, part, x, to);
            } else {
                for (int64_t block = part.begin; block < part.end; block += P) wide_block(op, P, block, x, to);
            }
        });
    }

    static void wide_block(const xl_operation &op, int64_t P, int64_t block, const float *x, float *to) {
        for (int64_t o = block; o < block + P; o += W) {
            const int left = least(block + P - o);
            const float *weight = static_cast<const float *>(op.weight) + o;
            vf sum = op.bias == nullptr ? vf{} : load_some(op.bias + o, left);
            for (int64_t e = 0; e < P; ++e) sum += load_some(weight + e * op.width, left) * x[block + e];
            store_some(to + o, sum, left);
        }
    }

    static void narrow_blocks(const xl_operation &op, int64_t P, Part part, const float *x, float *to) {
        vi places = {};  // of the first number of every lane's block
        for (int e = 0; e < W; ++e) places[e] = static_cast<int32_t>(e / P * P);
        for (int64_t o = part.begin; o < part.end; o += W) {
            const int left = least(part.end - o);
            const float *weight = static_cast<const float *>(op.weight) + o;
            vf sum = op.bias == nullptr ? vf{} : load_some(op.bias + o, left);
            if (W % P == 0) {
                const vf own = load_some(x + o, left);
                for (int64_t e = 0; e < P; ++e)
                    sum += load_some(weight + e * op.width, left) * permute(own, places + static_cast<int32_t>(e));
            } else {
                for (int lane = 0; lane < left; ++lane)
                    for (int64_t e = 0; e < P; ++e) sum[lane] += weight[e * op.width + lane] * x[(o + lane) / P * P + e];
            }
            store_some(to + o, sum, left);
        }
    }

    void conv(const xl_operation &op) const {
        const int64_t J = op.taps, tail_size = (J - 1) * op.width;
        const float *weight = static_cast<const float *>(op.weight);  // [J, width], oldest tap first
        on.each_part(op, [&](Part part) {
            const float *from = on.at(op.from, op.from_ld, part.row);
            float *to = on.at(op.to, op.to_ld, part.row), *past = op.state + part.row * tail_size;
            for (int64_t e = part.begin; e < part.end; e += W) {
                const int left = least(part.end - e);
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
        });
    }

    void elementwise(const xl_operation &op) const {
        const float *weight = static_cast<const float *>(op.weight);
        const float scale = static_cast<float>(op.scale);
        on.each_part(op, [&](Part part) {
            float *to = on.at(op.to, op.to_ld, part.row);
            const float *from = on.at(op.from, op.from_ld, part.row), *other = on.at(op.other, op.other_ld, part.row);
            const float *third = on.at(op.third, op.third_ld, part.row);
            for (int64_t e = part.begin; e < part.end; e += W) {
                const int left = least(part.end - e);
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
        });
    }
};

}  // namespace

int decode(const xl_decode &call) {
    for (int64_t row = 0; row < call.rows; ++row)
        if (call.tokens[row] < 0 || call.tokens[row] >= call.vocabulary) return XL_BAD_TOKEN;
    const int threads = static_cast<int>(call.threads);
    Barrier barrier;
    const std::unique_ptr<Left[]> left(new (std::nothrow) Left[static_cast<size_t>(call.steals * threads)]);
    if (left == nullptr) return XL_NO_MEMORY;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const Member on(call, omp_get_thread_num(), omp_get_num_threads());
#else
        const Member on(call, 0, 1);
#endif
        Step(on, barrier, left.get()).run();
    }
    return XL_OK;
}

}  // namespace XL_ISA
