// The mLSTM over a sequence, backward; the forward sweep and its letters are in mlstm_forward.cpp.
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

#include "mlstm_chunk.h"

namespace XL_ISA {
namespace {

template <typename Element>
class Backward {
  public:
    Backward(const xl_mlstm_backward &call, int64_t batch, int64_t head)
        : call(call), K(call.K), V(call.V), L(call.chunk), ldK(pitch(K)), ldV(pitch(V)), ldL(pitch(L)) {
        q = static_cast<const Element *>(call.q) + batch * call.q_strides[0] + head * call.q_strides[2];
        k = static_cast<const Element *>(call.k) + batch * call.k_strides[0] + head * call.k_strides[2];
        v = static_cast<const Element *>(call.v) + batch * call.v_strides[0] + head * call.v_strides[2];
        at = batch * call.H + head;
        row = batch * call.T;
        this->head = head;
        chunks = (call.T + L - 1) / L;
        gates.reserve(arena, L);
        for (float **array : {&Q, &Key, &dQ, &dK, &CU}) arena.reserve(*array, L * ldK);
        for (float **array : {&Val, &U, &dV}) arena.reserve(*array, L * ldV);
        for (float **array : {&S, &dP}) arena.reserve(*array, L * ldL);
        for (float **array : {&CT, &GCT}) arena.reserve(*array, V * ldK);
        arena.reserve(KeyT, K * ldL), arena.reserve(ValT, V * ldL), arena.reserve(GC, K * ldV);
        for (float **array : {&n, &Gn}) arena.reserve(*array, ldK);
        for (float **array : {&weights, &da, &p, &dlog_f}) arena.reserve(*array, ldL);
        arena.allocate();
    }

    void run() {
        const int64_t KV = K * V;
        arrives = call.dC != nullptr || call.dn != nullptr;  // a gradient from behind
        if (call.dC != nullptr)
            for (int64_t x = 0; x < K; ++x)
                std::memcpy(GC + x * ldV, call.dC + at * KV + x * V, sizeof(float) * static_cast<size_t>(V));
        if (call.dn != nullptr && call.input_gate != 1)  // n is a constant without a normaliser
            std::memcpy(Gn, call.dn + at * K, sizeof(float) * static_cast<size_t>(K));
        for (int64_t index = chunks - 1; index >= 0; --index) {
            const int64_t t = index * L;
            chunk(index, t, call.T - t < L ? call.T - t : L);
            arrives = true;
        }
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(call.dC0 + at * KV + x * V, GC + x * ldV, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(call.dn0 + at * K, Gn, sizeof(float) * static_cast<size_t>(K));
    }

  private:
    const xl_mlstm_backward &call;
    const int64_t K, V, L, ldK, ldV, ldL;
    const Element *q, *k, *v;
    int64_t at, row, head, chunks;
    bool arrives;
    Arena arena;
    Gates gates;
    float *Q, *Key, *KeyT, *Val, *ValT, *U, *S, *dP, *CU, *dQ, *dK, *dV, *CT, *GC, *GCT, *n, *Gn;
    float *weights, *da, *p, *dlog_f;

    const float *state(int64_t index) const { return call.states + (at * (chunks + 1) + index) * K * (V + 1); }

    void chunk(int64_t index, int64_t t, int64_t l) {
        const int64_t gate_at = (row + t) * call.H + head;
        gates.compute(
            l, call.input_gate, call.i + gate_at, call.f + gate_at, call.H,
            call.reset == nullptr ? nullptr : call.reset + row + t,
            call.mask == nullptr ? nullptr : call.mask + row + t, call.stabilisers[at * chunks + index]
        );
        read(t, l);
        const float *C = state(index);
        std::memcpy(n, C + K * V, sizeof(float) * static_cast<size_t>(K));
        const float rho = arrives ? across(state(index + 1)) : 0.0f;  // before GC and Gn move on

        multiply(l, l, K, {Q, ldK, 1}, KeyT, ldL, S, ldL, 0.0f, true);
        multiply(l, l, V, {U, ldV, 1}, ValT, ldL, dP, ldL, 0.0f, true);
        transpose(K, V, C, V, CT, ldK);
        multiply(l, K, V, {U, ldV, 1}, CT, ldK, CU, ldK, 0.0f);
        const float scale = 1.0f / std::sqrt(static_cast<float>(K));
        for (int64_t j = 0; j < l; ++j) scores(j, l, t, scale);

        keys_and_values(l);
        for (int64_t j = 0; j < l; ++j)
            for (int64_t x = 0; x < K; x += W) {
                const vf memory = load(CU + j * ldK + x) + load(n + x) * da[j];
                store(dQ + j * ldK + x, memory * (gates.enter[j] * scale));
            }
        multiply<Inner::UP_TO_ROW>(l, K, l, {dP, ldL, 1}, Key, ldK, dQ, ldK, 1.0f);
        write(t, l, rho);

        for (int64_t j = 0; j < l; ++j) {
            const float enter = gates.enter[j] * scale;
            for (int64_t x = 0; x < V; x += W) store(U + j * ldV + x, load(U + j * ldV + x) * enter);
            da[j] *= enter;
        }
        multiply(K, V, l, {Q, 1, ldK}, U, ldV, GC, ldV, arrives ? gates.decay : 0.0f);
        for (int64_t x = 0; x < K; x += W) {
            vf sum = arrives ? load(Gn + x) * gates.decay : vf{};
            for (int64_t j = 0; j < l; ++j) sum += load(Q + j * ldK + x) * da[j];
            store(Gn + x, sum);
        }
    }

    void read(int64_t t, int64_t l) {
        read_rows(q + t * call.q_strides[1], call.q_strides[1], gates.exists, l, K, Q, ldK);
        read_rows(k + t * call.k_strides[1], call.k_strides[1], gates.exists, l, K, Key, ldK);
        read_rows(v + t * call.v_strides[1], call.v_strides[1], gates.exists, l, V, Val, ldV);
        if (call.dh == nullptr) {
            std::memset(U, 0, sizeof(float) * static_cast<size_t>(l * ldV));
        } else {
            const Element *dh = static_cast<const Element *>(call.dh) + ((row + t) * call.H + head) * V;
            read_rows(dh, call.H * V, gates.exists, l, V, U, ldV);
        }
        if (call.input_gate != 1)
            for (int64_t j = 0; j < l; ++j) {
                const float factor = 1.0f / denominator(j, call.a[(row + t + j) * call.H + head]);
                for (int64_t x = 0; x < V; x += W) store(U + j * ldV + x, load(U + j * ldV + x) * factor);
            }
        transpose(l, K, Key, ldK, KeyT, ldL);
        transpose(l, V, Val, ldV, ValT, ldL);
    }

    float denominator(int64_t j, float a) const {
        const float size = std::fabs(a), low = gates.floor[j];
        return (size > low || a != a ? size : low) + static_cast<float>(call.eps);
    }

    float across(const float *after) const {  // <GC, C'> + Gn . n'
        vf sums[4] = {};
        float rest = 0.0f;
        for (int64_t x = 0; x < K; ++x) {
            const float *G = GC + x * ldV, *C = after + x * V;
            int64_t y = 0;
            for (; y + 4 * W <= V; y += 4 * W)
                XL_UNROLL for (int s = 0; s < 4; ++s) sums[s] += load(G + y + s * W) * load(C + y + s * W);
            for (; y < V; ++y) rest += G[y] * C[y];
            rest += Gn[x] * after[K * V + x];
        }
        return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }

    // Row j: S and dP from products to what stands above, and da_j.
    void scores(int64_t j, int64_t l, int64_t t, float scale) {
        gates.weigh(j, padded(l), weights);
        float *score = S + j * ldL, *gradient = dP + j * ldL;
        vf total = {};
        for (int64_t x = 0; x <= j; x += W) {
            const vf weight = load(weights + x) * scale, s = load(score + x) * weight;
            store(score + x, s);
            total += s * load(gradient + x);
        }
        da[j] = 0.0f;
        if (call.input_gate != 1) {
            const float a = call.a[(row + t + j) * call.H + head];
            const float e = sum_of(total) + gates.enter[j] * scale * dot(Q + j * ldK, CU + j * ldK, K);
            const bool free = !(std::fabs(a) <= gates.floor[j]);  // of the floor; a NaN is
            if (free && gates.exists[j]) da[j] = (a < 0.0f ? e : -e) / denominator(j, a);
        }
        for (int64_t x = 0; x < padded(l); x += W) {
            if (x > j) {
                store(score + x, vf{}), store(gradient + x, vf{});
            } else {
                store(gradient + x, (load(gradient + x) + da[j]) * (load(weights + x) * scale));
            }
        }
    }

    void keys_and_values(int64_t l) {
        if (arrives) {
            transpose(K, V, GC, ldV, GCT, ldK);
            multiply(l, K, V, {Val, ldV, 1}, GCT, ldK, dK, ldK, 0.0f);
            multiply(l, V, K, {Key, ldK, 1}, GC, ldV, dV, ldV, 0.0f);
            for (int64_t j = 0; j < l; ++j) {
                const float weight = gates.write[j];
                for (int64_t x = 0; x < K; x += W)
                    store(dK + j * ldK + x, (load(dK + j * ldK + x) + load(Gn + x)) * weight);
                for (int64_t x = 0; x < V; x += W) store(dV + j * ldV + x, load(dV + j * ldV + x) * weight);
            }
        }
        multiply<Inner::FROM_ROW>(l, K, l, {dP, 1, ldL}, Q, ldK, dK, ldK, arrives ? 1.0f : 0.0f);
        multiply<Inner::FROM_ROW>(l, V, l, {S, 1, ldL}, U, ldV, dV, ldV, arrives ? 1.0f : 0.0f);
    }

    // The chunk's gradients go out; those of the gates are made of the unrounded rows.
    void write(int64_t t, int64_t l, float rho) {
        float rest = rho;
        for (int64_t j = l - 1; j >= 0; --j) {
            if (!gates.exists[j]) {
                std::memset(dQ + j * ldK, 0, sizeof(float) * static_cast<size_t>(K));
                std::memset(dK + j * ldK, 0, sizeof(float) * static_cast<size_t>(K));
                std::memset(dV + j * ldV, 0, sizeof(float) * static_cast<size_t>(V));
            }
            const float own = gates.exists[j] ? dot(Key + j * ldK, dK + j * ldK, K) : 0.0f;
            rest += dot(Q + j * ldK, dQ + j * ldK, K) - own;
            const bool counts = gates.exists[j] && !gates.fresh[j];
            const int64_t to = (row + t + j) * call.H + head;
            call.di[to] = own * gates.di_dx[j];
            call.df[to] = counts ? rest * gates.df_dx[j] : 0.0f;
            if (gates.fresh[j]) rest = 0.0f;  // what stands before is another document
            write_row(dQ + j * ldK, static_cast<Element *>(call.dq) + to * K, K);
            write_row(dK + j * ldK, static_cast<Element *>(call.dk) + to * K, K);
            write_row(dV + j * ldV, static_cast<Element *>(call.dv) + to * V, V);
        }
    }
};

template <typename Element>
int sweep(const xl_mlstm_backward &call) {
    const int64_t tasks = call.B * call.H;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(call.threads)) reduction(max : failed)
    for (int64_t task = 0; task < tasks; ++task) {
        try {
            Backward<Element>(call, task / call.H, task % call.H).run();
        } catch (const std::bad_alloc &) {
            failed = XL_NO_MEMORY;
        }
    }
    return failed;
}

}  // namespace

int mlstm_backward(const xl_mlstm_backward &call) { return call.bf16 ? sweep<uint16_t>(call) : sweep<float>(call); }

}  // namespace XL_ISA
