// The norms and gates around the cells, forward and backward, each in one pass over its rows (nn/norm.py and the model
// files are the definition): LayerNorm from one element type to another, and (norm(h) weight + skip c) silu(z).
//
// Gradients of weights are summed over a fixed number of spans of rows, then over spans in order: the number of threads
// does not show in the results. Statistics are computed again in the backward pass: h is read there anyway.

#include <algorithm>
#include <cmath>

#include "memory.h"
#include "openxlstm.h"
#include "vec.h"

namespace XL_ISA {
namespace {

constexpr int64_t SPANS = 16;  // of rows, each with sums of its own

inline int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

inline float total(vf x) {
    float row[W], sum = 0.0f;
    store(row, x);
    for (float value : row) sum += value;
    return sum;
}

inline vf lanes(vf x, int left) {  // the first `left` lanes of x, zeros behind them
    if (left >= W) return x;
    float row[W] = {};
    store_some(row, x, left);
    return load(row);
}

inline int some(int64_t width, int64_t e) { return static_cast<int>(std::min<int64_t>(width - e, W)); }

struct Statistics {
    float mean, scale;
};

// Widens one row into `x`, zeros behind its end, and returns its mean and 1 / sqrt(variance + eps).
template <typename Element>
inline Statistics statistics(const Element *row, int64_t width, double eps, float *x) {
    vf sum = {};
    for (int64_t e = 0; e < width; e += W) {
        const vf value = load_some(row + e, some(width, e));
        store(x + e, value);
        sum += value;
    }
    const float mean = total(sum) / static_cast<float>(width);
    vf squares = {};
    for (int64_t e = 0; e < width; e += W) {
        const vf off = lanes(load(x + e) - mean, some(width, e));
        store(x + e, off);
        squares += off * off;
    }
    const float variance = total(squares) / static_cast<float>(width);
    return {mean, 1.0f / std::sqrt(variance + static_cast<float>(eps))};
}

// dx of a norm, given the gradient g of the normalised row and the centred row: (g - mean g - xhat mean(g xhat)) scale.
template <typename Element>
inline void norm_back(const float *g, const float *centred, float scale, int64_t width, vf sum, vf products, Element *dx) {
    const float mean = total(sum) / static_cast<float>(width);
    const float along = total(products) * scale * scale / static_cast<float>(width);
    for (int64_t e = 0; e < width; e += W)
        store_some(dx + e, (load(g + e) - mean - load(centred + e) * along) * scale, some(width, e));
}

// Runs work(first row, last row, span) over all spans and adds up `sums` floats of each into `to`.
template <typename Work>
int in_spans(int64_t rows, int64_t threads, int64_t sums, float *to, Work work) {
    int failed = 0;
    try {
        const Buffer partial = zeros(static_cast<size_t>(SPANS * sums));
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (threads > 1) reduction(max : failed)
        for (int64_t span = 0; span < SPANS; ++span) {
            try {
                work(rows * span / SPANS, rows * (span + 1) / SPANS, partial.get() + span * sums);
            } catch (const std::bad_alloc &) {
                failed = XL_NO_MEMORY;
            }
        }
        for (int64_t e = 0; e < sums; ++e) {
            float sum = 0.0f;
            for (int64_t span = 0; span < SPANS; ++span) sum += partial[span * sums + e];
            to[e] = sum;
        }
    } catch (const std::bad_alloc &) {
        failed = XL_NO_MEMORY;
    }
    return failed;
}

template <typename In, typename Out>
int normed(const xl_norm_forward &call) {
    const int64_t D = call.D;
    return in_spans(call.rows, call.threads, 0, nullptr, [&](int64_t first, int64_t end, float *) {
        const Buffer row = zeros(static_cast<size_t>(padded(D)));
        for (int64_t r = first; r < end; ++r) {
            const Statistics found = statistics(static_cast<const In *>(call.x) + r * D, D, call.eps, row.get());
            Out *y = static_cast<Out *>(call.y) + r * D;
            for (int64_t e = 0; e < D; e += W) {
                const int left = some(D, e);
                store_some(y + e, load(row.get() + e) * found.scale * load_some(call.weight + e, left), left);
            }
        }
    });
}

template <typename In, typename Out>
int normed_back(const xl_norm_backward &call) {
    const int64_t D = call.D;
    return in_spans(call.rows, call.threads, D, call.dweight, [&](int64_t first, int64_t end, float *dweight) {
        const Buffer row = zeros(static_cast<size_t>(padded(D))), g = zeros(static_cast<size_t>(padded(D)));
        for (int64_t r = first; r < end; ++r) {
            const Statistics found = statistics(static_cast<const In *>(call.x) + r * D, D, call.eps, row.get());
            const Out *dy = static_cast<const Out *>(call.dy) + r * D;
            vf sum = {}, products = {};
            for (int64_t e = 0; e < D; e += W) {
                const int left = some(D, e);
                const vf d = load_some(dy + e, left), centred = load(row.get() + e);
                const vf inner = d * load_some(call.weight + e, left);
                store_some(dweight + e, load_some(dweight + e, left) + d * centred * found.scale, left);
                store(g.get() + e, inner);
                sum += inner, products += inner * centred;
            }
            norm_back(g.get(), row.get(), found.scale, D, sum, products, static_cast<In *>(call.dx) + r * D);
        }
    });
}

template <typename Element>
int gated(const xl_gate_forward &call) {
    const int64_t V = call.V, U = call.H * V;
    return in_spans(call.rows, call.threads, 0, nullptr, [&](int64_t first, int64_t end, float *) {
        const Buffer row = zeros(static_cast<size_t>(padded(V)));
        for (int64_t r = first; r < end; ++r)
            for (int64_t u = 0; u < U; u += V) {
                const Statistics found = statistics(static_cast<const Element *>(call.h) + r * U + u, V, call.eps, row.get());
                const Element *c = static_cast<const Element *>(call.c) + r * U + u;
                const Element *z = static_cast<const Element *>(call.z) + r * call.z_stride + u;
                Element *y = static_cast<Element *>(call.y) + r * U + u;
                for (int64_t e = 0; e < V; e += W) {
                    const int left = some(V, e);
                    const vf normed = load(row.get() + e) * found.scale * load_some(call.weight + u + e, left);
                    const vf open = load_some(z + e, left);
                    const vf mixed = normed + load_some(call.skip + u + e, left) * load_some(c + e, left);
                    store_some(y + e, mixed * (open * vsigmoid(open)), left);
                }
            }
    });
}

template <typename Element>
int gated_back(const xl_gate_backward &call) {
    const int64_t V = call.V, U = call.H * V;
    const Buffer sums = zeros(static_cast<size_t>(2 * U));
    const int code = in_spans(call.rows, call.threads, 2 * U, sums.get(), [&](int64_t first, int64_t end, float *own) {
        const Buffer row = zeros(static_cast<size_t>(padded(V))), g = zeros(static_cast<size_t>(padded(V)));
        for (int64_t r = first; r < end; ++r)
            for (int64_t u = 0; u < U; u += V) {
                const int64_t at = r * U + u;
                const Statistics found = statistics(static_cast<const Element *>(call.h) + at, V, call.eps, row.get());
                const Element *dy = static_cast<const Element *>(call.dy) + at, *c = static_cast<const Element *>(call.c) + at;
                const Element *z = static_cast<const Element *>(call.z) + r * call.z_stride + u;
                Element *dc = static_cast<Element *>(call.dc) + at, *dz = static_cast<Element *>(call.dz) + at;
                vf sum = {}, products = {};
                for (int64_t e = 0; e < V; e += W) {
                    const int left = some(V, e);
                    const vf weight = load_some(call.weight + u + e, left), skip = load_some(call.skip + u + e, left);
                    const vf centred = load(row.get() + e), normed = centred * found.scale;
                    const vf open = load_some(z + e, left), gate = vsigmoid(open), past = load_some(c + e, left);
                    const vf d = load_some(dy + e, left), mixed = d * (open * gate);
                    store_some(dz + e, d * (normed * weight + skip * past) * (gate + open * gate * (1.0f - gate)), left);
                    store_some(dc + e, mixed * skip, left);
                    float *dweight = own + u + e, *dskip = own + U + u + e;
                    store_some(dweight, load_some(dweight, left) + mixed * normed, left);
                    store_some(dskip, load_some(dskip, left) + mixed * past, left);
                    const vf inner = mixed * weight;
                    store(g.get() + e, inner);
                    sum += inner, products += inner * centred;
                }
                norm_back(g.get(), row.get(), found.scale, V, sum, products, static_cast<Element *>(call.dh) + at);
            }
    });
    std::memcpy(call.dweight, sums.get(), sizeof(float) * static_cast<size_t>(U));
    std::memcpy(call.dskip, sums.get() + U, sizeof(float) * static_cast<size_t>(U));
    return code;
}

}  // namespace

int gate_forward(const xl_gate_forward &call) { return call.bf16 ? gated<uint16_t>(call) : gated<float>(call); }

int gate_backward(const xl_gate_backward &call) {
    try {
        return call.bf16 ? gated_back<uint16_t>(call) : gated_back<float>(call);
    } catch (const std::bad_alloc &) {
        return XL_NO_MEMORY;
    }
}

int norm_forward(const xl_norm_forward &call) {
    if (call.x_bf16) return call.y_bf16 ? normed<uint16_t, uint16_t>(call) : normed<uint16_t, float>(call);
    return call.y_bf16 ? normed<float, uint16_t>(call) : normed<float, float>(call);
}

int norm_backward(const xl_norm_backward &call) {
    if (call.x_bf16) return call.y_bf16 ? normed_back<uint16_t, uint16_t>(call) : normed_back<uint16_t, float>(call);
    return call.y_bf16 ? normed_back<float, uint16_t>(call) : normed_back<float, float>(call);
}

}  // namespace XL_ISA
