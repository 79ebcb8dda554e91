// What stands before the cell of a block: a causal depthwise convolution with SiLU, the block-diagonal maps to q, k, v and
// the projections of both gates (nn/conv.py, nn/linear.py and nn/gates.py are the definition), forward and backward.
//
//   c = silu(b + sum_j w_j x[t-j])     q = Wq c    k = Wk c    v = Wv x    raw = gate_w (q, k, v) + gate_b
//
// Everything but the gates' sum is about a channel and its block of four alone. So a task is a tile of channels (forward:
// of one sequence), which goes through time in groups of rows that share each load of a weight. Results do not depend on
// the number of threads nor on the tile.
//
// A sequence is the list of the steps that exist; a group never spans a reset. The backward sweep goes backward in time,
// computes the convolution again and keeps the gradients of its last J-1 results, which is all that earlier inputs wait for.

#include <algorithm>
#include <vector>

#include "memory.h"
#include "openxlstm.h"
#include "vec.h"

namespace XL_ISA {
namespace {

constexpr int GROUP = 4;   // rows that are worked on together
constexpr int BLOCK = 4;   // width of the blocks on the diagonal
constexpr int PARTS = 3;   // q, k, v

// Lane 4 p + e of the result is lane 4 p + D of x.
template <int D>
inline vf spread(vf x) {
#if defined(__clang__)
    if constexpr (W == 4) return __builtin_shufflevector(x, x, D, D, D, D);
    else if constexpr (W == 8) return __builtin_shufflevector(x, x, D, D, D, D, D + 4, D + 4, D + 4, D + 4);
    else
        return __builtin_shufflevector(x, x, D, D, D, D, D + 4, D + 4, D + 4, D + 4, D + 8, D + 8, D + 8, D + 8, D + 12,
                                       D + 12, D + 12, D + 12);
#else
    vi index;
    XL_UNROLL for (int lane = 0; lane < W; ++lane) index[lane] = (lane & ~3) + D;
    return __builtin_shuffle(x, index);
#endif
}

inline vf dot_block(vf x, const float *weights, int64_t ld) {
    return spread<0>(x) * load(weights) + spread<1>(x) * load(weights + ld) + spread<2>(x) * load(weights + 2 * ld) +
           spread<3>(x) * load(weights + 3 * ld);
}

inline int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

// The steps of one sequence that exist, in groups of neighbours between resets.
struct Group {
    int64_t first;  // among the steps that exist
    int count;
    int past;       // steps before it that its convolution sees, at most J-1; what came before the call counts
    bool fresh;     // a reset stands right before it
};

struct Sequence {
    std::vector<int64_t> at;    // where the existing steps stand
    std::vector<Group> groups;
    int64_t since = 0;          // the first existing step after the last reset
    bool reset = false;         // whether a reset stands anywhere: then nothing that came before the call is left

    Sequence(const uint8_t *resets, const uint8_t *mask, int64_t b, int64_t T, int64_t J) {
        bool fresh = false;
        at.reserve(static_cast<size_t>(T));
        for (int64_t t = 0; t < T; ++t) {
            if (resets != nullptr && resets[b * T + t]) fresh = reset = true, since = count();
            if (mask != nullptr && !mask[b * T + t]) continue;
            if (fresh || groups.empty() || groups.back().count == GROUP) {
                const int64_t before = reset ? count() - since : J - 1;
                groups.push_back({count(), 0, static_cast<int>(std::min(before, J - 1)), fresh});
                fresh = false;
            }
            at.push_back(t);
            ++groups.back().count;
        }
    }

    int64_t count() const { return static_cast<int64_t>(at.size()); }
};

inline std::vector<Sequence> sequences(const uint8_t *reset, const uint8_t *mask, int64_t B, int64_t T, int64_t J) {
    std::vector<Sequence> all;
    all.reserve(static_cast<size_t>(B));
    for (int64_t b = 0; b < B; ++b) all.emplace_back(reset, mask, b, T, J);
    return all;
}

// Weights of a tile of channels, a register of channels side by side; beyond the last channel they are 0.
struct Weights {
    int64_t ld;
    Buffer conv, bias, maps[PARTS], back[PARTS];

    template <typename Call>
    Weights(const Call &call, int64_t u0, int64_t width, bool backward) : ld(padded(width)) {
        conv = zeros(static_cast<size_t>(call.J * ld)), bias = zeros(static_cast<size_t>(ld));
        for (int64_t u = 0; u < width; ++u) {
            bias[u] = call.b[u0 + u];
            for (int64_t j = 0; j < call.J; ++j) conv[j * ld + u] = call.w[(u0 + u) * call.J + call.J - 1 - j];
        }
        if (call.maps[0] == nullptr) return;
        for (int part = 0; part < PARTS; ++part) {
            maps[part] = zeros(static_cast<size_t>(BLOCK * ld));
            if (backward) back[part] = zeros(static_cast<size_t>(BLOCK * ld));
            for (int64_t u = 0; u < width; ++u)
                for (int64_t e = 0; e < BLOCK; ++e) {
                    const int64_t block = (u0 + u) / BLOCK * BLOCK * BLOCK, row = (u0 + u) % BLOCK;
                    maps[part][e * ld + u] = call.maps[part][block + row * BLOCK + e];
                    if (backward) back[part][e * ld + u] = call.maps[part][block + e * BLOCK + row];
                }
        }
    }
};

// Inputs of a group and of the J-1 steps before it, widened: row J-1 is the group's first.
template <typename Element, typename Call>
void fill_window(const Call &call, const Sequence &own, const Group &group, int64_t b, int64_t u0, int64_t width, int64_t ld,
                 float *window) {
    const Element *x = static_cast<const Element *>(call.x) + b * call.x_strides[0] + u0;
    const int64_t tail = call.J - 1;
    for (int64_t r = -tail; r < group.count; ++r) {
        float *to = window + (r + tail) * ld;
        const int64_t step = group.first + r;
        if (r < -group.past) {
            std::memset(to, 0, sizeof(float) * static_cast<size_t>(width));
        } else if (step < 0) {
            std::memcpy(to, call.past + (b * tail + tail + step) * call.U + u0, sizeof(float) * static_cast<size_t>(width));
        } else {
            const Element *from = x + own.at[static_cast<size_t>(step)] * call.x_strides[1];
            int64_t u = 0;
            for (; u + W <= width; u += W) store(to + u, load(from + u));
            if (u < width) store(to + u, load_some(from + u, static_cast<int>(width - u)));
        }
    }
}

template <typename Element>
class Forward {
  public:
    Forward(const xl_project_forward &call, int64_t u0, int64_t width)
        : call(call), u0(u0), width(width), weights(call, u0, width, false),
          window(zeros(static_cast<size_t>((call.J - 1 + GROUP) * weights.ld))) {}

    void run(const Sequence &own, int64_t b) {
        clear(own, b);
        for (const Group &group : own.groups) {
            fill_window<Element>(call, own, group, b, u0, width, weights.ld, window.get());
            Element *rows[1 + PARTS][GROUP];
            for (int r = 0; r < group.count; ++r) {
                const int64_t at = (b * call.T + own.at[static_cast<size_t>(group.first + r)]) * call.U + u0;
                rows[0][r] = static_cast<Element *>(call.c) + at;
                if (call.maps[0] == nullptr) continue;
                for (int part = 0; part < PARTS; ++part) rows[1 + part][r] = static_cast<Element *>(call.out[part]) + at;
            }
            switch (group.count) {
                case 4: channels<4>(rows); break;
                case 3: channels<3>(rows); break;
                case 2: channels<2>(rows); break;
                default: channels<1>(rows); break;
            }
        }
        finish(own, b);
    }

  private:
    const xl_project_forward &call;
    const int64_t u0, width;
    const Weights weights;
    Buffer window;

    template <int COUNT>
    void channels(Element *(*rows)[GROUP]) {
        const int64_t ld = weights.ld, tail = call.J - 1;
        for (int64_t u = 0; u < width; u += W) {
            const int left = static_cast<int>(std::min<int64_t>(width - u, W));
            vf c[COUNT];
            XL_UNROLL for (int r = 0; r < COUNT; ++r) c[r] = load(weights.bias.get() + u);
            for (int64_t j = 0; j <= tail; ++j) {
                const vf w = load(weights.conv.get() + j * ld + u);
                const float *x = window.get() + (tail - j) * ld + u;
                XL_UNROLL for (int r = 0; r < COUNT; ++r) c[r] += w * load(x + r * ld);
            }
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                store_some(rows[0][r] + u, c[r] * vsigmoid(c[r]), left);
                if (call.maps[0] == nullptr) continue;
                const vf seen = load_some(rows[0][r] + u, left);  // as rounded: what a reader of c sees
                store_some(rows[1][r] + u, dot_block(seen, weights.maps[0].get() + u, ld), left);
                store_some(rows[2][r] + u, dot_block(seen, weights.maps[1].get() + u, ld), left);
                const vf x = load(window.get() + (tail + r) * ld + u);
                store_some(rows[3][r] + u, dot_block(x, weights.maps[2].get() + u, ld), left);
            }
        }
    }

    // Where no step exists there are zeros.
    void clear(const Sequence &own, int64_t b) {
        size_t next = 0;
        for (int64_t t = 0; t < call.T; ++t) {
            if (next < own.at.size() && own.at[next] == t) {
                ++next;
                continue;
            }
            const int64_t at = (b * call.T + t) * call.U + u0;
            std::memset(static_cast<Element *>(call.c) + at, 0, sizeof(Element) * static_cast<size_t>(width));
            if (call.maps[0] == nullptr) continue;
            for (void *part : call.out)
                std::memset(static_cast<Element *>(part) + at, 0, sizeof(Element) * static_cast<size_t>(width));
        }
    }

    // The last J-1 inputs, oldest first.
    void finish(const Sequence &own, int64_t b) {
        const int64_t tail = call.J - 1;
        for (int64_t p = 0; p < tail; ++p) {
            const int64_t step = own.count() - tail + p;
            float *to = call.last + (b * tail + p) * call.U + u0;
            if (step < (own.reset ? own.since : -tail)) {
                std::memset(to, 0, sizeof(float) * static_cast<size_t>(width));
            } else if (step < 0) {
                std::memcpy(to, call.past + (b * tail + tail + step) * call.U + u0, sizeof(float) * static_cast<size_t>(width));
            } else {
                const Element *from = static_cast<const Element *>(call.x) + b * call.x_strides[0] + u0 +
                                      own.at[static_cast<size_t>(step)] * call.x_strides[1];
                for (int64_t u = 0; u < width; u += W) {
                    const int left = static_cast<int>(std::min<int64_t>(width - u, W));
                    store_some(to + u, load_some(from + u, left), left);
                }
            }
        }
    }
};

// The sum of all lanes.
inline float total(vf x) {
    float row[W], sum = 0.0f;
    store(row, x);
    for (float value : row) sum += value;
    return sum;
}

// raw[row, gate] for COUNT rows: an own pass, since it adds over all channels.
template <typename Element, int COUNT>
void gates(const xl_project_forward &call, int64_t row) {
    constexpr int AT_ONCE = 4;
    for (int64_t first = 0; first < call.G; first += AT_ONCE) {
        const int many = static_cast<int>(std::min<int64_t>(call.G - first, AT_ONCE));
        vf sums[COUNT][AT_ONCE] = {};
        for (int part = 0; part < PARTS; ++part) {
            const Element *x = static_cast<const Element *>(call.out[part]) + row * call.U;
            const float *w = call.gate_w + first * PARTS * call.U + part * call.U;
            for (int64_t u = 0; u < call.U; u += W) {
                const int left = static_cast<int>(std::min<int64_t>(call.U - u, W));
                vf value[COUNT];
                XL_UNROLL for (int r = 0; r < COUNT; ++r) value[r] = load_some(x + r * call.U + u, left);
                XL_UNROLL for (int g = 0; g < AT_ONCE; ++g) {
                    if (g >= many) break;
                    const vf weight = load_some(w + g * PARTS * call.U + u, left);
                    XL_UNROLL for (int r = 0; r < COUNT; ++r) sums[r][g] += value[r] * weight;
                }
            }
        }
        for (int r = 0; r < COUNT; ++r)
            for (int g = 0; g < many; ++g)
                call.raw[(row + r) * call.G + first + g] = call.gate_b[first + g] + total(sums[r][g]);
    }
}

template <typename Element>
class Backward {
  public:
    Backward(const xl_project_backward &call, int64_t u0, int64_t width)
        : call(call), u0(u0), width(width), weights(call, u0, width, true), ld(weights.ld), tail(call.J - 1),
          window(zeros(static_cast<size_t>((tail + GROUP) * ld))), now(zeros(static_cast<size_t>(GROUP * ld))),
          later(zeros(static_cast<size_t>(call.J * ld))),
          dconv(zeros(static_cast<size_t>((call.J + 1) * ld))), dmaps(zeros(static_cast<size_t>(PARTS * BLOCK * ld))),
          gate_w(zeros(static_cast<size_t>(PARTS * call.G * ld + 1))),
          dgate(zeros(static_cast<size_t>(PARTS * call.G * ld + 1))) {
        for (int64_t g = 0; g < call.G; ++g)
            for (int part = 0; part < PARTS; ++part)
                std::memcpy(gate_w.get() + (g * PARTS + part) * ld, call.gate_w + (g * PARTS + part) * call.U + u0,
                            sizeof(float) * static_cast<size_t>(width));
    }

    void run(const Sequence &own, int64_t b) {
        clear(own, b);
        std::memset(later.get(), 0, sizeof(float) * static_cast<size_t>(tail * ld));
        for (size_t index = own.groups.size(); index-- > 0;) {
            const Group &group = own.groups[index];
            fill_window<Element>(call, own, group, b, u0, width, ld, window.get());
            Rows rows;
            for (int r = 0; r < group.count; ++r) {
                const int64_t step = group.first + r, row = b * call.T + own.at[static_cast<size_t>(step)];
                const int64_t at = row * call.U + u0;
                rows.raw[r] = call.draw + row * call.G;
                rows.c[r] = call.c == nullptr ? nullptr : static_cast<const Element *>(call.c) + at;
                rows.dc[r] = call.dc == nullptr ? nullptr : static_cast<const Element *>(call.dc) + at;
                rows.dx[r] = static_cast<Element *>(call.dx) + at;
                for (int part = 0; part < PARTS; ++part) {
                    const Element *out = static_cast<const Element *>(call.out[part]);
                    const Element *dout = static_cast<const Element *>(call.dout[part]);
                    rows.out[part][r] = out == nullptr ? nullptr : out + at;
                    rows.dout[part][r] = dout == nullptr ? nullptr : dout + at;
                }
                const int64_t p = step - own.count() + tail;  // its place among the last inputs
                const bool kept = call.dlast != nullptr && p >= 0 && !(own.reset && step < own.since);
                rows.dlast[r] = kept ? call.dlast + (b * tail + p) * call.U + u0 : nullptr;
            }
            switch (group.count) {
                case 4: channels<4>(rows); break;
                case 3: channels<3>(rows); break;
                case 2: channels<2>(rows); break;
                default: channels<1>(rows); break;
            }
            for (int64_t i = tail; i-- > 0;) {  // what the steps before this group wait for
                float *to = later.get() + i * ld;
                const float *from = i < group.count ? now.get() + i * ld : later.get() + (i - group.count) * ld;
                if (group.fresh) std::memset(to, 0, sizeof(float) * static_cast<size_t>(ld));
                else std::memcpy(to, from, sizeof(float) * static_cast<size_t>(ld));
            }
        }
        start(own, b);
    }

    void write() {
        for (int64_t u = 0; u < width; ++u) {
            call.db[u0 + u] = dconv[call.J * ld + u];
            for (int64_t j = 0; j < call.J; ++j) call.dw[(u0 + u) * call.J + call.J - 1 - j] = dconv[j * ld + u];
            if (call.maps[0] == nullptr) continue;
            for (int part = 0; part < PARTS; ++part)
                for (int64_t e = 0; e < BLOCK; ++e)
                    call.dmaps[part][(u0 + u) * BLOCK + e] = dmaps[(part * BLOCK + e) * ld + u];
        }
        for (int64_t g = 0; g < call.G; ++g)
            for (int part = 0; part < PARTS; ++part)
                std::memcpy(call.dgate_w + (g * PARTS + part) * call.U + u0, dgate.get() + (g * PARTS + part) * ld,
                            sizeof(float) * static_cast<size_t>(width));
    }

  private:
    struct Rows {
        const float *raw[GROUP], *dlast[GROUP];
        const Element *c[GROUP], *dc[GROUP], *out[PARTS][GROUP], *dout[PARTS][GROUP];
        Element *dx[GROUP];
    };

    const xl_project_backward &call;
    const int64_t u0, width;
    const Weights weights;
    const int64_t ld, tail;
    Buffer window, now, later, dconv, dmaps, gate_w, dgate;

    template <int COUNT>
    void channels(const Rows &rows) {
        for (int64_t u = 0; u < width; u += W) {
            const int left = static_cast<int>(std::min<int64_t>(width - u, W));
            vf c[COUNT], x[COUNT], dc[COUNT], dx[COUNT];
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                x[r] = load(window.get() + (tail + r) * ld + u);
                dc[r] = rows.dc[r] == nullptr ? vf{} : load_some(rows.dc[r] + u, left);
                dx[r] = rows.dlast[r] == nullptr ? vf{} : load_some(rows.dlast[r] + u, left);
            }
            if (call.maps[0] != nullptr) {
                XL_UNROLL for (int r = 0; r < COUNT; ++r) c[r] = load_some(rows.c[r] + u, left);
                for (int part = 0; part < 2; ++part) map<COUNT>(rows, part, u, left, c, dc);
                map<COUNT>(rows, 2, u, left, x, dx);
            }
            convolve<COUNT>(u, dc, dx);
            XL_UNROLL for (int r = 0; r < COUNT; ++r) store_some(rows.dx[r] + u, dx[r], left);
        }
    }

    // Back through one block-diagonal map and the gates that read its result.
    template <int COUNT>
    void map(const Rows &rows, int part, int64_t u, int left, const vf (&in)[COUNT], vf (&din)[COUNT]) {
        vf dy[COUNT], y[COUNT];
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            dy[r] = rows.dout[part][r] == nullptr ? vf{} : load_some(rows.dout[part][r] + u, left);
            y[r] = load_some(rows.out[part][r] + u, left);
        }
        for (int64_t g = 0; g < call.G; ++g) {
            const int64_t at = (g * PARTS + part) * ld + u;
            const vf weight = load(gate_w.get() + at);
            vf sum = load(dgate.get() + at);
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                dy[r] += weight * rows.raw[r][g];
                sum += y[r] * rows.raw[r][g];
            }
            store(dgate.get() + at, sum);
        }
        const float *weight = weights.back[part].get() + u;
        float *sums = dmaps.get() + part * BLOCK * ld + u;
        vf sum[BLOCK];
        XL_UNROLL for (int e = 0; e < BLOCK; ++e) sum[e] = load(sums + e * ld);
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            din[r] += dot_block(dy[r], weight, ld);
            sum[0] += dy[r] * spread<0>(in[r]);
            sum[1] += dy[r] * spread<1>(in[r]);
            sum[2] += dy[r] * spread<2>(in[r]);
            sum[3] += dy[r] * spread<3>(in[r]);
        }
        XL_UNROLL for (int e = 0; e < BLOCK; ++e) store(sums + e * ld, sum[e]);
    }

    // Back through SiLU and convolution: dc in, dx added to.
    template <int COUNT>
    void convolve(int64_t u, const vf (&dc)[COUNT], vf (&dx)[COUNT]) {
        vf d[COUNT];
        XL_UNROLL for (int r = 0; r < COUNT; ++r) d[r] = load(weights.bias.get() + u);
        for (int64_t j = 0; j <= tail; ++j) {
            const vf w = load(weights.conv.get() + j * ld + u);
            const float *x = window.get() + (tail - j) * ld + u;
            XL_UNROLL for (int r = 0; r < COUNT; ++r) d[r] += w * load(x + r * ld);
        }
        vf dbias = load(dconv.get() + call.J * ld + u);
        XL_UNROLL for (int r = 0; r < COUNT; ++r) {
            const vf gate = vsigmoid(d[r]);
            d[r] = dc[r] * (gate + gate * d[r] * (1.0f - gate));
            store(now.get() + r * ld + u, d[r]);
            dbias += d[r];
        }
        store(dconv.get() + call.J * ld + u, dbias);
        for (int64_t j = 0; j <= tail; ++j) {
            const vf w = load(weights.conv.get() + j * ld + u);
            const float *x = window.get() + (tail - j) * ld + u;
            vf dw = load(dconv.get() + j * ld + u);
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                dw += d[r] * load(x + r * ld);
                dx[r] += w * load((r + j < COUNT ? now.get() + (r + j) * ld : later.get() + (r + j - COUNT) * ld) + u);
            }
            store(dconv.get() + j * ld + u, dw);
        }
    }

    void clear(const Sequence &own, int64_t b) {
        if (own.count() == call.T) return;
        Element *dx = static_cast<Element *>(call.dx) + b * call.T * call.U + u0;
        for (int64_t t = 0; t < call.T; ++t) std::memset(dx + t * call.U, 0, sizeof(Element) * static_cast<size_t>(width));
    }

    // The gradient of what came before the call: through the first steps, and where it is still among the last inputs.
    void start(const Sequence &own, int64_t b) {
        for (int64_t p = 0; p < tail; ++p) {
            const int64_t back = tail - p, place = p - own.count();  // `back` steps before the first; among the last inputs
            float *to = call.dpast + (b * tail + p) * call.U + u0;
            const bool still = call.dlast != nullptr && !own.reset && place >= 0;
            const float *kept = still ? call.dlast + (b * tail + place) * call.U + u0 : nullptr;
            for (int64_t u = 0; u < width; ++u) {
                float sum = kept == nullptr ? 0.0f : kept[u];
                for (int64_t j = back; j <= tail; ++j) sum += weights.conv[j * ld + u] * later[(j - back) * ld + u];
                to[u] = sum;
            }
        }
    }
};

// Channels a task takes: whole blocks, and few enough that the sums of a task stay in the nearest caches.
inline int64_t tile(int64_t U, int64_t threads, int64_t most) {
    const int64_t share = (U + threads - 1) / threads;
    return std::max<int64_t>(32, std::min(most, (share + 31) / 32 * 32));
}

template <typename Element>
int forward(const xl_project_forward &call) {
    const int threads = static_cast<int>(call.threads);
    int failed = 0;
    try {
        const auto all = sequences(call.reset, call.mask, call.B, call.T, call.J);
        const int64_t wide = tile(call.U, call.threads, 256), tiles = (call.U + wide - 1) / wide;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : failed)
        {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tiles * call.B; ++task) {
                const int64_t u0 = task % tiles * wide, b = task / tiles;
                try {
                    Forward<Element>(call, u0, std::min(wide, call.U - u0)).run(all[static_cast<size_t>(b)], b);
                } catch (const std::bad_alloc &) {
                    failed = XL_NO_MEMORY;
                }
            }
            const int64_t rows = call.G > 0 ? call.B * call.T : 0;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < rows; first += GROUP) {
                if (rows - first >= GROUP) gates<Element, GROUP>(call, first);
                else
                    for (int64_t row = first; row < rows; ++row) gates<Element, 1>(call, row);
            }
        }
    } catch (const std::bad_alloc &) {
        failed = XL_NO_MEMORY;
    }
    return failed;
}

template <typename Element>
int backward(const xl_project_backward &call) {
    const int threads = static_cast<int>(call.threads);
    int failed = 0;
    try {
        const auto all = sequences(call.reset, call.mask, call.B, call.T, call.J);
        const int64_t wide = tile(call.U, call.threads, 128), tiles = (call.U + wide - 1) / wide;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1) reduction(max : failed)
        for (int64_t task = 0; task < tiles; ++task) {
            const int64_t u0 = task * wide;
            try {
                Backward<Element> own(call, u0, std::min(wide, call.U - u0));
                for (int64_t b = 0; b < call.B; ++b) own.run(all[static_cast<size_t>(b)], b);
                own.write();
            } catch (const std::bad_alloc &) {
                failed = XL_NO_MEMORY;
            }
        }
        for (int64_t g = 0; g < call.G; ++g) {
            double sum = 0.0;
            for (int64_t b = 0; b < call.B; ++b)
                for (int64_t t : all[static_cast<size_t>(b)].at) sum += call.draw[(b * call.T + t) * call.G + g];
            call.dgate_b[g] = static_cast<float>(sum);
        }
    } catch (const std::bad_alloc &) {
        failed = XL_NO_MEMORY;
    }
    return failed;
}

}  // namespace

int project_forward(const xl_project_forward &call) {
    return call.bf16 ? forward<uint16_t>(call) : forward<float>(call);
}

int project_backward(const xl_project_backward &call) {
    return call.bf16 ? backward<uint16_t>(call) : backward<float>(call);
}

}  // namespace XL_ISA
