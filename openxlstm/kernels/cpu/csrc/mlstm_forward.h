// The mLSTM over a sequence, forward (arXiv:2405.04517, Sec. 2.3 and App. A.3; cells/mlstm.py is the definition).
//
// A task is one head of one sequence. It goes over the sequence in chunks of L steps; the memory stays in the cache. With
// s = K**-0.5, the weights w, g, write and decay of `Gates`, and d the denominator of (21), a chunk is
//     S_jl = s (q_j . k_l) w_jl      h_j = (S v + s g_j q_j C) / d_j      C' = decay C + sum_l write_l k_l v_l^T     (19)
//     a_j  = sum_l S_jl + s g_j q_j . n                                   n' = decay n + sum_l write_l k_l           (20)
// For a backward pass a, and C and n at every border of chunks, are kept.
#pragma once

#include "mlstm_chunk.h"

namespace XL_ISA {

// The tasks of one thread; how a chunk is computed is left to who derives. Each chunk reads C and writes the next one.
template <typename Element>
class ForwardSweep {
  public:
    explicit ForwardSweep(const xl_mlstm_forward &call)
        : call(call), K(call.K), V(call.V), L(call.chunk), ldC(XL_PITCH(V)), chunks((call.T + L - 1) / L),
          scale(1.0f / std::sqrt(static_cast<float>(K))), normalised(call.input_gate != 1) {
        gates.reserve(arena, L);
        arena.reserve(n, XL_ROWS(K));
        for (float *&memory : own) arena.reserve(memory, call.states == nullptr ? XL_SLOT(K, V) : 0);
    }

    void run(int64_t batch, int64_t of) {
        head = of, at = batch * call.H + head, row = batch * call.T;
        q = static_cast<const Element *>(call.q) + batch * call.q_strides[0] + head * call.q_strides[2];
        k = static_cast<const Element *>(call.k) + batch * call.k_strides[0] + head * call.k_strides[2];
        v = static_cast<const Element *>(call.v) + batch * call.v_strides[0] + head * call.v_strides[2];
        const int64_t KV = K * V;
        C = memory(0);
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(C + x * ldC, call.C + at * KV + x * V, sizeof(float) * static_cast<size_t>(V));
        std::memset(n, 0, sizeof(float) * static_cast<size_t>(XL_ROWS(K)));  // what the task before left may be NaN
        std::memcpy(n, call.n + at * K, sizeof(float) * static_cast<size_t>(K));
        float m = call.m[at];
        for (int64_t t = 0, index = 0; t < call.T; t += L, ++index) {
            const int64_t l = call.T - t < L ? call.T - t : L, gate_at = (row + t) * call.H + head;
            gates.compute(
                l, call.input_gate, call.i + gate_at, call.f + gate_at, call.H,
                call.reset == nullptr ? nullptr : call.reset + row + t, call.mask == nullptr ? nullptr : call.mask + row + t, m
            );
            keep(index);
            if (call.states != nullptr) call.stabilisers[at * chunks + index] = m;
            next = memory(index + 1);
            look_ahead(index, t, l);
            chunk(t, l);
            C = next;
            m = gates.m_out;
        }
        keep(chunks);
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(call.C1 + at * KV + x * V, C + x * ldC, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(call.n1 + at * K, n, sizeof(float) * static_cast<size_t>(K));
        call.m1[at] = m;
    }

  protected:
    const xl_mlstm_forward &call;
    const int64_t K, V, L, ldC, chunks;  // rows of C are ldC apart
    const float scale;
    const bool normalised;
    int64_t head, at, row;  // of this task: its head, its place among B x H, the first of its T among B x T
    const Element *q, *k, *v;
    Arena arena;
    Ahead ahead;
    Gates gates;
    float *C, *next, *n;

    // Steps t to t + l: h, a, n moved on, and the next C from C.
    virtual void chunk(int64_t t, int64_t l) = 0;

    // What this chunk will write and the next one read.
    void look_ahead(int64_t index, int64_t t, int64_t l) {
        const int64_t size = sizeof(Element), next = t + l, rows = call.T - next < L ? call.T - next : L;
        ahead.forget();
        ahead.add(static_cast<Element *>(call.h) + ((row + t) * call.H + head) * V, l, size * V, size * call.H * V);
        ahead.add(q + next * call.q_strides[1], rows, size * K, size * call.q_strides[1]);
        ahead.add(k + next * call.k_strides[1], rows, size * K, size * call.k_strides[1]);
        ahead.add(v + next * call.v_strides[1], rows, size * V, size * call.v_strides[1]);
        ahead.add(memory(index + 1), 1, 4 * K * ldC, 0);
    }

    // What row j of the sums is multiplied by: 1 / d_j, 0 where there is no step. Keeps a_j.
    float divide(int64_t t, int64_t j, float a) const {
        if (!normalised) return gates.exists[j] ? 1.0f : 0.0f;
        if (call.a != nullptr) call.a[(row + t + j) * call.H + head] = a;
        return gates.exists[j] ? 1.0f / gates.denominator(j, a, call.eps) : 0.0f;
    }

  private:
    float *own[2];  // without a tape C goes to and fro

    float *memory(int64_t index) const {
        return call.states == nullptr ? own[index % 2] : call.states + (at * (chunks + 1) + index) * XL_SLOT(K, V);
    }

    void keep(int64_t index) const {
        if (call.states != nullptr)
            std::memcpy(memory(index) + XL_ROWS(K) * ldC, n, sizeof(float) * static_cast<size_t>(K));
    }
};

}  // namespace XL_ISA
