// The sLSTM over a whole sequence, forward and backward (arXiv:2405.04517, Sec. 2.2; cells/slstm.py is the definition).
//
// Memory mixes inside a head only, so a task is one head of some rows of the batch with the whole loop over time inside:
// no barriers. R is packed once per task into panels of W columns that carry the four gates of the same units; a panel is
// multiplied for up to ROWS rows at a time, and the gates are computed while their pre-activations are in registers.
// The backward sweep gives the gradients of the pre-activations; dR is one matrix product of the caller's afterwards.
//
// Arrays of a task are padded to P = K rounded up to W; what stands in the padding is finite and meets zeros only.

#include <initializer_list>

#include "memory.h"
#include "openxlstm.h"
#include "vec.h"

namespace XL_ISA {
namespace {

enum Tape { WRITE, KEEP, OF_F, Z, O, C, N, H_IN };  // what the backward sweep reads; H_IN is h as it entered the step

constexpr int PAIR = W == 16 ? 2 : 1;  // panels at a time for one or two rows; the narrower sets lack the registers
constexpr int WIDE = 4;                // vectors of a panel of the backward sweep

struct Block {  // one task: a head, and rows first .. first + count of the batch
    int64_t head, first, count;
};

int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// How many parts the batch is cut into: as few as keep all threads busy, since every part streams R for itself.
int64_t parts(int64_t B, int64_t H, int64_t threads) {
    int64_t wanted = threads / gcd(H, threads);
    return wanted < B ? wanted : B;
}

Block block(int64_t task, int64_t B, int64_t cuts) {
    int64_t part = task % cuts, first = B * part / cuts;
    return {task / cuts, first, B * (part + 1) / cuts - first};
}

void load_state(float *rows, const float *from, const Block &own, int64_t H, int64_t K, int64_t P) {
    for (int64_t r = 0; r < own.count; ++r) {
        const float *source = from + ((own.first + r) * H + own.head) * K;
        std::memcpy(rows + r * P, source, sizeof(float) * static_cast<size_t>(K));
    }
}

void store_state(const float *rows, float *to, const Block &own, int64_t H, int64_t K, int64_t P) {
    for (int64_t r = 0; r < own.count; ++r) {
        float *target = to + ((own.first + r) * H + own.head) * K;
        std::memcpy(target, rows + r * P, sizeof(float) * static_cast<size_t>(K));
    }
}

template <typename Element>
class Forward {
  public:
    Forward(const xl_slstm_forward &call, const Block &own)
        : call(call), own(own), K(call.K), P((call.K + W - 1) / W * W), packed(zeros(static_cast<size_t>(4 * K * P))),
          bias(zeros(static_cast<size_t>(4 * P))), states(zeros(static_cast<size_t>(5 * own.count * P))) {
        int64_t size = own.count * P;
        h = states.get();
        h_next = h + size;
        c = h + 2 * size;
        n = h + 3 * size;
        m = h + 4 * size;
        pack();
        load_state(h, call.h0, own, call.H, K, P);
        load_state(c, call.c0, own, call.H, K, P);
        load_state(n, call.n0, own, call.H, K, P);
        load_state(m, call.m0, own, call.H, K, P);
    }

    void run() {
        for (int64_t t = 0; t < call.T; ++t) {
            enter(t);
            const int64_t r = own.count / ROWS * ROWS;
            for (int64_t e = 0; e < P; e += W)  // a panel stays in the nearest cache while all rows pass
                for (int64_t row = 0; row < r; row += ROWS) rows<ROWS, 1>(t, e, row);
            switch (own.count - r) {
                case 5: panels<5, 1>(t, r); break;
                case 4: panels<4, 1>(t, r); break;
                case 3: panels<3, 1>(t, r); break;
                case 2: panels<2, PAIR>(t, r); break;
                case 1: panels<1, PAIR>(t, r); break;
                default: break;
            }
            float *old = h;
            h = h_next;
            h_next = old;
        }
        store_state(h, call.h1, own, call.H, K, P);
        store_state(c, call.c1, own, call.H, K, P);
        store_state(n, call.n1, own, call.H, K, P);
        store_state(m, call.m1, own, call.H, K, P);
    }

  private:
    const xl_slstm_forward &call;
    const Block &own;
    const int64_t K, P;
    Buffer packed, bias, states;
    float *h, *h_next, *c, *n, *m;

    bool flag(const uint8_t *flags, int64_t row, int64_t t) const { return flags[(own.first + row) * call.T + t] != 0; }

    float *tape(int64_t row, int64_t t, Tape what) const {
        return call.tape + (((own.head * call.B + own.first + row) * call.T + t) * XL_TAPE + what) * K;
    }

    // [P / W panels][K inputs][4 gates][W units]
    void pack() {
        const float *R = call.R + own.head * K * 4 * K;
        for (int64_t e = 0; e < K; ++e)
            for (int64_t d = 0; d < K; ++d)
                for (int64_t g = 0; g < 4; ++g)
                    packed[static_cast<size_t>(((e / W * K + d) * 4 + g) * W + e % W)] = R[(d * 4 + g) * K + e];
        for (int64_t g = 0; g < 4; ++g)
            std::memcpy(bias.get() + g * P, call.b + (g * call.H + own.head) * K, sizeof(float) * static_cast<size_t>(K));
    }

    // A reset empties the row before the step, a masked one too.
    void enter(int64_t t) {
        for (int64_t r = 0; r < own.count; ++r) {
            if (call.reset != nullptr && flag(call.reset, r, t))
                for (float *part : {h, c, n, m}) std::memset(part + r * P, 0, sizeof(float) * static_cast<size_t>(P));
            if (call.tape != nullptr)
                std::memcpy(tape(r, t, H_IN), h + r * P, sizeof(float) * static_cast<size_t>(K));
        }
    }

    // Every panel of the rows that are left over. With few rows, PANELS at a time: a single one's sums would wait for each other.
    // How rows and panels are grouped never changes the order of a sum, so a row's numbers do not depend on its company.
    template <int COUNT, int PANELS>
    void panels(int64_t t, int64_t row) {
        int64_t e = 0;
        for (; e + PANELS * W <= P; e += PANELS * W) rows<COUNT, PANELS>(t, e, row);
        for (; e < P; e += W) rows<COUNT, 1>(t, e, row);
    }

    template <int COUNT, int PANELS>
    void rows(int64_t t, int64_t e, int64_t first) {
        const int64_t *stride = call.gate_strides;
        vf sums[PANELS][COUNT][4];
        XL_UNROLL for (int p = 0; p < PANELS; ++p)
            XL_UNROLL for (int r = 0; r < COUNT; ++r) {
                const Element *gates = static_cast<const Element *>(call.gates) + (own.first + first + r) * stride[0] +
                                       t * stride[1] + own.head * stride[3] + e + p * W;
                XL_UNROLL for (int g = 0; g < 4; ++g)
                    sums[p][r][g] = load_some(gates + g * stride[2], lanes(e + p * W)) + load(&bias[g * P + e + p * W]);
            }
        const float *panel = packed.get() + e * K * 4, *memory = h + first * P;
        for (int64_t d = 0; d < K; ++d)
            XL_UNROLL for (int p = 0; p < PANELS; ++p)
                XL_UNROLL for (int g = 0; g < 4; ++g) {
                    const vf weight = load(panel + ((p * K + d) * 4 + g) * W);
                    XL_UNROLL for (int r = 0; r < COUNT; ++r) sums[p][r][g] += memory[r * P + d] * weight;
                }
        XL_UNROLL for (int p = 0; p < PANELS; ++p)
            XL_UNROLL for (int r = 0; r < COUNT; ++r) cell(t, e + p * W, first + r, lanes(e + p * W), sums[p][r]);
    }

    int lanes(int64_t e) const { return static_cast<int>(K - e < W ? K - e : W); }

    void cell(int64_t t, int64_t e, int64_t row, int left, const vf *raw) {
        const int64_t at = row * P + e;
        Element *out = static_cast<Element *>(call.out) + (((own.first + row) * call.T + t) * call.H + own.head) * K + e;
        if (call.mask != nullptr && !flag(call.mask, row, t)) {  // the step does not exist
            store(h_next + at, load(h + at));
            store_some(out, vf{}, left);
            if (call.tape != nullptr) {
                store_some(tape(row, t, C) + e, load(c + at), left);
                store_some(tape(row, t, N) + e, load(n + at), left);
            }
            return;
        }
        const vf i = raw[0], f = raw[1], small = vexp(-absolute(f));  // e^-|f|: one exponential for both of f's uses
        const vf log_f = call.exp_forget ? f : at_most(f, 0.0f) - vlog1p(small);
        const vf l = log_f + load(m + at), n_old = load(n + at);
        const vi empty = n_old == 0.0f;
        vf m_new = l > i ? l : i;
        m_new = empty ? i : m_new;
        const vf write = vexp(at_most(i - m_new, 0.0f));
        const vf keep = empty ? vf{} : vexp(at_most(l - m_new, 0.0f));
        const vf z = vtanh(raw[2]), o = vsigmoid(raw[3]);
        const vf c_new = keep * load(c + at) + write * z, n_new = keep * n_old + write;
        const vf h_new = o * c_new / n_new;
        store(h_next + at, h_new);
        store(c + at, c_new);
        store(n + at, n_new);
        store(m + at, m_new);
        store_some(out, h_new, left);
        if (call.tape == nullptr) return;
        const vf not_f = (f > 0.0f ? small : all(1.0f)) / (1.0f + small);  // sigmoid(-f)
        store_some(tape(row, t, WRITE) + e, write, left);
        store_some(tape(row, t, KEEP) + e, keep, left);
        store_some(tape(row, t, OF_F) + e, call.exp_forget ? keep : keep * not_f, left);
        store_some(tape(row, t, Z) + e, z, left);
        store_some(tape(row, t, O) + e, o, left);
        store_some(tape(row, t, C) + e, c_new, left);
        store_some(tape(row, t, N) + e, n_new, left);
    }
};

// Backward, t = T .. 1, m held constant, GC and GN the gradients of c_t and n_t:
//
//     dh = dout + GH;  do = dh (c/n) o (1 - o);  GC += dh o/n;  GN -= dh h/n
//     di = I (GC z + GN);  dz = GC I (1 - z^2);  df = F (GC c_before + GN n_before) sigmoid(-f)
//     GH[d] = sum_ge R[d,g,e] (di, df, dz, do)[g,e];  GC <- F GC;  GN <- F GN
template <typename Element>
class Backward {
  public:
    Backward(const xl_slstm_backward &call, const Block &own)
        : call(call), own(own), K(call.K), P((call.K + W - 1) / W * W), packed(zeros(static_cast<size_t>(4 * K * P))),
          rows_(zeros(static_cast<size_t>(8 * own.count * P))) {
        int64_t size = own.count * P;
        GH = rows_.get();
        GH_next = GH + size;
        GC = GH + 2 * size;
        GN = GH + 3 * size;
        draw = GH + 4 * size;  // [count, 4, P]
        pack();
        if (call.dh != nullptr) load_state(GH, call.dh, own, call.H, K, P);
        if (call.dc != nullptr) load_state(GC, call.dc, own, call.H, K, P);
        if (call.dn != nullptr) load_state(GN, call.dn, own, call.H, K, P);
    }

    void run() {
        for (int64_t t = call.T - 1; t >= 0; --t) {
            for (int64_t r = 0; r < own.count; ++r) gates(t, r);
            mix();
            for (int64_t r = 0; r < own.count; ++r) {
                const size_t bytes = sizeof(float) * static_cast<size_t>(P);
                if (call.mask != nullptr && !flag(call.mask, r, t))  // what reached the step goes on to the one before
                    std::memcpy(GH_next + r * P, GH + r * P, bytes);
                if (call.reset != nullptr && flag(call.reset, r, t))  // what came before was emptied
                    for (float *part : {GH_next, GC, GN}) std::memset(part + r * P, 0, bytes);
            }
            float *old = GH;
            GH = GH_next;
            GH_next = old;
        }
        store_state(GH, call.dh0, own, call.H, K, P);
        store_state(GC, call.dc0, own, call.H, K, P);
        store_state(GN, call.dn0, own, call.H, K, P);
    }

  private:
    const xl_slstm_backward &call;
    const Block &own;
    const int64_t K, P;
    Buffer packed, rows_;
    float *GH, *GH_next, *GC, *GN, *draw;

    bool flag(const uint8_t *flags, int64_t row, int64_t t) const { return flags[(own.first + row) * call.T + t] != 0; }

    const float *tape(int64_t row, int64_t t, Tape what) const {
        return call.tape + (((own.head * call.B + own.first + row) * call.T + t) * XL_TAPE + what) * K;
    }

    // R transposed, in panels of up to WIDE W inputs: [panel][4 K gate units][lanes of the panel]
    void pack() {
        const float *R = call.R + own.head * K * 4 * K;
        for (int64_t first = 0; first < P; first += WIDE * W) {
            const int64_t lanes = P - first < WIDE * W ? P - first : WIDE * W;
            float *panel = packed.get() + first * 4 * K;
            for (int64_t d = first; d < first + lanes && d < K; ++d)
                for (int64_t ge = 0; ge < 4 * K; ++ge) panel[ge * lanes + d - first] = R[d * 4 * K + ge];
        }
    }

    void gates(int64_t t, int64_t row) {
        float *out = call.draw + (((own.first + row) * call.T + t) * 4 * call.H + own.head) * K;
        const int64_t gate = call.H * K;
        if (call.mask != nullptr && !flag(call.mask, row, t)) {
            for (int64_t g = 0; g < 4; ++g) std::memset(out + g * gate, 0, sizeof(float) * static_cast<size_t>(K));
            std::memset(draw + row * 4 * P, 0, sizeof(float) * static_cast<size_t>(4 * P));
            return;
        }
        const bool fresh = call.reset != nullptr && flag(call.reset, row, t);
        const int64_t start = ((own.first + row) * call.H + own.head) * K;
        const float *c_before = t > 0 ? tape(row, t - 1, C) : call.c0 + start;
        const float *n_before = t > 0 ? tape(row, t - 1, N) : call.n0 + start;
        const int64_t shown = (((own.first + row) * call.T + t) * call.H + own.head) * K;
        for (int64_t e = 0; e < P; e += W) {
            const int left = static_cast<int>(K - e < W ? K - e : W);
            const int64_t at = row * P + e;
            vf dh = load(GH + at);
            if (call.dout != nullptr) dh += load_some(static_cast<const Element *>(call.dout) + shown + e, left);
            const vf o = load_some(tape(row, t, O) + e, left), z = load_some(tape(row, t, Z) + e, left);
            const vf write = load_some(tape(row, t, WRITE) + e, left), keep = load_some(tape(row, t, KEEP) + e, left);
            vf n = load_some(tape(row, t, N) + e, left);
            if (left < W) n = n == 0.0f ? all(1.0f) : n;  // the padding
            const vf ratio = load_some(tape(row, t, C) + e, left) / n, share = dh * o / n;
            const vf gc = load(GC + at) + share, gn = load(GN + at) - share * ratio;
            const vf d_o = dh * ratio * o * (1.0f - o);
            const vf d_i = write * (gc * z + gn), d_z = gc * write * (1.0f - z * z);
            vf d_f = {};
            if (!fresh)
                d_f = load_some(tape(row, t, OF_F) + e, left) *
                      (gc * load_some(c_before + e, left) + gn * load_some(n_before + e, left));
            store(GC + at, gc * keep);
            store(GN + at, gn * keep);
            const vf all_four[4] = {d_i, d_f, d_z, d_o};
            for (int64_t g = 0; g < 4; ++g) {
                store(draw + (row * 4 + g) * P + e, all_four[g]);
                store_some(out + g * gate + e, all_four[g], left);
            }
        }
    }

    void mix() {
        for (int64_t first = 0; first < P; first += WIDE * W) {
            switch ((P - first) / W) {
                case 1: panel<1>(first); break;
                case 2: panel<2>(first); break;
                case 3: panel<3>(first); break;
                default: panel<4>(first); break;
            }
        }
    }

    template <int VECTORS>
    void panel(int64_t first) {
        int64_t r = 0;
        for (; r + ROWS <= own.count; r += ROWS) rows<VECTORS, ROWS>(first, r);
        switch (own.count - r) {
            case 5: rows<VECTORS, 5>(first, r); break;
            case 4: rows<VECTORS, 4>(first, r); break;
            case 3: rows<VECTORS, 3>(first, r); break;
            case 2: rows<VECTORS, 2>(first, r); break;
            case 1: rows<VECTORS, 1>(first, r); break;
            default: break;
        }
    }

    template <int VECTORS, int COUNT>
    void rows(int64_t first, int64_t row) {
        vf sums[COUNT][VECTORS] = {};
        const float *weights = packed.get() + first * 4 * K;
        for (int64_t g = 0; g < 4; ++g) {
            const float *gradient = draw + (row * 4 + g) * P;
            for (int64_t e = 0; e < K; ++e, weights += VECTORS * W)
                XL_UNROLL for (int q = 0; q < VECTORS; ++q) {
                    const vf weight = load(weights + q * W);
                    XL_UNROLL for (int r = 0; r < COUNT; ++r) sums[r][q] += gradient[r * 4 * P + e] * weight;
                }
        }
        XL_UNROLL for (int r = 0; r < COUNT; ++r)
            XL_UNROLL for (int q = 0; q < VECTORS; ++q) store(GH_next + (row + r) * P + first + q * W, sums[r][q]);
    }
};

// One parallel region per call, tasks handed out one by one. An exception must not leave it, so it becomes a code.
template <typename Sweep, typename Call>
int sweep(const Call &call) {
    if (call.B == 0) return XL_OK;
    const int64_t cuts = parts(call.B, call.H, call.threads), tasks = call.H * cuts;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(call.threads)) reduction(max : failed)
    for (int64_t task = 0; task < tasks; ++task) {
        const Block own = block(task, call.B, cuts);
        try {
            Sweep(call, own).run();
        } catch (const std::bad_alloc &) {
            failed = XL_NO_MEMORY;
        }
    }
    return failed;
}

}  // namespace

int slstm_forward(const xl_slstm_forward &call) {
    ask_for_large_pages(call.tape, sizeof(float) * static_cast<size_t>(call.H * call.B * call.T * XL_TAPE * call.K));
    return call.bf16 ? sweep<Forward<uint16_t>>(call) : sweep<Forward<float>>(call);
}

int slstm_backward(const xl_slstm_backward &call) {
    ask_for_large_pages(call.draw, sizeof(float) * static_cast<size_t>(call.B * call.T * 4 * call.H * call.K));
    return call.bf16 ? sweep<Backward<uint16_t>>(call) : sweep<Backward<float>>(call);
}

int function(const char *name, const float *x, float *y, int64_t count) {
    for (int64_t k = 0; k < count; k += W) {
        const int left = static_cast<int>(count - k < W ? count - k : W);
        vf v = load_some(x + k, left);
        if (std::strcmp(name, "exp") == 0) v = vexp(v);
        else if (std::strcmp(name, "log1p") == 0) v = vlog1p(v);
        else if (std::strcmp(name, "tanh") == 0) v = vtanh(v);
        else v = vsigmoid(v);
        store_some(y + k, v, left);
    }
    return XL_OK;
}

}  // namespace XL_ISA
