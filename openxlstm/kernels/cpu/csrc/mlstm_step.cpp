// One step of the mLSTM without gradients (arXiv:2405.04517, Sec. 2.3; cells/mlstm.py is the definition): the memory is
// read once and written once, and the query reads it on the way.
//
// A task is one head of one sequence. Exponential input gate, sigmoid forget gate.

#include <cmath>

#include "openxlstm.h"
#include "vec.h"

namespace XL_ISA {
namespace {

constexpr int BLOCK = 4;  // vectors of values that pass down the memory together: v and h stay in registers

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bf16(x); }

template <typename Element>
class Step {
  public:
    Step(const xl_mlstm_step &call, int64_t b, int64_t head) : call(call), K(call.K), V(call.V) {
        const int64_t at = b * call.H + head;
        q = row(call.q, call.q_strides, b, head);
        k = row(call.k, call.k_strides, b, head);
        v = row(call.v, call.v_strides, b, head);
        fresh = call.reset != nullptr && call.reset[b] != 0;
        exists = call.mask == nullptr || call.mask[b] != 0;
        C = call.C + at * K * V, C1 = call.C1 + at * K * V;
        n = call.n + at * K, n1 = call.n1 + at * K;
        m = fresh ? 0.0f : call.m[at];
        m1 = call.m1 + at;
        i = call.i[at], f = call.f[at];
        h = static_cast<Element *>(call.h) + at * V;
    }

    void run() {
        if (!exists) {
            pause();
            return;
        }
        const float log_f = std::fmin(f, 0.0f) - std::log1p(std::exp(-std::fabs(f)));
        const float decayed = (f != f ? f : log_f) + m;  // fmin would hide a NaN
        *m1 = decayed > i || decayed != decayed ? decayed : i;
        const float write = std::exp(i - *m1), keep = std::exp(decayed - *m1);
        const float scale = 1.0f / std::sqrt(static_cast<float>(K));
        float a = 0.0f;
        for (int64_t x = 0; x < K; ++x) {
            n1[x] = (fresh ? 0.0f : keep * n[x]) + write * widen(k[x]);
            a += widen(q[x]) * scale * n1[x];
        }
        const float floor = std::exp(std::fmin(std::fmax(-*m1, -80.0f), 80.0f)), size = std::fabs(a);
        const float denominator = (size > floor || a != a ? size : floor) + static_cast<float>(call.eps);
        int64_t first = 0;
        for (; first + BLOCK * W <= V; first += BLOCK * W) values<BLOCK>(first, keep, write, scale, denominator);
        for (; first < V; first += W) values<1>(first, keep, write, scale, denominator);
    }

  private:
    const xl_mlstm_step &call;
    const int64_t K, V;
    const Element *q, *k, *v;
    const float *C, *n;
    float *C1, *n1, *m1, m, i, f;
    Element *h;
    bool fresh, exists;

    static const Element *row(const void *base, const int64_t *strides, int64_t b, int64_t head) {
        return static_cast<const Element *>(base) + b * strides[0] + head * strides[1];
    }

    template <int VECTORS>
    void values(int64_t first, float keep, float write, float scale, float denominator) {
        const int left = static_cast<int>(V - first < W ? V - first : W);  // of the last vector, which stands alone
        vf value[VECTORS], sum[VECTORS] = {};
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) value[s] = load_some(v + first + s * W, left) * write;
        for (int64_t x = 0; x < K; ++x) {
            const float key = widen(k[x]), query = widen(q[x]) * scale;
            XL_UNROLL for (int s = 0; s < VECTORS; ++s) {
                const int64_t at = x * V + first + s * W;
                const vf old = fresh ? vf{} : load_some(C + at, left) * keep;
                const vf now = old + value[s] * key;
                sum[s] += now * query;
                store_some(C1 + at, now, left);
            }
        }
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) store_some(h + first + s * W, sum[s] / denominator, left);
    }

    // The step does not exist: what was remembered goes on, emptied if a reset stands here.
    void pause() {
        for (int64_t x = 0; x < K * V; ++x) C1[x] = fresh ? 0.0f : C[x];
        for (int64_t x = 0; x < K; ++x) n1[x] = fresh ? 0.0f : n[x];
        *m1 = m;
        for (int64_t y = 0; y < V; ++y) h[y] = Element{};
    }
};

template <typename Element>
int steps(const xl_mlstm_step &call) {
    const int64_t tasks = call.B * call.H, work = tasks * call.K * call.V;
    const int threads = work < (1 << 16) ? 1 : static_cast<int>(call.threads);  // below, a region costs more than it saves
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) Step<Element>(call, task / call.H, task % call.H).run();
    return XL_OK;
}

}  // namespace

int mlstm_step(const xl_mlstm_step &call) {
    return call.bf16 ? steps<uint16_t>(call) : steps<float>(call);
}

}  // namespace XL_ISA
