// The backward sweep of the mLSTM with products of fp32 numbers, whatever the dtype of q, k, v and h; see mlstm_backward.h.

#include "mlstm_backward.h"

#if defined(__AMX_BF16__)
#include "mlstm_backward_amx.h"
#endif

namespace XL_ISA {
namespace {

template <typename Element>
class Backward final : public BackwardSweep<Element> {
  public:
    explicit Backward(const xl_mlstm_backward &call)
        : BackwardSweep<Element>(call, pitch(call.V)), ldK(pitch(K)), ldL(pitch(L)) {
        for (float **array : {&Q, &Key, &dQ, &dK}) arena.reserve(*array, L * ldK);
        for (float **array : {&Val, &U, &dV}) arena.reserve(*array, L * ldV);
        for (float **array : {&S, &dP}) arena.reserve(*array, L * ldL);
        for (float **array : {&CT, &GCT}) arena.reserve(*array, V * ldK);
        arena.reserve(KeyT, K * ldL), arena.reserve(ValT, V * ldL);
        for (float **array : {&weights, &da, &enter}) arena.reserve(*array, ldL);
        arena.allocate();
    }

  private:
    using Base = BackwardSweep<Element>;
    using Base::ahead, Base::arena, Base::arrives, Base::call, Base::GC, Base::gates, Base::Gn, Base::head, Base::K, Base::k, Base::L;
    using Base::ldC, Base::ldV, Base::n, Base::normalised, Base::q, Base::row, Base::scale, Base::state, Base::V, Base::v;
    const int64_t ldK, ldL;
    float *Q, *Key, *KeyT, *Val, *ValT, *U, *S, *dP, *dQ, *dK, *dV, *CT, *GCT, *weights, *da, *enter;

    void chunk(int64_t index, int64_t t, int64_t l) override {
        for (int64_t j = 0; j < l; ++j) enter[j] = gates.enter[j] * scale;
        for (int64_t j = 0; j < l; j += W) read(t, j, l - j < W ? l - j : W);
        const float rho = arrives ? across(state(index + 1)) : 0.0f;  // before GC and Gn move on

        multiply_triangle(l, K, {Q, ldK, 1}, KeyT, ldL, S, ldL, ahead);
        multiply_triangle(l, V, {U, ldV, 1}, ValT, ldL, dP, ldL, ahead);
        transpose(K, V, state(index), ldC, CT, ldK);
        multiply(l, K, V, {U, ldV, 1}, CT, ldK, dQ, ldK, NOTHING, ahead);
        for (int64_t j = 0; j < l; ++j) scores(j, l, t);
        multiply<Inner::UP_TO_ROW>(l, K, l, {dP, ldL, 1}, Key, ldK, dQ, ldK, {enter, 1}, ahead);
        if (arrives) {
            transpose(K, V, GC, ldV, GCT, ldK);
            multiply(l, K, V, {Val, ldV, 1}, GCT, ldK, dK, ldK, NOTHING, ahead);
            multiply(l, V, K, {Key, ldK, 1}, GC, ldV, dV, ldV, NOTHING, ahead);
        }
        const Keep behind = arrives ? Keep{gates.write, 1} : NOTHING;
        multiply<Inner::FROM_ROW>(l, K, l, {dP, 1, ldL}, Q, ldK, dK, ldK, behind, ahead);
        multiply<Inner::FROM_ROW>(l, V, l, {S, 1, ldL}, U, ldV, dV, ldV, behind, ahead);
        write(t, l, rho);

        for (int64_t j = 0; j < l; ++j)
            for (int64_t x = 0; x < K; x += W) store(Q + j * ldK + x, load(Q + j * ldK + x) * enter[j]);
        multiply(K, V, l, {Q, 1, ldK}, U, ldV, GC, ldV, arrives ? Keep{&gates.decay, 0} : NOTHING, ahead);
        for (int64_t x = 0; x < K; x += W) {
            vf sum = arrives ? load(Gn + x) * gates.decay : vf{};
            for (int64_t j = 0; j < l; ++j) sum += load(Q + j * ldK + x) * da[j];
            store(Gn + x, sum);
        }
    }

    void read(int64_t t, int64_t j, int64_t count) {  // rows j and those behind it, turned while they are near
        const uint8_t *exists = gates.exists + j;
        const int64_t at = t + j;
        read_rows(q + at * call.q_strides[1], call.q_strides[1], exists, count, K, Q + j * ldK, ldK);
        read_rows(k + at * call.k_strides[1], call.k_strides[1], exists, count, K, Key + j * ldK, ldK);
        transpose(count, K, Key + j * ldK, ldK, KeyT + j, ldL);
        read_rows(v + at * call.v_strides[1], call.v_strides[1], exists, count, V, Val + j * ldV, ldV);
        transpose(count, V, Val + j * ldV, ldV, ValT + j, ldL);
        float *u = U + j * ldV;
        if (call.dh == nullptr) std::memset(u, 0, sizeof(float) * static_cast<size_t>(count * ldV));
        else read_rows(this->cotangent(at), call.H * V, exists, count, V, u, ldV);
        if (!normalised) return;
        for (int64_t r = 0; r < count; ++r, u += ldV) {
            const float factor = 1.0f / this->denominator(t, j + r);
            for (int64_t x = 0; x < V; x += W) store(u + x, load(u + x) * factor);
        }
    }

    float across(const float *after) const {  // <GC, C'> + Gn . n'
        vf sums[4] = {};
        float rest = 0.0f;
        for (int64_t x = 0; x < K; ++x) {
            const float *G = GC + x * ldV, *C = after + x * ldC;
            int64_t y = 0;
            for (; y + 4 * W <= V; y += 4 * W)
                XL_UNROLL for (int s = 0; s < 4; ++s) sums[s] += load(G + y + s * W) * load(C + y + s * W);
            for (; y < V; ++y) rest += G[y] * C[y];
            rest += Gn[x] * after[XL_ROWS(K) * ldC + x];
        }
        return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }

    // Row j: S and dP from products to what stands above, and da_j.
    void scores(int64_t j, int64_t l, int64_t t) {
        gates.weigh(j, padded(l), weights);
        float *score = S + j * ldL, *gradient = dP + j * ldL;
        vf total = {};
        for (int64_t x = 0; x <= j; x += W) {
            const vi stand = gates.stand(j, x);
            const vf s = stand ? load(score + x) * (load(weights + x) * scale) : vf{};
            const vf g = stand ? load(gradient + x) : vf{};
            store(score + x, s), store(gradient + x, g);
            total += s * g;
        }
        const float past = normalised ? enter[j] * dot(Q + j * ldK, dQ + j * ldK, K) : 0.0f;
        da[j] = this->slope(t, j, sum_of(total) + past);
        for (int64_t x = 0; x < padded(l); x += W) {
            if (x > j) {
                store(score + x, vf{}), store(gradient + x, vf{});
            } else {
                store(gradient + x, (load(gradient + x) + da[j]) * (load(weights + x) * scale));
            }
        }
    }

    // The chunk's gradients go out; those of the gates are made of the unrounded rows.
    void write(int64_t t, int64_t l, float rho) {
        float rest = rho;
        for (int64_t j = l - 1; j >= 0; --j) {
            const int64_t to = (row + t + j) * call.H + head;
            float q_dq = 0.0f, k_dk = 0.0f;
            if (gates.exists[j]) {
                q_dq = with(dQ + j * ldK, n, enter[j] * da[j], Q + j * ldK);
                k_dk = with(dK + j * ldK, Gn, arrives ? gates.write[j] : 0.0f, Key + j * ldK);
            } else {
                std::memset(dQ + j * ldK, 0, sizeof(float) * static_cast<size_t>(K));
                std::memset(dK + j * ldK, 0, sizeof(float) * static_cast<size_t>(K));
                std::memset(dV + j * ldV, 0, sizeof(float) * static_cast<size_t>(V));
            }
            this->gate_gradients(t, j, q_dq - k_dk, k_dk, rest);
            write_row(dQ + j * ldK, static_cast<Element *>(call.dq) + to * K, K);
            write_row(dK + j * ldK, static_cast<Element *>(call.dk) + to * K, K);
            write_row(dV + j * ldV, static_cast<Element *>(call.dv) + to * V, V);
        }
    }

    float with(float *gradient, const float *more, float weight, const float *x) const {  // what n gives, and the product with x
        vf sum = {};
        for (int64_t e = 0; e < K; e += W) {
            const vf whole = load(gradient + e) + load(more + e) * weight;
            store(gradient + e, whole);
            sum += whole * load(x + e);
        }
        return sum_of(sum);
    }
};

template <typename Task>
int sweep(const xl_mlstm_backward &call) {
    const int64_t tasks = call.B * call.H;
    const int threads = static_cast<int>(call.threads < tasks ? call.threads : tasks);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(max : failed)
    {
        std::optional<Task> task;
        try {
            task.emplace(call);
        } catch (const std::bad_alloc &) {
            failed = XL_NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (int64_t at = 0; at < tasks; ++at)
            if (task) task->run(at / call.H, at % call.H);
    }
    return failed;
}

}  // namespace

int mlstm_backward(const xl_mlstm_backward &call) {
#if defined(__AMX_BF16__)
    if (call.bf16) return sweep<BackwardTiles>(call);
#endif
    return call.bf16 ? sweep<Backward<uint16_t>>(call) : sweep<Backward<float>>(call);
}

}  // namespace XL_ISA
