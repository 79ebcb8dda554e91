// The forward sweep of the mLSTM in bf16 with its products on AMX tiles; see mlstm_forward.h.
//
// q, k and v are exact operands. The memory and the weighted scores and keys are rounded to bf16 for the products that they
// enter; the memory itself, gates, n, a and every sum are fp32, and a is made of unrounded scores.
#pragma once

#include "amx.h"
#include "mlstm_forward.h"

namespace XL_ISA {
namespace {

class ForwardTiles final : public ForwardSweep<uint16_t> {
  public:
    ForwardTiles(const xl_mlstm_forward &call, int64_t batch, int64_t head)
        : ForwardSweep(call, batch, head, whole(call.V) + SIDE), M(whole(L)), Kw(whole(K)), Vw(whole(V)), ldK(Kw + DEPTH),
          ldL(M + DEPTH), ldVal(Vw + DEPTH), ldS(M + SIDE) {
        arena.reserve(Q, M * ldK), arena.reserve(Key, M * ldK), arena.reserve(Val, M * ldVal);
        arena.reserve(P, M * ldL), arena.reserve(written, Kw * ldL);
        arena.reserve(KeyT, M * Kw), arena.reserve(ValR, M * Vw), arena.reserve(CR, Kw * Vw);
        arena.reserve(S, M * ldS), arena.reserve(within, M * ldV), arena.reserve(before, M * ldV);
        arena.reserve(C, Kw * ldV), arena.reserve(n, Kw);
        arena.allocate();
    }

  private:
    const int64_t M, Kw, Vw, ldK, ldL, ldVal, ldS;  // whole sizes; pitches
    uint16_t *Q, *Key, *Val;                        // rows
    uint16_t *P, *written;                          // left operands: weighted scores; weighted keys, turned
    uint16_t *KeyT, *ValR, *CR;                     // right operands
    float *S, *within, *before;                     // products: scores; what the chunk and what the past give to h
    Tiles tiles;

    void chunk(int64_t index, int64_t t, int64_t l) override {
        const int64_t m = whole(l);
        read_words(q + t * call.q_strides[1], call.q_strides[1], gates.exists, l, K, Q, ldK);
        read_words(k + t * call.k_strides[1], call.k_strides[1], gates.exists, l, K, Key, ldK);
        read_words(v + t * call.v_strides[1], call.v_strides[1], gates.exists, l, V, Val, ldVal);
        pack_turned(m, Kw, Key, ldK, KeyT);
        pack(m, Vw, Val, ldVal, ValR);
        pack_memory(call.states == nullptr ? nullptr : state(index));
        product(m, m, Kw, Q, ldK, KeyT, S, ldS, false, true);
        product(m, Vw, Kw, Q, ldK, CR, before, ldV);
        for (int64_t j = 0; j < l; ++j) scores(j);
        for (int64_t j = l; j < m; ++j) std::memset(P + j * ldL, 0, sizeof(uint16_t) * static_cast<size_t>(m));
        product<Inner::UP_TO_ROW>(m, Vw, m, P, ldL, ValR, within, ldV);

        uint16_t *h = static_cast<uint16_t *>(call.h) + ((row + t) * call.H + head) * V;
        for (int64_t j = 0; j < l; ++j, h += call.H * V) {
            const float factor = divide(t, j, gates.row[j]), enter = gates.enter[j] * scale;
            const float *inner = within + j * ldV, *outer = before + j * ldV;
            for (int64_t x = 0; x < V; x += W) {
                const vf sum = (load(inner + x) + load(outer + x) * enter) * factor;
                store_rounded(h + x, gates.exists[j] ? sum : vf{}, V - x);
            }
        }

        for (int64_t j = l; j < m; ++j) gates.write[j] = 0.0f;
        turned_and_weighted(m, Kw, KeyT, gates.write, written, ldL);
        product(Kw, Vw, m, written, ldL, ValR, C, ldV, true);
        for (int64_t x = 0; x < K; x += W) {
            vf sum = gates.decay == 0.0f || !normalised ? vf{} : load(n + x) * gates.decay;
            if (normalised)
                for (int64_t j = 0; j < l; ++j) sum += load(Key + j * ldK + x) * gates.write[j];
            store(n + x, sum);
        }
    }

    // The memory as a right operand; on the way it is kept, and decays.
    void pack_memory(float *kept) {
        const int64_t column = Kw / DEPTH * TILE;
        const float decay = gates.decay;
        for (int64_t x = 0; x < K; x += 2) {
            uint16_t *to = CR + x / DEPTH * TILE + x % DEPTH * SIDE;
            for (int64_t y = 0; y < Vw; y += DEPTH) {
                vf r[2][2];
                for (int e = 0; e < 2; ++e)
                    for (int s = 0; s < 2; ++s) {
                        float *at = C + (x + e) * ldV + y + s * W;
                        r[e][s] = load(at);
                        if (kept != nullptr && x + e < K) keep(kept + (x + e) * V + y + s * W, r[e][s], V - y - s * W);
                        store(at, decay == 0.0f ? vf{} : r[e][s] * decay);  // 0 forgets even what is not finite
                    }
                const Pairs pair = paired(rounded(r[0][0], r[0][1]), rounded(r[1][0], r[1][1]));
                store_words(to + y / SIDE * column, pair.low), store_words(to + (y / SIDE + 1) * column, pair.high);
            }
        }
    }

    static void keep(float *to, vf x, int64_t count) {
        if (count >= W) store(to, x);
        else if (count > 0) _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
    }

    // Row j of the weighted scores, and a_j in the place of the gates' row.
    void scores(int64_t j) {
        const int64_t end = whole(j + 1), from = gates.first[j] / DEPTH * DEPTH;
        const float top = gates.row[j];
        vf total = {};
        for (int64_t x = 0; x < from; x += DEPTH) store_words(P + j * ldL + x, __m512i{});
        for (int64_t x = from; x < end; x += DEPTH) {
            vf s[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t l = x + half * W;
                s[half] = load(S + j * ldS + l) * (vexp(load(gates.key + l) - top) * scale);
                s[half] = gates.stand(j, l) ? s[half] : vf{};
                total += s[half];
            }
            store_words(P + j * ldL + x, rounded(s[0], s[1]));
        }
        if (normalised) gates.row[j] = sum_of(total) + gates.enter[j] * scale * dot(n, Q + j * ldK, K);
    }
};

}  // namespace
}  // namespace XL_ISA
