// The backward sweep of the mLSTM in bf16 with its products on AMX tiles; see mlstm_backward.h.
//
// q, k, v and dh are exact operands: 1 / d_j, written r_j here, multiplies sums instead of dh. P r, dP, the weighted queries, C
// and GC are rounded to bf16 for the products that they enter; C and GC themselves, gates, n, a, e, da, rho and all sums are
// fp32, and the gates' gradients are made of unrounded rows.
// e is a small difference of large terms wherever h is nearly orthogonal to dh, so C enters its product in two parts.
//
// Where a gate forgets nearly everything, <GC, C'> and the sum of p_j nearly cancel, and a gradient of log_f is what is left.
// So both are of the same numbers: GC as it enters the products, and the weighted keys, which enter C' in two parts.
#pragma once

#include "amx.h"
#include "mlstm_backward.h"

namespace XL_ISA {
namespace {

class BackwardTiles final : public BackwardSweep<uint16_t> {
  public:
    explicit BackwardTiles(const xl_mlstm_backward &call)
        : BackwardSweep(call, whole(call.V) + SIDE), M(whole(L)), Kw(whole(K)), Vw(whole(V)), ldK(Kw + SIDE),
          ldS(M + SIDE), ldk(Kw + DEPTH), ldv(Vw + DEPTH), ldl(M + DEPTH) {
        for (uint16_t **rows : {&Q, &Key}) arena.reserve(*rows, M * ldk);
        for (uint16_t **rows : {&Val, &dH}) arena.reserve(*rows, M * ldv);
        for (uint16_t **left : {&P, &dP, &PT, &dPT}) arena.reserve(*left, M * ldl);
        arena.reserve(entering, Kw * ldl);
        for (uint16_t **right : {&KeyT, &QT, &KeyR, &QR}) arena.reserve(*right, M * Kw);
        for (uint16_t **right : {&ValT, &dHR}) arena.reserve(*right, M * Vw);
        for (uint16_t **right : {&CT, &CRest, &GCT, &GCR}) arena.reserve(*right, Kw * Vw);
        for (float **array : {&S, &D}) arena.reserve(*array, M * ldS);
        for (float **array : {&dQ, &dK, &CU, &KU}) arena.reserve(*array, M * ldK);
        for (float **array : {&dV, &VU}) arena.reserve(*array, M * ldV);
        for (float **array : {&r, &da, &enter}) arena.reserve(*array, M);
        arena.allocate();
    }

  private:
    const int64_t M, Kw, Vw, ldK, ldS, ldk, ldv, ldl;  // whole sizes; pitches of fp32 rows, and in lower case of bf16 rows
    uint16_t *Q, *Key, *Val, *dH;                      // rows, which are left operands too
    uint16_t *P, *dP, *PT, *dPT, *entering;            // left operands: P r, dP; the same turned; weighted queries, turned
    uint16_t *KeyT, *QT, *KeyR, *QR, *ValT, *dHR, *CT, *CRest, *GCT, *GCR;  // right operands: X^T, or R for X as it is
    float *S, *D;                                      // q . k and dh . v
    float *dQ, *dK, *dV;                               // what the chunk gives to the gradients
    float *CU, *KU, *VU;                               // C dh, GC v, GC^T k: what stands outside of it does
    float *r, *da, *enter;
    Tiles tiles;

    void chunk(int64_t index, int64_t t, int64_t l) override {
        const int64_t m = whole(l);
        read(t, l);
        pack_memory(state(index));
        const float rho = arrives ? pack_gradient(state(index + 1)) : 0.0f;
        product(m, m, Kw, Q, ldk, KeyT, S, ldS, ahead, false, true);
        product(m, m, Vw, dH, ldv, ValT, D, ldS, ahead, false, true);
        product(m, Kw, Vw, dH, ldv, CT, CU, ldK, ahead);
        product(m, Kw, Vw, dH, ldv, CRest, CU, ldK, ahead, true);
        for (int64_t j = 0; j < l; ++j) scores(t, j), ahead.some(8);
        for (int64_t j = l; j < m; ++j)
            for (uint16_t *rows : {P, dP}) std::memset(rows + j * ldl, 0, sizeof(uint16_t) * static_cast<size_t>(m));
        turned_triangle(m, P, ldl, PT, ldl);
        turned_triangle(m, dP, ldl, dPT, ldl);
        product<Inner::UP_TO_ROW>(m, Kw, m, dP, ldl, KeyR, dQ, ldK, ahead);
        product<Inner::FROM_ROW>(m, Kw, m, dPT, ldl, QR, dK, ldK, ahead);
        product<Inner::FROM_ROW>(m, Vw, m, PT, ldl, dHR, dV, ldV, ahead);
        if (arrives) {
            product(m, Kw, Vw, Val, ldv, GCT, KU, ldK, ahead);
            product(m, Vw, Kw, Key, ldk, GCR, VU, ldV, ahead);
        }
        write(t, l, rho);

        for (int64_t j = 0; j < m; ++j) r[j] = j < l ? r[j] * enter[j] : 0.0f;
        turned_and_weighted(m, Kw, QT, r, entering, nullptr, ldl);
        product(Kw, Vw, m, entering, ldl, dHR, GC, ldV, ahead, true);
        for (int64_t x = 0; x < K; x += W) {
            vf sum = arrives ? load(Gn + x) * gates.decay : vf{};
            for (int64_t j = 0; j < l; ++j) sum += load(Q + j * ldk + x) * (da[j] * enter[j]);
            store(Gn + x, sum);
        }
    }

    void read(int64_t t, int64_t l) {
        const int64_t m = whole(l);
        read_words(q + t * call.q_strides[1], call.q_strides[1], gates.exists, l, K, Q, ldk);
        read_words(k + t * call.k_strides[1], call.k_strides[1], gates.exists, l, K, Key, ldk);
        read_words(v + t * call.v_strides[1], call.v_strides[1], gates.exists, l, V, Val, ldv);
        if (call.dh == nullptr) {
            std::memset(dH, 0, sizeof(uint16_t) * static_cast<size_t>(m * ldv));
        } else {
            read_words(cotangent(t), call.H * V, gates.exists, l, V, dH, ldv);
        }
        pack_turned(m, Kw, Key, ldk, KeyT), pack_turned(m, Kw, Q, ldk, QT), pack_turned(m, Vw, Val, ldv, ValT);
        pack(m, Kw, Key, ldk, KeyR), pack(m, Kw, Q, ldk, QR), pack(m, Vw, dH, ldv, dHR);
        for (int64_t j = 0; j < l; ++j) r[j] = 1.0f / denominator(t, j), enter[j] = gates.enter[j] * scale;
    }

    // C^T as a right operand, and what rounding it left over as another.
    void pack_memory(const float *C) {
        for (int64_t x = 0; x < Kw; x += SIDE)
            for (int64_t y = 0; y < Vw; y += DEPTH) {
                __m512i rows[SIDE], rest[SIDE];
                for (int e = 0; e < SIDE; ++e) {
                    const float *at = C + (x + e) * ldC + y;
                    const bool there = x + e < K;
                    const vf low = load_up_to(at, there ? V - y : 0), high = load_up_to(at + W, there ? V - y - W : 0);
                    const Halves both = halves(low, high);
                    rows[e] = both.words, rest[e] = both.rest;
                }
                turn(rows), turn(rest);
                const int64_t to = x / SIDE * (Vw / DEPTH) * TILE + y / DEPTH * TILE;
                for (int e = 0; e < SIDE; ++e) {
                    store_words(CT + to + e * DEPTH, rows[e]), store_words(CRest + to + e * DEPTH, rest[e]);
                }
            }
    }

    // GC and GC^T as right operands; on the way <GC, C'> + Gn . n' is summed, and GC decays.
    float pack_gradient(const float *after) {
        const float decay = gates.decay;
        vf first = {}, second = {};
        for (int64_t x = 0; x < Kw; x += SIDE)
            for (int64_t y = 0; y < Vw; y += DEPTH) {
                __m512i rows[SIDE];
                for (int e = 0; e < SIDE; ++e) {
                    float *at = GC + (x + e) * ldV + y;
                    const vf low = load(at), high = load(at + W);
                    rows[e] = rounded(low, high);
                    if (x + e < K) {
                        const float *C = after + (x + e) * ldC + y;
                        first += widened(_mm512_castsi512_si256(rows[e])) * load_up_to(C, V - y);
                        second += widened(_mm512_extracti64x4_epi64(rows[e], 1)) * load_up_to(C + W, V - y - W);
                    }
                    store(at, decay == 0.0f ? vf{} : low * decay), store(at + W, decay == 0.0f ? vf{} : high * decay);
                }
                uint16_t *plain = GCR + y / SIDE * (Kw / DEPTH) * TILE + x / DEPTH * TILE + x % DEPTH * SIDE;
                for (int e = 0; e < SIDE; e += 2) {
                    const Pairs pair = paired(rows[e], rows[e + 1]);
                    store_words(plain + e * SIDE, pair.low);
                    store_words(plain + e * SIDE + Kw / DEPTH * TILE, pair.high);
                }
                turn(rows);
                uint16_t *turned = GCT + x / SIDE * (Vw / DEPTH) * TILE + y / DEPTH * TILE;
                for (int e = 0; e < SIDE; ++e) store_words(turned + e * DEPTH, rows[e]);
            }
        float rho = sum_of(first + second);
        for (int64_t x = 0; x < K; ++x) rho += Gn[x] * after[XL_ROWS(K) * ldC + x];
        return rho;
    }

    static vf load_up_to(const float *p, int64_t count) {
        if (count >= W) return load(p);
        return count <= 0 ? vf{} : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
    }

    // Row j of P r and of dP, and da_j.
    void scores(int64_t t, int64_t j) {
        const int64_t end = whole(j + 1), from = gates.first[j] / DEPTH * DEPTH;
        float *s = S + j * ldS, *d = D + j * ldS;
        uint16_t *p = P + j * ldl, *dp = dP + j * ldl;
        vf total = {};
        for (int64_t x = 0; x < from; x += DEPTH) store_words(p + x, __m512i{}), store_words(dp + x, __m512i{});
        for (int64_t x = from; x < end; x += DEPTH) {
            vf rows[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t l = x + half * W;
                const vi stand = gates.stand(j, l);
                const vf weight = stand ? vexp(load(gates.key + l) - gates.row[j]) * scale : vf{};
                const vf gradient = stand ? load(d + l) * r[j] : vf{}, score = stand ? load(s + l) * weight : vf{};
                store(s + l, weight), store(d + l, gradient);
                total += score * gradient;
                rows[half] = score * r[j];
            }
            store_words(p + x, rounded(rows[0], rows[1]));
        }
        da[j] = normalised ? slope(t, j, sum_of(total) + r[j] * enter[j] * dot(CU + j * ldK, Q + j * ldk, K)) : 0.0f;
        for (int64_t x = from; x < end; x += DEPTH) {
            const vf low = (load(d + x) + da[j]) * load(s + x), high = (load(d + x + W) + da[j]) * load(s + x + W);
            store_words(dp + x, rounded(low, high));
        }
    }

    // The chunk's gradients go out, and with them those of the gates.
    void write(int64_t t, int64_t l, float rho) {
        float rest = rho;
        for (int64_t j = l - 1; j >= 0; --j) {
            ahead.some(8);
            const bool exists = gates.exists[j];
            const int64_t to = (row + t + j) * call.H + head;
            uint16_t *dq = static_cast<uint16_t *>(call.dq) + to * K, *dk = static_cast<uint16_t *>(call.dk) + to * K;
            uint16_t *dv = static_cast<uint16_t *>(call.dv) + to * V;
            const float memory = enter[j] * r[j], past = enter[j] * da[j], weight = gates.write[j];
            vf q_dq = {}, k_dk = {};
            for (int64_t x = 0; x < K; x += W) {
                const vf key = load(Key + j * ldk + x);
                vf by_q = load(dQ + j * ldK + x) + load(CU + j * ldK + x) * memory + load(n + x) * past;
                vf by_k = load(dK + j * ldK + x);
                if (arrives) by_k += (load(Gn + x) + load(KU + j * ldK + x)) * weight;
                if (!exists) by_q = vf{}, by_k = vf{};
                q_dq += load(Q + j * ldk + x) * by_q, k_dk += key * by_k;
                store_rounded(dq + x, by_q, K - x), store_rounded(dk + x, by_k, K - x);
            }
            for (int64_t x = 0; x < V; x += W) {
                vf by_v = load(dV + j * ldV + x);
                if (arrives) by_v += load(VU + j * ldV + x) * weight;
                store_rounded(dv + x, exists ? by_v : vf{}, V - x);
            }
            gate_gradients(t, j, sum_of(q_dq - k_dk), sum_of(k_dk), rest);
        }
    }
};

}  // namespace
}  // namespace XL_ISA
