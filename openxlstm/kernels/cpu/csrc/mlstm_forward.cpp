// The forward sweep of the mLSTM with products of fp32 numbers, whatever the dtype of q, k, v and h; see mlstm_forward.h.

#include "mlstm_forward.h"

#if defined(__AMX_BF16__)
#include "mlstm_forward_amx.h"
#endif

namespace XL_ISA {
namespace {

template <typename Element>
class Forward final : public ForwardSweep<Element> {
  public:
    explicit Forward(const xl_mlstm_forward &call)
        : ForwardSweep<Element>(call), ldK(pitch(K)), ldV(pitch(V)), ldL(pitch(L)) {
        arena.reserve(Q, L * ldK), arena.reserve(Key, L * ldK), arena.reserve(KeyT, K * ldL);
        arena.reserve(Val, L * ldV), arena.reserve(S, L * ldL), arena.reserve(Y, L * ldV);
        arena.reserve(weights, ldL);
        arena.allocate();
    }

  private:
    using Base = ForwardSweep<Element>;
    using Base::ahead, Base::arena, Base::C, Base::call, Base::gates, Base::head, Base::K, Base::k, Base::L, Base::ldC, Base::n, Base::next;
    using Base::normalised, Base::q, Base::row, Base::scale, Base::V, Base::v;
    const int64_t ldK, ldV, ldL;
    float *Q, *Key, *KeyT, *Val, *S, *Y, *weights;

    void chunk(int64_t t, int64_t l) override {
        for (int64_t j = 0; j < l; j += W) read(t, j, l - j < W ? l - j : W);
        multiply_triangle(l, K, {Q, ldK, 1}, KeyT, ldL, S, ldL, ahead);
        for (int64_t j = 0; j < l; ++j) {
            gates.weigh(j, padded(l), weights);
            float *scores = S + j * ldL;
            vf total = {};
            for (int64_t x = 0; x < padded(l); x += W) {
                const vf score = gates.stand(j, x) ? load(scores + x) * (load(weights + x) * scale) : vf{};
                store(scores + x, score);
                total += score;
            }
            gates.enter[j] *= scale;
            if (normalised) gates.row[j] = sum_of(total) + gates.enter[j] * dot(Q + j * ldK, n, K);  // a_j; the row is used up
        }
        multiply(l, V, K, {Q, ldK, 1}, C, ldC, Y, ldV, NOTHING, ahead);
        multiply<Inner::UP_TO_ROW>(l, V, l, {S, ldL, 1}, Val, ldV, Y, ldV, {gates.enter, 1}, ahead);
        Element *h = static_cast<Element *>(call.h) + ((row + t) * call.H + head) * V;
        for (int64_t j = 0; j < l; ++j, h += call.H * V) {
            const float factor = this->divide(t, j, gates.row[j]);
            if (gates.exists[j]) write_row(Y + j * ldV, h, V, factor);
            else std::memset(h, 0, sizeof(Element) * static_cast<size_t>(V));
        }

        for (int64_t j = 0; j < l; ++j)
            for (int64_t x = 0; x < K; x += W) store(Key + j * ldK + x, load(Key + j * ldK + x) * gates.write[j]);
        multiply(K, V, l, {Key, 1, ldK}, Val, ldV, C, next, ldC, {&gates.decay, 0}, ahead);
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

    void read(int64_t t, int64_t j, int64_t count) {  // rows j and those behind it, turned while they are near
        const uint8_t *exists = gates.exists + j;
        t += j;
        read_rows(q + t * call.q_strides[1], call.q_strides[1], exists, count, K, Q + j * ldK, ldK);
        read_rows(k + t * call.k_strides[1], call.k_strides[1], exists, count, K, Key + j * ldK, ldK);
        transpose(count, K, Key + j * ldK, ldK, KeyT + j, ldL);
        read_rows(v + t * call.v_strides[1], call.v_strides[1], exists, count, V, Val + j * ldV, ldV);
    }
};

template <typename Task>
int sweep(const xl_mlstm_forward &call) {
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

int mlstm_forward(const xl_mlstm_forward &call) {
    const int64_t borders = (call.T + call.chunk - 1) / call.chunk + 1;
    ask_for_large_pages(
        call.states, sizeof(float) * static_cast<size_t>(call.B * call.H * borders * XL_SLOT(call.K, call.V))
    );
#if defined(__AMX_BF16__)
    if (call.bf16) return sweep<ForwardTiles>(call);
#endif
    return call.bf16 ? sweep<Forward<uint16_t>>(call) : sweep<Forward<float>>(call);
}

}  // namespace XL_ISA
