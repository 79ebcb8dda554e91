// The mLSTM over a sequence, backward; the forward sweep and its letters are in mlstm_forward.h.
//
// A task is one head of one sequence, from the last chunk to the first. GC and Gn are the gradients of the state behind a
// chunk, u_j = dh_j / d_j, and the stabiliser is a constant. With P_jl = s w_jl (q_j . k_l), which is S:
//     e_j   = u_j . (d_j h_j) = sum_l P_jl (u_j . v_l) + s g_j q_j . (C u_j)
//     da_j  = -sign(a_j) e_j / d_j, 0 where the floor of the denominator acts
//     dP_jl = s w_jl (u_j . v_l + da_j)
//     dq_j  = sum_l dP_jl k_l + s g_j (C u_j + da_j n)         GC <- decay GC + s sum_j g_j q_j u_j^T
//     dk_l  = sum_j dP_jl q_j + write_l (GC v_l + Gn)          Gn <- decay Gn + s sum_j g_j da_j q_j
//     dv_l  = sum_j P_jl u_j + write_l GC^T k_l
// and for the gates, with p_l = k_l . dk_l: the gradient of log_i_l is p_l; that of log_f_t is the sum of q_j . dq_j - p_j
// over the rows j >= t of its document in the chunk, and <GC, C'> + Gn . n' if the document goes on behind the chunk. The
// sum begins anew in every chunk: one over the whole sequence would lose precision.
#pragma once

#include "mlstm_chunk.h"

namespace XL_ISA {

// The tasks of one thread; how a chunk is computed is left to who derives. Rows of GC are ldV apart, those of C
// ldC.
template <typename Element>
class BackwardSweep {
  public:
    BackwardSweep(const xl_mlstm_backward &call, int64_t ldV)
        : call(call), K(call.K), V(call.V), L(call.chunk), ldV(ldV), ldC(XL_PITCH(V)), chunks((call.T + L - 1) / L),
          scale(1.0f / std::sqrt(static_cast<float>(K))), normalised(call.input_gate != 1) {
        gates.reserve(arena, L);
        arena.reserve(GC, XL_ROWS(K) * ldV), arena.reserve(n, XL_ROWS(K)), arena.reserve(Gn, XL_ROWS(K));
    }

    void run(int64_t batch, int64_t of) {
        head = of, at = batch * call.H + head, row = batch * call.T;
        q = static_cast<const Element *>(call.q) + batch * call.q_strides[0] + head * call.q_strides[2];
        k = static_cast<const Element *>(call.k) + batch * call.k_strides[0] + head * call.k_strides[2];
        v = static_cast<const Element *>(call.v) + batch * call.v_strides[0] + head * call.v_strides[2];
        const int64_t KV = K * V;
        arrives = call.dC != nullptr || call.dn != nullptr;  // a gradient from behind
        std::memset(GC, 0, sizeof(float) * static_cast<size_t>(XL_ROWS(K) * ldV));
        std::memset(Gn, 0, sizeof(float) * static_cast<size_t>(XL_ROWS(K)));
        if (call.dC != nullptr)
            for (int64_t x = 0; x < K; ++x)
                std::memcpy(GC + x * ldV, call.dC + at * KV + x * V, sizeof(float) * static_cast<size_t>(V));
        if (call.dn != nullptr && normalised)  // n is a constant without a normaliser
            std::memcpy(Gn, call.dn + at * K, sizeof(float) * static_cast<size_t>(K));
        for (int64_t index = chunks - 1; index >= 0; --index) {
            const int64_t t = index * L, l = call.T - t < L ? call.T - t : L, gate_at = (row + t) * call.H + head;
            gates.compute(
                l, call.input_gate, call.i + gate_at, call.f + gate_at, call.H,
                call.reset == nullptr ? nullptr : call.reset + row + t,
                call.mask == nullptr ? nullptr : call.mask + row + t, call.stabilisers[at * chunks + index]
            );
            std::memcpy(n, state(index) + XL_ROWS(K) * ldC, sizeof(float) * static_cast<size_t>(K));
            look_ahead(index, t, l);
            chunk(index, t, l);
            arrives = true;
        }
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(call.dC0 + at * KV + x * V, GC + x * ldV, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(call.dn0 + at * K, Gn, sizeof(float) * static_cast<size_t>(K));
    }

  protected:
    const xl_mlstm_backward &call;
    const int64_t K, V, L, ldV, ldC, chunks;
    const float scale;
    const bool normalised;
    int64_t head, at, row;  // of this task: its head, its place among B x H, the first of its T among B x T
    const Element *q, *k, *v;
    bool arrives;
    Arena arena;
    Ahead ahead;
    Gates gates;
    float *GC, *n, *Gn;

    // Steps t to t + l: the gradients of what went in, and GC and Gn moved back.
    virtual void chunk(int64_t index, int64_t t, int64_t l) = 0;

    const float *state(int64_t index) const { return call.states + (at * (chunks + 1) + index) * XL_SLOT(K, V); }

    const Element *cotangent(int64_t t) const {
        return static_cast<const Element *>(call.dh) + ((row + t) * call.H + head) * V;
    }

    // What this chunk will write and the one before it read.
    void look_ahead(int64_t index, int64_t t, int64_t l) {
        const int64_t size = sizeof(Element), to = (row + t) * call.H + head, rows = index > 0 ? L : 0;
        ahead.forget();
        ahead.add(static_cast<Element *>(call.dq) + to * K, l, size * K, size * call.H * K);
        ahead.add(static_cast<Element *>(call.dk) + to * K, l, size * K, size * call.H * K);
        ahead.add(static_cast<Element *>(call.dv) + to * V, l, size * V, size * call.H * V);
        ahead.add(q + (t - rows) * call.q_strides[1], rows, size * K, size * call.q_strides[1]);
        ahead.add(k + (t - rows) * call.k_strides[1], rows, size * K, size * call.k_strides[1]);
        ahead.add(v + (t - rows) * call.v_strides[1], rows, size * V, size * call.v_strides[1]);
        if (call.dh != nullptr) ahead.add(cotangent(t - rows), rows, size * V, size * call.H * V);
        if (rows > 0) ahead.add(state(index - 1), 1, 4 * K * ldC, 0);
    }

    float a(int64_t t, int64_t j) const { return call.a[(row + t + j) * call.H + head]; }

    float denominator(int64_t t, int64_t j) const { return normalised ? gates.denominator(j, a(t, j), call.eps) : 1.0f; }

    // da_j, e_j known.
    float slope(int64_t t, int64_t j, float e) const {
        if (!normalised) return 0.0f;
        const bool free = !(std::fabs(a(t, j)) <= gates.floor[j]);  // of the floor; a NaN is
        if (!free || !gates.exists[j]) return 0.0f;
        return (a(t, j) < 0.0f ? e : -e) / denominator(t, j);
    }

    // Gates from the last row to the first: `rest` is what the rows behind j have added up to, `change` q_j . dq_j - p_j.
    void gate_gradients(int64_t t, int64_t j, float change, float k_dk, float &rest) const {
        const int64_t to = (row + t + j) * call.H + head;
        rest += change;
        const bool counts = gates.exists[j] && !gates.fresh[j];
        call.di[to] = k_dk * gates.di_dx[j];
        call.df[to] = counts ? rest * gates.df_dx[j] : 0.0f;
        if (gates.fresh[j]) rest = 0.0f;  // what stands before is another document
    }
};

}  // namespace XL_ISA
