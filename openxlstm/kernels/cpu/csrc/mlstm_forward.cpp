// The mLSTM over a sequence, forward (arXiv:2405.04517, Sec. 2.3 and App. A.3; cells/mlstm.py is the definition).
//
// A task is one head of one sequence. It goes over the sequence in chunks of L steps; the memory stays in the cache. With
// s = K**-0.5, the weights w, g, write and decay of `Gates`, and d the denominator of (21), a chunk is
//     S_jl = s (q_j . k_l) w_jl      h_j = (S v + s g_j q_j C) / d_j      C' = decay C + sum_l write_l k_l v_l^T     (19)
//     a_j  = sum_l S_jl + s g_j q_j . n                                   n' = decay n + sum_l write_l k_l           (20)
// in fp32 whatever the dtype of q, k, v and h. For a backward pass a, and C and n at every border of chunks, are kept.

#include "mlstm_chunk.h"

namespace XL_ISA {
namespace {

template <typename Element>
class Forward {
  public:
    Forward(const xl_mlstm_forward &call, int64_t batch, int64_t head)
        : call(call), K(call.K), V(call.V), L(call.chunk), ldK(pitch(K)), ldV(pitch(V)), ldL(pitch(L)) {
        q = static_cast<const Element *>(call.q) + batch * call.q_strides[0] + head * call.q_strides[2];
        k = static_cast<const Element *>(call.k) + batch * call.k_strides[0] + head * call.k_strides[2];
        v = static_cast<const Element *>(call.v) + batch * call.v_strides[0] + head * call.v_strides[2];
        at = batch * call.H + head;
        row = batch * call.T;
        this->head = head;
        gates.reserve(arena, L);
        arena.reserve(Q, L * ldK), arena.reserve(Key, L * ldK), arena.reserve(KeyT, K * ldL);
        arena.reserve(Val, L * ldV), arena.reserve(S, L * ldL), arena.reserve(Y, L * ldV);
        arena.reserve(C, K * ldV), arena.reserve(n, ldK), arena.reserve(weights, ldL);
        arena.allocate();
    }

    void run() {
        const int64_t KV = K * V;
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(C + x * ldV, call.C + at * KV + x * V, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(n, call.n + at * K, sizeof(float) * static_cast<size_t>(K));
        float m = call.m[at];
        for (int64_t t = 0, index = 0; t < call.T; t += L, ++index) {
            keep(index, m);
            chunk(t, call.T - t < L ? call.T - t : L, m);
            m = gates.m_out;
        }
        keep((call.T + L - 1) / L, m);
        for (int64_t x = 0; x < K; ++x)
            std::memcpy(call.C1 + at * KV + x * V, C + x * ldV, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(call.n1 + at * K, n, sizeof(float) * static_cast<size_t>(K));
        call.m1[at] = m;
    }

  private:
    const xl_mlstm_forward &call;
    const int64_t K, V, L, ldK, ldV, ldL;
    const Element *q, *k, *v;
    int64_t at, row, head;
    Arena arena;
    Gates gates;
    float *Q, *Key, *KeyT, *Val, *S, *Y, *C, *n, *weights;

    void keep(int64_t index, float m) {
        if (call.states == nullptr) return;
        float *to = call.states + (at * ((call.T + L - 1) / L + 1) + index) * K * (V + 1);
        for (int64_t x = 0; x < K; ++x) std::memcpy(to + x * V, C + x * ldV, sizeof(float) * static_cast<size_t>(V));
        std::memcpy(to + K * V, n, sizeof(float) * static_cast<size_t>(K));
        const int64_t chunks = (call.T + L - 1) / L;
        if (index < chunks) call.stabilisers[at * chunks + index] = m;
    }

    void chunk(int64_t t, int64_t l, float m) {
        const int64_t gate_at = (row + t) * call.H + head;
        gates.compute(
            l, call.input_gate, call.i + gate_at, call.f + gate_at, call.H,
            call.reset == nullptr ? nullptr : call.reset + row + t, call.mask == nullptr ? nullptr : call.mask + row + t, m
        );
        read_rows(q + t * call.q_strides[1], call.q_strides[1], gates.exists, l, K, Q, ldK);
        read_rows(k + t * call.k_strides[1], call.k_strides[1], gates.exists, l, K, Key, ldK);
        read_rows(v + t * call.v_strides[1], call.v_strides[1], gates.exists, l, V, Val, ldV);
        transpose(l, K, Key, ldK, KeyT, ldL);
        multiply(l, l, K, {Q, ldK, 1}, KeyT, ldL, S, ldL, 0.0f, true);
        multiply(l, V, K, {Q, ldK, 1}, C, ldV, Y, ldV, 0.0f);

        const float scale = 1.0f / std::sqrt(static_cast<float>(K));
        const bool normalised = call.input_gate != 1;
        Element *h = static_cast<Element *>(call.h) + ((row + t) * call.H + head) * V;
        for (int64_t j = 0; j < l; ++j) {
            gates.weigh(j, padded(l), weights);
            float *scores = S + j * ldL, *sums = Y + j * ldV;
            vf total = {};
            for (int64_t x = 0; x < padded(l); x += W) {
                const vf score = x <= j ? load(scores + x) * (load(weights + x) * scale) : vf{};
                store(scores + x, score);
                total += score;
            }
            const float enter = gates.enter[j] * scale;
            for (int64_t x = 0; x < V; x += W) store(sums + x, load(sums + x) * enter);
            if (normalised) gates.row[j] = sum_of(total) + enter * dot(Q + j * ldK, n, K);  // a_j; the row is used up
        }
        multiply<Inner::UP_TO_ROW>(l, V, l, {S, ldL, 1}, Val, ldV, Y, ldV, 1.0f);
        for (int64_t j = 0; j < l; ++j) {
            float *sums = Y + j * ldV;
            if (normalised) {
                const float a = gates.row[j], size = std::fabs(a), low = gates.floor[j];
                const float d = (size > low || a != a ? size : low) + static_cast<float>(call.eps);
                const float factor = gates.exists[j] ? 1.0f / d : 0.0f;
                for (int64_t x = 0; x < V; x += W) store(sums + x, load(sums + x) * factor);
                if (call.a != nullptr) call.a[(row + t + j) * call.H + head] = a;
            }
            if (!gates.exists[j]) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(V));
            write_row(sums, h + j * call.H * V, V);
        }

        for (int64_t j = 0; j < l; ++j)
            for (int64_t x = 0; x < K; x += W) store(Key + j * ldK + x, load(Key + j * ldK + x) * gates.write[j]);
        multiply(K, V, l, {Key, 1, ldK}, Val, ldV, C, ldV, gates.decay);
        if (!normalised) {
            std::memset(n, 0, sizeof(float) * static_cast<size_t>(K));
            return;
        }
        for (int64_t x = 0; x < K; x += W) {
            vf sum = gates.decay == 0.0f ? vf{} : load(n + x) * gates.decay;
            for (int64_t j = 0; j < l; ++j) sum += load(Key + j * ldK + x);
            store(n + x, sum);
        }
    }
};

template <typename Element>
int sweep(const xl_mlstm_forward &call) {
    const int64_t tasks = call.B * call.H;
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(call.threads)) reduction(max : failed)
    for (int64_t task = 0; task < tasks; ++task) {
        try {
            Forward<Element>(call, task / call.H, task % call.H).run();
        } catch (const std::bad_alloc &) {
            failed = XL_NO_MEMORY;
        }
    }
    return failed;
}

}  // namespace

int mlstm_forward(const xl_mlstm_forward &call) {
    const int64_t borders = (call.T + call.chunk - 1) / call.chunk + 1;
    ask_for_large_pages(
        call.states, sizeof(float) * static_cast<size_t>(call.B * call.H * borders * call.K * (call.V + 1))
    );
    return call.bf16 ? sweep<uint16_t>(call) : sweep<float>(call);
}

}  // namespace XL_ISA
