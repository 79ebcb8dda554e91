// One vector type per instruction set, and the four functions that gates are made of.
//
// Every file that includes this is compiled once per instruction set with its own flags; W is the number of floats in a
// register. GCC's and Clang's vector extensions spell the arithmetic, so one source serves all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(XL_ISA)
#error "XL_ISA names the namespace of this instruction set, XL_LANES the floats in one of its registers"
#endif

// Loops over registers: left to itself the compiler keeps some of them in memory.
#if defined(__clang__)
#define XL_UNROLL _Pragma("unroll")
#else
#define XL_UNROLL _Pragma("GCC unroll 8")
#endif

namespace XL_ISA {

constexpr int W = XL_LANES;
constexpr int ROWS = W == 16 ? 6 : 3;  // rows of a register block: 4 accumulators each, of 32 registers or of 16

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

#if XL_LANES == 16
constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif XL_LANES == 8
constexpr vi LANES = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr vi LANES = {0, 1, 2, 3};
#endif

static inline vf load(const float *p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }

static inline vf all(float x) { return x - vf{}; }

static inline vf bits_as_float(vi v) {
    vf out;
    std::memcpy(&out, &v, sizeof out);
    return out;
}

static inline vi bits_as_int(vf v) {
    vi out;
    std::memcpy(&out, &v, sizeof out);
    return out;
}

static inline vf absolute(vf x) { return bits_as_float(bits_as_int(x) & 0x7fffffff); }

// A NaN comes through: a comparison with it is false, so it must stand where "false" leads.
static inline vf at_least(vf x, float low) { return x < low ? all(low) : x; }
static inline vf at_most(vf x, float high) { return x > high ? all(high) : x; }

// exp(x) = 2^n (1 + p), n an integer and p = exp(r) - 1 for |r| <= ln(2)/2, accurate relative to p.
struct Split {
    vf scale;  // 2^n; 0 below the smallest normal number
    vf p;
};

static inline Split split_exp(vf x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    x = at_most(at_least(x, -88.0f), 88.0f);
    vf shifted = x * 1.44269504f + shift;
    vf n = shifted - shift;
    vf r = x - n * 0.693145752f;  // ln 2 in two parts: the first has few bits, so that n times it is exact
    r = r - n * 1.42860677e-6f;
    vf q = r * (1.0f / 5040) + 1.0f / 720;
    q = q * r + 1.0f / 120;
    q = q * r + 1.0f / 24;
    q = q * r + 1.0f / 6;
    q = q * r + 0.5f;
    vi exponent = bits_as_int(shifted) - bits_as_int(all(shift)) + 127;
    return {bits_as_float(exponent << 23), q * (r * r) + r};
}

static inline vf vexp(vf x) {
    Split e = split_exp(x);
    return e.scale * e.p + e.scale;
}

// log(1 + u) for 0 <= u <= 1, as 2 artanh(u / (2 + u)).
static inline vf vlog1p(vf u) {
    vf s = u / (u + 2.0f), t = s * s;
    vf p = t * (1.0f / 17) + 1.0f / 15;
    p = p * t + 1.0f / 13;
    p = p * t + 1.0f / 11;
    p = p * t + 1.0f / 9;
    p = p * t + 1.0f / 7;
    p = p * t + 1.0f / 5;
    p = p * t + 1.0f / 3;
    return 2.0f * (s + s * t * p);
}

static inline vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// tanh|x| = -e / (2 + e), e = exp(-2|x|) - 1, which is accurate where e is small.
static inline vf vtanh(vf x) {
    Split s = split_exp(-2.0f * absolute(x));
    vf e = s.scale * s.p + (s.scale - 1.0f);
    vf positive = -e / (2.0f + e);
    return bits_as_float(bits_as_int(positive) | (bits_as_int(x) & INT32_MIN));
}

// Rows of fp32 or bf16 numbers, the second widened by moving its bits: bf16 is the upper half of a float.
static inline float from_bf16(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

static inline uint16_t to_bf16(float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vf load_some(const float *p, int count) {
    if (count >= W) return load(p);
    float row[W] = {};
    std::memcpy(row, p, sizeof(float) * static_cast<size_t>(count));
    return load(row);
}

static inline void store_some(float *p, vf v, int count) {
    if (count >= W) {
        store(p, v);
        return;
    }
    float row[W];
    store(row, v);
    std::memcpy(p, row, sizeof(float) * static_cast<size_t>(count));
}

typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf load(const uint16_t *p) {
    vh v;
    std::memcpy(&v, p, sizeof v);
    return bits_as_float(__builtin_convertvector(v, vi) << 16);
}

static inline void store(uint16_t *p, vf x) {  // as to_bf16 rounds
    const vi bits = bits_as_int(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vh v = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, vh);
    std::memcpy(p, &v, sizeof v);
}

static inline vf load_some(const uint16_t *p, int count) {
    if (count >= W) return load(p);
    float row[W] = {};
    for (int e = 0; e < (count < W ? count : W); ++e) row[e] = from_bf16(p[e]);
    return load(row);
}

static inline void store_some(uint16_t *p, vf v, int count) {
    if (count >= W) {
        store(p, v);
        return;
    }
    float row[W];
    store(row, v);
    for (int e = 0; e < (count < W ? count : W); ++e) p[e] = to_bf16(row[e]);
}

}  // namespace XL_ISA
