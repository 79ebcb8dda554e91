// Every native kernel over awkward sizes on buffers of the exact size, for the address and undefined-behaviour sanitizers:
// what is read or written beyond an end, and what is undefined, ends the program. Run by test_sanitizers.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "openxlstm.h"

namespace {

unsigned seed = 1;
float uniform() { return static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f; }

template <typename T>
std::vector<T> numbers(int64_t count) {
    std::vector<T> x(static_cast<size_t>(count));
    for (T &value : x) value = static_cast<T>(uniform());
    return x;
}

template <>
std::vector<uint16_t> numbers<uint16_t>(int64_t count) {  // bf16
    std::vector<uint16_t> x(static_cast<size_t>(count));
    for (uint16_t &value : x) {
        const float number = uniform();
        uint32_t bits;
        __builtin_memcpy(&bits, &number, 4);
        value = static_cast<uint16_t>(bits >> 16);
    }
    return x;
}

std::vector<uint8_t> flags(int64_t count, int in) {
    std::vector<uint8_t> x(static_cast<size_t>(count));
    for (uint8_t &value : x) value = static_cast<int>(std::fabs(uniform()) * 100) < in;
    return x;
}

void expect(int code, const char *what) {
    if (code != XL_OK) {
        std::printf("%s answered %d\n", what, code);
        std::exit(1);
    }
}

template <typename T>
void mlstm(int isa, int64_t T_, int64_t K, int64_t V, int64_t chunk, int64_t gate) {
    const int64_t B = 2, H = 3, chunks = (T_ + chunk - 1) / chunk;
    auto q = numbers<T>(B * T_ * H * K), k = numbers<T>(B * T_ * H * K), v = numbers<T>(B * T_ * H * V);
    auto i = numbers<float>(B * T_ * H), f = numbers<float>(B * T_ * H);
    auto reset = flags(B * T_, 10), mask = flags(B * T_, 80);
    auto C = numbers<float>(B * H * K * V), n = numbers<float>(B * H * K), m = numbers<float>(B * H);
    auto h = numbers<T>(B * T_ * H * V), dq = q, dk = k, dv = v;
    auto C1 = C, n1 = n, m1 = m, dC0 = C, dn0 = n, a = i, di = i, df = i;
    auto states = numbers<float>(B * H * (chunks + 1) * XL_SLOT(K, V)), stabilisers = numbers<float>(B * H * chunks);
    const bool bf16 = sizeof(T) == 2;
    xl_mlstm_forward fw = {
        B, T_, H, K, V, 2, bf16, gate, chunk, {T_ * H * K, H * K, K}, {T_ * H * K, H * K, K}, {T_ * H * V, H * V, V}, 1e-6,
        q.data(), k.data(), v.data(), i.data(), f.data(), reset.data(), mask.data(), C.data(), n.data(), m.data(), h.data(),
        C1.data(), n1.data(), m1.data(), a.data(), states.data(), stabilisers.data()};
    expect(xl_run_mlstm_forward(isa, &fw), "mlstm_forward");
    xl_mlstm_backward bw = {
        B, T_, H, K, V, 2, bf16, gate, chunk, {T_ * H * K, H * K, K}, {T_ * H * K, H * K, K}, {T_ * H * V, H * V, V}, 1e-6,
        h.data(), C1.data(), n1.data(), q.data(), k.data(), v.data(), i.data(), f.data(), reset.data(), mask.data(), a.data(),
        states.data(), stabilisers.data(), dq.data(), dk.data(), dv.data(), di.data(), df.data(), dC0.data(), dn0.data()};
    expect(xl_run_mlstm_backward(isa, &bw), "mlstm_backward");
    xl_mlstm_step step = {
        B, H, K, V, 2, bf16, {H * K, K}, {H * K, K}, {H * V, V}, 1e-6, q.data(), k.data(), v.data(), i.data(), f.data(),
        reset.data(), mask.data(), C.data(), n.data(), m.data(), h.data(), C1.data(), n1.data(), m1.data()};
    expect(xl_run_mlstm_step(isa, &step), "mlstm_step");
}

template <typename T>
void slstm(int isa, int64_t T_, int64_t K) {
    const int64_t B = 7, H = 2;
    auto gates = numbers<T>(B * T_ * 4 * H * K), out = numbers<T>(B * T_ * H * K);
    auto R = numbers<float>(H * K * 4 * K), b = numbers<float>(4 * H * K);
    auto reset = flags(B * T_, 10), mask = flags(B * T_, 80);
    auto h = numbers<float>(B * H * K), c = h, n = h, m = h, h1 = h, c1 = h, n1 = h, m1 = h;
    auto tape = numbers<float>(H * B * T_ * XL_TAPE * K), draw = numbers<float>(B * T_ * 4 * H * K);
    const bool bf16 = sizeof(T) == 2;
    xl_slstm_forward fw = {
        B, T_, H, K, 2, bf16, 0, {T_ * 4 * H * K, 4 * H * K, H * K, K}, gates.data(), R.data(), b.data(), reset.data(),
        mask.data(), h.data(), c.data(), n.data(), m.data(), out.data(), h1.data(), c1.data(), n1.data(), m1.data(), tape.data()};
    expect(xl_run_slstm_forward(isa, &fw), "slstm_forward");
    xl_slstm_backward bw = {
        B, T_, H, K, 2, bf16, out.data(), h.data(), c.data(), n.data(), R.data(), reset.data(), mask.data(), c.data(), n.data(),
        tape.data(), draw.data(), h1.data(), c1.data(), n1.data()};
    expect(xl_run_slstm_backward(isa, &bw), "slstm_backward");
}

template <typename T>
void project(int isa, int64_t T_, int64_t U, int64_t J, int64_t G) {
    const int64_t B = 2;
    auto x = numbers<T>(B * T_ * U), c = x, q = x, k = x, v = x, dx = x;
    auto w = numbers<float>(U * J), b = numbers<float>(U), past = numbers<float>(B * (J - 1) * U), last = past, dpast = past;
    auto wq = numbers<float>(4 * U), wk = wq, wv = wq, gate_w = numbers<float>(G * 3 * U), gate_b = numbers<float>(G);
    auto raw = numbers<float>(B * T_ * G), dw = w, db = b, dwq = wq, dwk = wq, dwv = wq, dgate_w = gate_w, dgate_b = gate_b;
    auto reset = flags(B * T_, 10), mask = flags(B * T_, 80);
    const bool bf16 = sizeof(T) == 2, maps = U % 4 == 0;
    xl_project_forward fw = {
        B, T_, U, J, maps ? G : 0, 2, bf16, {T_ * U, U}, x.data(), w.data(), b.data(), {}, gate_w.data(), gate_b.data(),
        past.data(), reset.data(), mask.data(), c.data(), {q.data(), k.data(), v.data()}, raw.data(), last.data()};
    if (maps) fw.maps[0] = wq.data(), fw.maps[1] = wk.data(), fw.maps[2] = wv.data();
    expect(xl_run_project_forward(isa, &fw), "project_forward");
    xl_project_backward bw = {
        B, T_, U, J, maps ? G : 0, 2, bf16, {T_ * U, U}, x.data(), w.data(), b.data(), {}, gate_w.data(), past.data(),
        reset.data(), mask.data(), c.data(), {q.data(), k.data(), v.data()}, c.data(), {q.data(), nullptr, v.data()},
        raw.data(), last.data(), dx.data(), dw.data(), db.data(), {dwq.data(), dwk.data(), dwv.data()}, dgate_w.data(),
        dgate_b.data(), dpast.data()};
    if (maps) bw.maps[0] = wq.data(), bw.maps[1] = wk.data(), bw.maps[2] = wv.data();
    expect(xl_run_project_backward(isa, &bw), "project_backward");
}

template <typename T>
void norms(int isa, int64_t rows, int64_t H, int64_t V) {
    const int64_t U = H * V;
    auto h = numbers<T>(rows * U), c = h, z = h, y = h, dh = h, dc = h, dz = h;
    auto weight = numbers<float>(U), skip = weight, dweight = weight, dskip = weight, wide = numbers<float>(rows * U);
    const bool bf16 = sizeof(T) == 2;
    xl_gate_forward fw = {rows, H, V, 2, bf16, U, 1e-5, h.data(), c.data(), z.data(), weight.data(), skip.data(), y.data()};
    expect(xl_run_gate_forward(isa, &fw), "gate_forward");
    xl_gate_backward bw = {
        rows, H, V, 2, bf16, U, 1e-5, y.data(), h.data(), c.data(), z.data(), weight.data(), skip.data(), dh.data(), dc.data(),
        dz.data(), dweight.data(), dskip.data()};
    expect(xl_run_gate_backward(isa, &bw), "gate_backward");
    xl_norm_forward down = {rows, U, 2, 0, bf16, 1e-5, wide.data(), weight.data(), y.data()};
    expect(xl_run_norm_forward(isa, &down), "norm_forward");
    xl_norm_forward up = {rows, U, 2, bf16, 0, 1e-5, h.data(), weight.data(), wide.data()};
    expect(xl_run_norm_forward(isa, &up), "norm_forward");
    xl_norm_backward back = {rows, U, 2, bf16, 0, 1e-5, wide.data(), h.data(), weight.data(), dh.data(), dweight.data()};
    expect(xl_run_norm_backward(isa, &back), "norm_backward");
}

void linear(int isa, int64_t rows, int64_t width, int64_t out, int64_t format, int64_t row_bytes) {
    std::vector<uint8_t> weight(static_cast<size_t>(out * row_bytes), 0x21);
    auto bias = numbers<float>(out), memory = numbers<float>(rows * (width + out)), own = numbers<float>(2 * rows * width);
    xl_operation op = {};
    op.kind = XL_LINEAR, op.barrier = XL_EVERYONE, op.width = width, op.out = out, op.format = format, op.grain = 16;
    op.from_ld = width, op.to = rows * width, op.to_ld = out, op.weight = weight.data(), op.bias = bias.data();
    xl_operation stolen = op;
    stolen.steal = 1;
    xl_operation embed = {};
    embed.kind = XL_EMBED, embed.barrier = XL_EVERYONE, embed.width = width, embed.format = format, embed.to_ld = width;
    embed.weight = weight.data();
    std::vector<xl_operation> operations = {embed, op, stolen};
    std::vector<int64_t> tokens(static_cast<size_t>(rows), out - 1);
    xl_decode call = {rows, 2, 3, out, 1, rows * width, 0, operations.data(), tokens.data(), memory.data(), own.data()};
    expect(xl_run_decode(isa, &call), "decode");
    tokens[0] = out;
    if (xl_run_decode(isa, &call) != XL_BAD_TOKEN) expect(XL_BAD_TOKEN, "decode, a token outside the vocabulary");
}

// Rows of blocks, packed and multiplied: only the set that multiplies bytes has the product.
void packed(int isa, int64_t rows, int64_t blocks, int64_t out, int64_t format, int64_t block_bytes) {
    const int64_t bytes = blocks * block_bytes, groups = (out + 15) / 16, width = 32 * blocks;
    std::vector<uint8_t> weight(static_cast<size_t>(out * bytes), 0x21), side(static_cast<size_t>(16 * groups * bytes));
    xl_packing packing = {out, bytes, format, 2, weight.data(), side.data()};
    expect(xl_run_packing(isa, &packing), "packing");
    if (isa < 3) return;
    auto x = numbers<float>(rows * width), y = numbers<float>(rows * out), scratch = numbers<float>(2 * rows * width);
    const int64_t side_by_side = format == XL_Q8_0 ? XL_Q8_0_PACKED : XL_Q4_0_PACKED;
    xl_product call = {
        rows, width, out, side_by_side, 2, width, out, rows * width, x.data(), side.data(), y.data(), scratch.data()};
    expect(xl_run_product(isa, &call), "product");
}

}  // namespace

int main() {
    for (int isa = 0; isa <= xl_best_isa(); ++isa) {
        std::printf("%d ", isa);
        for (int64_t T : {1, 2, 17, 70})
            for (int64_t K : {1, 5, 16, 33}) {
                mlstm<float>(isa, T, K, K + 2, 16, T % 3);
                mlstm<uint16_t>(isa, T, K + 1, K, 64, T % 3);
                slstm<float>(isa, T, K);
                slstm<uint16_t>(isa, T, K);
            }
        for (int64_t T : {1, 2, 5, 23})
            for (int64_t U : {1, 4, 20, 68, 300})
                for (int64_t J : {1, 2, 4}) {
                    project<float>(isa, T, U, J, 5);
                    project<uint16_t>(isa, T, U, J, 8);
                    norms<float>(isa, T, J, U);
                    norms<uint16_t>(isa, T, J, U);
                }
        for (int64_t rows : {1, 2, 3, 4, 7})
            for (int64_t out : {1, 4, 5, 9}) {
                for (int64_t width : {3, 32, 45, 96}) {
                    linear(isa, rows, width, out, XL_F32, 4 * width);
                    linear(isa, rows, width, out, XL_BF16, 2 * width);
                }
                for (int64_t blocks : {1, 3, 8, 11}) {
                    linear(isa, rows, 32 * blocks, out, XL_Q8_0, 34 * blocks);
                    linear(isa, rows, 32 * blocks, out, XL_Q4_0, 18 * blocks);
                    linear(isa, rows, 32 * blocks, out, XL_Q4_1, 20 * blocks);
                    packed(isa, rows, blocks, 4 * out, XL_Q8_0, 34);
                    packed(isa, rows, blocks, 4 * out, XL_Q4_0, 18);
                }
            }
        for (int64_t blocks : {3, 9}) {  // a prompt
            packed(isa, 141, blocks, 75, XL_Q8_0, 34);
            packed(isa, 300, blocks, 48, XL_Q4_0, 18);
        }
        for (const char *name : {"exp", "log1p", "tanh", "sigmoid"}) {
            auto x = numbers<float>(37), y = x;
            for (float &value : x) value = std::fabs(value);
            expect(xl_run_function(isa, name, x.data(), y.data(), 37), name);
        }
    }
    std::puts("clean");
    return 0;
}
