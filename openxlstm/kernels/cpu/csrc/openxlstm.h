// The plain C interface of the native kernels: pointers, sizes, strides and a thread count in, an error code out.
//
// Letters: B batch, T time, H heads, K head width (of queries and keys), V width of values. Strides count elements. All tensors are fp32 except those marked
// "any", which are fp32 or bf16 as `bf16` says. Nothing that goes in is written to.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Everything is compiled with hidden visibility; what stands below is what the library shows.
#pragma GCC visibility push(default)

enum { XL_OK = 0, XL_NO_MEMORY = 1, XL_NO_ISA = 2 };

#define XL_VERSION 3  // of this interface: the Python side refuses a library of another

#define XL_TAPE 8  // vectors of K that the forward sweep of the sLSTM keeps for its backward, per step

typedef struct {
    int64_t B, T, H, K;
    int64_t threads;
    int64_t bf16;             // element type of gates, out and dout: 0 fp32, 1 bf16
    int64_t exp_forget;       // 0: sigmoid forget gate, 1: exponential
    int64_t gate_strides[4];  // of gates over B, T, gate, H; the last stride is 1
    const void *gates;        // any [B, T, 4, H, K]
    const float *R;           // [H, K, 4, K] contiguous
    const float *b;           // [4, H, K] contiguous
    const uint8_t *reset;     // [B, T] contiguous, or NULL
    const uint8_t *mask;      // [B, T] contiguous, or NULL
    const float *h0, *c0, *n0, *m0;  // [B, H, K] contiguous
    void *out;                       // any [B, T, H, K] contiguous
    float *h1, *c1, *n1, *m1;        // [B, H, K] contiguous
    float *tape;                     // [H, B, T, XL_TAPE, K] contiguous, or NULL: no backward will follow
} xl_slstm_forward;

typedef struct {
    int64_t B, T, H, K;
    int64_t threads;
    int64_t bf16;              // element type of dout
    const void *dout;          // any [B, T, H, K] contiguous, or NULL
    const float *dh, *dc, *dn; // of the final state, [B, H, K] contiguous, or NULL
    const float *R;            // [H, K, 4, K] contiguous
    const uint8_t *reset, *mask;
    const float *c0, *n0;      // [B, H, K] contiguous
    const float *tape;
    float *draw;               // gradient of the pre-activations, [B, T, 4, H, K] contiguous
    float *dh0, *dc0, *dn0;    // [B, H, K] contiguous
} xl_slstm_backward;

typedef struct {
    int64_t B, H, K, V;
    int64_t threads;
    int64_t bf16;                                        // element type of q, k, v and h
    int64_t q_strides[2], k_strides[2], v_strides[2];    // over B, H; the last stride is 1
    double eps;
    const void *q, *k, *v;                               // any [B, H, K], [B, H, K], [B, H, V]
    const float *i, *f;                                  // [B, H] contiguous
    const uint8_t *reset, *mask;                         // [B], or NULL
    const float *C, *n, *m;                              // [B, H, K, V], [B, H, K], [B, H] contiguous
    void *h;                                             // any [B, H, V] contiguous
    float *C1, *n1, *m1;                                 // the state afterwards; not the one before
} xl_mlstm_step;

int xl_version(void);
// The best instruction set of this machine: 0 the compiler's baseline, 1 AVX2 with FMA and F16C, 2 AVX-512 (F, BW, VL,
// DQ), 3 AVX-512 with BF16 and VNNI.
int xl_best_isa(void);
int xl_run_slstm_forward(int isa, const xl_slstm_forward *call);
int xl_run_slstm_backward(int isa, const xl_slstm_backward *call);
int xl_run_mlstm_step(int isa, const xl_mlstm_step *call);
// name: "exp", "log1p" (0 <= x <= 1), "tanh", "sigmoid"; for the tests of their accuracy.
int xl_run_function(int isa, const char *name, const float *x, float *y, int64_t count);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
