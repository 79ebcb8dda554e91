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

// One task; how a chunk is computed is left to who derives. Rows of C are ldV apart.
template <typename Element>
class ForwardSweep {
  public:
    ForwardSweep(const xl_mlstm_forward &call, int64_t batch, int64_t head, int64_t ldV)
        : call(call), K(call.K), V(call.V), L(call.chunk), ldV(ldV), chunks((call.T + L - 1) / L), at(batch * call.H + head),
          row(batch * call.T), head(head), scale(1.0f / std::sqrt(static_cast<float>(K))), normalised(call.input_gate != 1) {
        q = static_cast<const Element *>(call.q) + batch * call.q_strides[0] + head * call.q_strides[2];
        k = static_cast<const Element *>(call.k) + batch * call.k_strides[0] + head * call.k_strides[2];
        v = static_cast<const Element *>(call.v) + batch * call.v_strides[0] + head * call.v_strides[2];
        gates.reserve(arena, L);
    }

    void run() {
        const int64_t KV = K * V;
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(C + x * ldV, call.C + at * KV + x * V, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(n, call.n + at * K, sizeof(float) * static_cast<size_t>(K));
        float m = call.m[at];
        for (int64_t t = 0, index = 0; t < call.T; t += L, ++index) {
            const int64_t l = call.T - t < L ? call.T - t : L, gate_at = (row + t) * call.H + head;
            gates.compute(
                l, call.input_gate, call.i + gate_at, call.f + gate_at, call.H,
                call.reset == nullptr ? nullptr : call.reset + row + t, call.mask == nullptr ? nullptr : call.mask + row + t, m
            );
            if (call.states != nullptr) {
                call.stabilisers[at * chunks + index] = m;
                std::memcpy(state(index) + KV, n, sizeof(float) * static_cast<size_t>(K));
            }
            chunk(index, t, l);
            m = gates.m_out;
        }
        if (call.states != nullptr) {
            keep_memory(chunks);
            std::memcpy(state(chunks) + KV, n, sizeof(float) * static_cast<size_t>(K));
        }
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(call.C1 + at * KV + x * V, C + x * ldV, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(call.n1 + at * K, n, sizeof(float) * static_cast<size_t>(K));
        call.m1[at] = m;
    }

  protected:
    const xl_mlstm_forward &call;
    const int64_t K, V, L, ldV, chunks, at, row, head;
    const float scale;
    const bool normalised;
    const Element *q, *k, *v;
    Arena arena;
    Gates gates;
    float *C, *n;

    // Steps t to t + l: h, a, and C and n moved on; C as it enters is kept, if anything is.
    virtual void chunk(int64_t index, int64_t t, int64_t l) = 0;

    float *state(int64_t index) const { return call.states + (at * (chunks + 1) + index) * K * (V + 1); }

    void keep_memory(int64_t index) const {
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(state(index) + x * V, C + x * ldV, sizeof(float) * static_cast<size_t>(V));
    }

    // What row j of the sums is multiplied by: 1 / d_j, 0 where there is no step. Keeps a_j.
    float divide(int64_t t, int64_t j, float a) const {
        if (!normalised) return gates.exists[j] ? 1.0f : 0.0f;
        if (call.a != nullptr) call.a[(row + t + j) * call.H + head] = a;
        return gates.exists[j] ? 1.0f / gates.denominator(j, a, call.eps) : 0.0f;
    }
};

}  // namespace XL_ISA
