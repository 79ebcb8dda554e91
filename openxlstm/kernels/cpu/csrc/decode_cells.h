// What a token does to the cells: the gates and the memory of the mLSTM, and the sLSTM (cells/ has the definitions). States
// are updated in place, the memory of the mLSTM in one pass. A task is one head of one row.
#pragma once

#include <cmath>

#include "matrices.h"
#include "team.h"

namespace XL_ISA {

static inline float log_sigmoid(float x) {
    return (x < 0.0f || x != x ? x : 0.0f) - std::log1p(std::exp(-std::fabs(x)));
}

// A gate of every head, an island of fp32: the product of its row with the whole row of numbers, soft-capped or not.
static inline void gate(const Member &on, const xl_operation &op) {
    const int64_t H = op.parts;
    const Share own = on.share(on.call.rows * H, 1);
    for (int64_t task = own.begin; task < own.end; ++task) {
        const int64_t row = task / H, head = task % H;
        const float *x = on.at(op.from, op.from_ld, row), *w = static_cast<const float *>(op.weight) + head * op.width;
        vf sums[4] = {};
        int64_t e = 0;
        for (; e + 4 * W <= op.width; e += 4 * W)
            XL_UNROLL for (int s = 0; s < 4; ++s) sums[s] += load(w + e + s * W) * load(x + e + s * W);
        for (; e < op.width; e += W) {
            const int left = least(op.width - e);
            sums[0] += load_some(w + e, left) * load_some(x + e, left);
        }
        float value = lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if (op.bias != nullptr) value += op.bias[head];
        if (op.scale > 0.0) value = static_cast<float>(op.scale) * std::tanh(value / static_cast<float>(op.scale));
        on.at(op.to, op.to_ld, row)[head] = value;
    }
}

// n and m, and what the memory needs: keep, write, and 1 / d with the query's scale.
static inline void mlstm_gate(const Member &on, const xl_operation &op) {
    const int64_t H = op.parts, K = op.width / H;
    const Share own = on.share(on.call.rows * H, 1);
    const float scale = 1.0f / std::sqrt(static_cast<float>(K));
    for (int64_t task = own.begin; task < own.end; ++task) {
        const int64_t row = task / H, head = task % H;
        const float raw_i = on.at(op.from, op.from_ld, row)[head], raw_f = on.at(op.other, op.other_ld, row)[head];
        const float *q = on.at(op.third, op.third_ld, row) + head * K, *k = on.at(op.fourth, op.fourth_ld, row) + head * K;
        float *n = op.state2 + task * K, *m = op.state3 + task;
        const float log_f = op.exp_forget ? raw_f : log_sigmoid(raw_f), log_i = op.mode == 0 ? raw_i : log_sigmoid(raw_i);
        const float decayed = log_f + *m;
        const float now = op.mode != 0 ? 0.0f : (decayed > log_i || decayed != decayed ? decayed : log_i);
        const float keep = std::exp(decayed - now), write = std::exp(log_i - now);
        *m = now;
        float factor = scale;
        if (op.mode != 1) {
            vf sum = {};
            for (int64_t x = 0; x < K; x += W) {
                const int left = least(K - x);
                const vf next = load_some(n + x, left) * keep + load_some(k + x, left) * write;
                store_some(n + x, next, left);
                sum += next * load_some(q + x, left);
            }
            const float a = lanes(sum) * scale, size = std::fabs(a);
            const float low = std::exp(std::fmin(std::fmax(-now, -80.0f), 80.0f));
            factor = scale / ((size > low || a != a ? size : low) + static_cast<float>(op.eps));
        }
        float *to = on.at(op.to, op.to_ld, row) + 3 * head;
        to[0] = keep, to[1] = write, to[2] = factor;
    }
}

// Some columns of a head's memory: VECTORS full ones, or one of which `left` numbers exist.
template <int VECTORS>
static inline void columns_of_memory(
    float *C, int64_t V, int64_t K, const float *q, const float *k, const float *v, float *h, const float *factors, int left
) {
    vf value[VECTORS], sum[VECTORS] = {};
    const float keep = factors[0];
    XL_UNROLL for (int s = 0; s < VECTORS; ++s) value[s] = load_some(v + s * W, left) * factors[1];
    for (int64_t x = 0; x < K; ++x, C += V)
        XL_UNROLL for (int s = 0; s < VECTORS; ++s) {
            const vf now = load_some(C + s * W, left) * keep + value[s] * k[x];
            sum[s] += now * q[x];
            store_some(C + s * W, now, left);
        }
    XL_UNROLL for (int s = 0; s < VECTORS; ++s) store_some(h + s * W, sum[s] * factors[2], left);
}

// One pass over the memory. Where threads do not keep heads, a task is some columns of one, so that all have work.
static inline void mlstm(const Member &on, const xl_operation &op) {
    const int64_t H = op.parts, K = op.width / H, V = op.out / H;
    const int64_t columns = 4 * W, cuts = (V + columns - 1) / columns;
    const Share own = on.share(on.call.rows * H * cuts, on.keeps_heads(op) ? cuts : 1);
    for (int64_t task = own.begin; task < own.end; ++task) {
        const int64_t head_at = task / cuts, row = head_at / H, head = head_at % H, first = task % cuts * columns;
        const float *factors = on.at(op.fourth, op.fourth_ld, row) + 3 * head;
        const float *q = on.at(op.from, op.from_ld, row) + head * K, *k = on.at(op.other, op.other_ld, row) + head * K;
        const float *v = on.at(op.third, op.third_ld, row) + head * V + first;
        float *h = on.at(op.to, op.to_ld, row) + head * V + first;
        float *C = op.state + head_at * K * V + first;
        int64_t y = 0, count = V - first < columns ? V - first : columns;
        if (count == columns) columns_of_memory<4>(C, V, K, q, k, v, h, factors, W), y = columns;
        if (count - y >= 2 * W) columns_of_memory<2>(C, V, K, q, k, v, h, factors, W), y = 2 * W;
        for (; y < count; y += W) columns_of_memory<1>(C + y, V, K, q, k, v + y, h + y, factors, least(count - y));
    }
}

static inline void slstm(const Member &on, const xl_operation &op) {
    const int64_t H = op.parts, D = op.width, K = D / H;
    const Share own = on.share(on.call.rows * H, 1);
    const float *R = static_cast<const float *>(op.weight);
    for (int64_t task = own.begin; task < own.end; ++task) {
        const int64_t row = task / H, head = task % H;
        float *gates = on.at(op.from, op.from_ld, row);
        float *h = op.state + task * K, *c = op.state2 + task * K, *n = op.state3 + task * K, *m = op.state4 + task * K;
        for (int64_t gate = 0; gate < 4; ++gate)
            for (int64_t e = 0; e < K; e += W) {
                const int left = least(K - e);
                const int64_t place = gate * D + head * K + e;
                vf sum = load_some(gates + place, left) + load_some(op.bias + place, left);
                const float *r = R + head * K * 4 * K + gate * K + e;
                for (int64_t x = 0; x < K; ++x, r += 4 * K) sum += load_some(r, left) * h[x];
                store_some(gates + place, sum, left);
            }
        float *to = on.at(op.to, op.to_ld, row) + head * K;
        for (int64_t e = 0; e < K; e += W) {
            const int left = least(K - e);
            vf raw[4];
            for (int64_t gate = 0; gate < 4; ++gate) raw[gate] = load_some(gates + gate * D + head * K + e, left);
            const vf log_f = op.exp_forget ? raw[1] : at_most(raw[1], 0.0f) - vlog1p(vexp(-absolute(raw[1])));
            const vf before = load_some(n + e, left), decayed = log_f + load_some(m + e, left);
            // Where n is 0 nothing is remembered, and what m holds is ignored.
            const vf now = before == 0.0f ? raw[0] : (decayed > raw[0] ? decayed : raw[0]);
            const vf keep = before == 0.0f ? vf{} : vexp(decayed - now), write = vexp(raw[0] - now);
            const vf cell = load_some(c + e, left) * keep + write * vtanh(raw[2]), weight = before * keep + write;
            const vf out = vsigmoid(raw[3]) * cell / weight;
            store_some(c + e, cell, left), store_some(n + e, weight, left), store_some(m + e, now, left);
            store_some(to + e, out, left);
        }
        std::memcpy(h, to, sizeof(float) * static_cast<size_t>(K));
    }
}

}  // namespace XL_ISA
