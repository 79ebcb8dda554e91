// The forward sweep of the mLSTM in bf16 with its products on AMX tiles; see mlstm_forward.h.
//
// q, k and v are exact operands. Of the others, which are the memory and the weighted scores and keys, each number enters as
// two of bf16: itself, and what rounding left over. What is rounded on its way into the memory stays there, and where scores
// nearly cancel, so that a denominator is at its floor, h would be what rounding left of them. All else is fp32.
#pragma once

#include "amx.h"
#include "mlstm_forward.h"

namespace XL_ISA {
namespace {

class ForwardTiles final : public ForwardSweep<uint16_t> {
  public:
    explicit ForwardTiles(const xl_mlstm_forward &call)
        : ForwardSweep(call), M(whole(L)), Kw(whole(K)), Vw(whole(V)), ldK(Kw + DEPTH),
          ldL(M + DEPTH), ldVal(Vw + DEPTH), ldS(M + SIDE), ldV(Vw + SIDE) {
        arena.reserve(Q, M * ldK), arena.reserve(Key, M * ldK), arena.reserve(Val, M * ldVal);
        for (uint16_t **left : {&P, &PRest}) arena.reserve(*left, M * ldL);
        for (uint16_t **left : {&written, &writtenRest}) arena.reserve(*left, Kw * ldL);
        arena.reserve(KeyT, M * Kw), arena.reserve(ValR, M * Vw), arena.reserve(CR, Kw * Vw), arena.reserve(CRest, Kw * Vw);
        arena.reserve(S, M * ldS), arena.reserve(within, M * ldV), arena.reserve(before, M * ldV);
        arena.allocate();
    }

  private:
    const int64_t M, Kw, Vw, ldK, ldL, ldVal, ldS, ldV;  // whole sizes; pitches
    uint16_t *Q, *Key, *Val;                        // rows
    uint16_t *P, *PRest, *written, *writtenRest;    // left operands: weighted scores; weighted keys, turned
    uint16_t *KeyT, *ValR, *CR, *CRest;             // right operands
    float *S, *within, *before;                     // products: scores; what the chunk and what the past give to h
    Tiles tiles;

    void chunk(int64_t t, int64_t l) override {
        const int64_t m = whole(l);
        read_words(q + t * call.q_strides[1], call.q_strides[1], gates.exists, l, K, Q, ldK);
        read_words(k + t * call.k_strides[1], call.k_strides[1], gates.exists, l, K, Key, ldK);
        read_words(v + t * call.v_strides[1], call.v_strides[1], gates.exists, l, V, Val, ldVal);
        pack_turned(m, Kw, Key, ldK, KeyT);
        pack(m, Vw, Val, ldVal, ValR);
        pack_memory();
        product(m, m, Kw, Q, ldK, KeyT, S, ldS, ahead, false, true);
        product(m, Vw, Kw, Q, ldK, CR, before, ldV, ahead);
        product(m, Vw, Kw, Q, ldK, CRest, before, ldV, ahead, true);
        uint16_t *h = static_cast<uint16_t *>(call.h) + ((row + t) * call.H + head) * V;
        for (int64_t j = 0; j < l; ++j) scores(j), ahead.some(8);
        for (int64_t j = l; j < m; ++j)
            for (uint16_t *rows : {P, PRest}) std::memset(rows + j * ldL, 0, sizeof(uint16_t) * static_cast<size_t>(m));
        product<Inner::UP_TO_ROW>(m, Vw, m, P, ldL, ValR, within, ldV, ahead, false, false, PRest);

        for (int64_t j = 0; j < l; ++j, h += call.H * V) {
            ahead.some(8);
            const float factor = divide(t, j, gates.row[j]), enter = gates.enter[j] * scale;
            const float *inner = within + j * ldV, *outer = before + j * ldV;
            for (int64_t x = 0; x < V; x += W) {
                const vf sum = (load(inner + x) + load(outer + x) * enter) * factor;
                store_rounded(h + x, gates.exists[j] ? sum : vf{}, V - x);
            }
        }

        for (int64_t j = l; j < m; ++j) gates.write[j] = 0.0f;
        turned_and_weighted(m, Kw, KeyT, gates.write, written, writtenRest, ldL);
        product(Kw, Vw, m, written, ldL, ValR, next, ldC, ahead, true, false, writtenRest);
        for (int64_t x = 0; x < K; x += W) {
            vf sum = gates.decay == 0.0f || !normalised ? vf{} : load(n + x) * gates.decay;
            if (normalised)
                for (int64_t j = 0; j < l; ++j) sum += load(Key + j * ldK + x) * gates.write[j];
            store(n + x, sum);
        }
    }

    // The memory as a right operand in two parts, and decayed where the next one will be.
    void pack_memory() {
        const int64_t column = Kw / DEPTH * TILE;
        for (int64_t x = 0; x < K; x += 2) {
            int64_t to = x / DEPTH * TILE + x % DEPTH * SIDE;
            for (int64_t y = 0; y < Vw; y += DEPTH, to += 2 * column) {
                const Halves even = decayed(x, y), odd = x + 1 < K ? decayed(x + 1, y) : Halves{};
                const Pairs pair = paired(even.words, odd.words), rest = paired(even.rest, odd.rest);
                store_words(CR + to, pair.low), store_words(CR + to + column, pair.high);
                store_words(CRest + to, rest.low), store_words(CRest + to + column, rest.high);
            }
        }
    }

    Halves decayed(int64_t x, int64_t y) {
        const vf low = load(C + x * ldC + y), high = load(C + x * ldC + y + W);
        const bool forgotten = gates.decay == 0.0f;  // even what is not finite
        store(next + x * ldC + y, forgotten ? vf{} : low * gates.decay);
        store(next + x * ldC + y + W, forgotten ? vf{} : high * gates.decay);
        return halves(low, high);
    }

    // Row j of the weighted scores, and a_j in the place of the gates' row.
    void scores(int64_t j) {
        const int64_t end = whole(j + 1), from = gates.first[j] / DEPTH * DEPTH;
        const float top = gates.row[j];
        vf total = {};
        uint16_t *p = P + j * ldL, *rest = PRest + j * ldL;
        for (int64_t x = 0; x < from; x += DEPTH) store_words(p + x, __m512i{}), store_words(rest + x, __m512i{});
        for (int64_t x = from; x < end; x += DEPTH) {
            vf s[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t l = x + half * W;
                s[half] = load(S + j * ldS + l) * (vexp(load(gates.key + l) - top) * scale);
                s[half] = gates.stand(j, l) ? s[half] : vf{};
                total += s[half];
            }
            const Halves both = halves(s[0], s[1]);
            store_words(p + x, both.words), store_words(rest + x, both.rest);
        }
        if (normalised) gates.row[j] = sum_of(total) + gates.enter[j] * scale * dot(n, Q + j * ldK, K);
    }
};

}  // namespace
}  // namespace XL_ISA
