// The plain C interface of the native kernels: pointers, sizes, strides and a thread count in, an error code out.
//
// Letters: B batch, T time, H heads, K head width (of queries and keys), V width of values. Strides count elements. All
// tensors are fp32 except those marked "any", which are fp32 or bf16 as `bf16` says. Nothing that goes in is written to.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Everything is compiled with hidden visibility; what stands below is what the library shows.
#pragma GCC visibility push(default)

enum { XL_OK = 0, XL_NO_MEMORY = 1, XL_NO_ISA = 2, XL_BAD_TOKEN = 3 };

#define XL_VERSION 7  // of this interface: the Python side refuses a library of another

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

typedef struct {
    int64_t B, T, H, K, V;
    int64_t threads;
    int64_t bf16;                                      // element type of q, k, v and h
    int64_t input_gate;                                // 0 exponential, 1 sigmoid, 2 sigmoid with normaliser
    int64_t chunk;                                     // steps at a time, 1 .. XL_CHUNK
    int64_t q_strides[3], k_strides[3], v_strides[3];  // over B, T, H; the last stride is 1
    double eps;
    const void *q, *k, *v;                             // any [B, T, H, K], [B, T, H, K], [B, T, H, V]
    const float *i, *f;                                // [B, T, H] contiguous
    const uint8_t *reset, *mask;                       // [B, T] contiguous, or NULL
    const float *C, *n, *m;                            // [B, H, K, V], [B, H, K], [B, H] contiguous
    void *h;                                           // any [B, T, H, V] contiguous
    float *C1, *n1, *m1;                               // the state afterwards; not the one before
    float *a;            // [B, T, H], the query's product with n; with the next two NULL if no backward will follow
    float *states;       // [B, H, chunks + 1, XL_SLOT(K, V)]: the state at every border of chunks
    float *stabilisers;  // [B, H, chunks]: m at the beginning of each
} xl_mlstm_forward;

typedef struct {
    int64_t B, T, H, K, V;
    int64_t threads;
    int64_t bf16;
    int64_t input_gate;
    int64_t chunk;
    int64_t q_strides[3], k_strides[3], v_strides[3];
    double eps;
    const void *dh;                                    // any [B, T, H, V] contiguous, or NULL
    const float *dC, *dn;                              // of the final state, contiguous, or NULL
    const void *q, *k, *v;
    const float *i, *f;
    const uint8_t *reset, *mask;
    const float *a, *states, *stabilisers;
    void *dq, *dk, *dv;                                // any, contiguous
    float *di, *df;                                    // [B, T, H] contiguous
    float *dC0, *dn0;                                  // [B, H, K, V], [B, H, K] contiguous
} xl_mlstm_backward;

// One token through a whole model: a list of operations on rows of fp32 numbers in a working memory. Rows of an operand
// begin at its offset and are `ld` numbers apart; offset -1 - x is x in the memory that every thread has for itself. A thread
// does a share of every operation: columns in multiples of `grain` of all rows or, with `parts`, whole heads of rows.
// Operations that are divided alike need no barrier between them.
enum {
    XL_EMBED,      // to = row of `weight` that the token names
    XL_NORM,       // to = norm(from) * weight (add: + other); mode 0 layer norm, 1 rms; without parts by every thread for itself
    XL_LINEAR,     // to = weight [out, width] from + bias (+ to)
    XL_HEADWISE,   // to = `heads` blocks of a diagonal from + bias; weight [width / heads, width], a row for a place in a block
    XL_CONV,       // to = silu(causal convolution of from with weight [taps, width] + bias); state [taps - 1, width]
    XL_SOFT_CAP,   // to = scale * tanh(to / scale)
    XL_GATE,       // to = weight [parts, width] from + bias, soft-capped if scale > 0
    XL_MLSTM_GATE, // from = i, other = f, third = q, fourth = k; state2 = n, state3 = m; to = 3 factors a head; mode 0-2 gate
    XL_MLSTM,      // from = q, other = k, third = v, fourth = the factors; state = C; to = h
    XL_SLSTM,      // from = gates [4, heads, K]; weight = R, bias = b; state .. state4 = h, c, n, m; to = h
    XL_GATED,      // to = (from + weight * other) * silu(third)
    XL_SIGMOID,    // to = from * sigmoid(other)
    XL_SWIGLU,     // to = silu(from) * other
    XL_GEGLU,      // to = gelu(from) * other
};

// How a matrix is stored: ggml's blocks, or those of 16 rows side by side, which csrc/bytes.h describes.
enum { XL_F32, XL_BF16, XL_Q8_0, XL_Q4_0, XL_Q4_1, XL_Q8_0_PACKED, XL_Q4_0_PACKED };

// Who must have come this far before the next operation begins. Threads keep the heads that they began with if that gives
// all of them about as many.
enum { XL_NOBODY, XL_EVERYONE, XL_UNLESS_HEADS_ARE_KEPT };

typedef struct {
    int64_t kind, barrier;
    int64_t width, out, heads, taps;  // numbers in, numbers out of a row, blocks, taps of a convolution
    int64_t grain, parts, steal;  // steal: of a LINEAR whose result everyone waits for, a number from 1 on; 0: rows stay in a share
    int64_t mode, add, format, exp_forget;                  // add: 1 adds to what stands at `to`
    int64_t from, other, third, fourth, to;                 // offsets into the working memory
    int64_t from_ld, other_ld, third_ld, fourth_ld, to_ld;  // numbers between rows
    const void *weight;               // EMBED, LINEAR: as `format` says; else fp32
    const float *bias;                // or NULL
    float *state, *state2, *state3, *state4;  // [rows, ...] contiguous, written to
    double eps, scale;
} xl_operation;

typedef struct {
    int64_t rows, threads, count, vocabulary;
    int64_t steals;         // the highest `steal`; the first operation ends with a barrier if there is one
    int64_t own, scratch;   // numbers that a thread has for itself, and where in them it has `rows` times the widest row
    const xl_operation *operations;
    const int64_t *tokens;  // [rows]
    float *memory;          // zeroed by the caller before the first step
    float *own_memory;      // [threads, own]
} xl_decode;

// out = x weight^T for any number of rows, with the same products as a token has.
typedef struct {
    int64_t rows, width, out, format, threads;
    int64_t x_ld, out_ld, scratch;  // numbers between rows, and those that a thread works in, XL_ROWS_TOGETHER widths
    const float *x;
    const void *weight;
    float *result, *scratch_memory;  // [threads, scratch]
} xl_product;

#define XL_ROWS_TOGETHER 64  // rows of x that pass a matrix together

// Rows of ggml's blocks, 16 of them side by side.
typedef struct {
    int64_t rows, row_bytes, format, threads;  // format: of `from`, XL_Q8_0 or XL_Q4_0
    const uint8_t *from;
    uint8_t *to;  // [ceil(rows / 16), 16 row_bytes]
} xl_packing;

// What stands before the cell of a block: c = silu(convolution of x over time), and unless `maps` is NULL q, k, v by
// block-diagonal maps of width 4 (from c, c, x) and `raw`, the gates' projections of the three. U channels, J taps, the
// newest last; `past` and `last` are the J-1 inputs before and after, oldest first. Where no step exists, c, q, k, v are 0.
typedef struct {
    int64_t B, T, U, J, G;     // G: gate projections, 0 for none; with maps U is a multiple of 4
    int64_t threads;
    int64_t bf16;
    int64_t x_strides[2];      // over B and T; the last stride is 1
    const void *x;             // any [B, T, U]
    const float *w, *b;        // [U, J], [U]
    const float *maps[3];      // [U / 4, 4 (to), 4 (from)], or NULL all three
    const float *gate_w, *gate_b;  // [G, 3, U], [G]
    const float *past;         // [B, J-1, U]
    const uint8_t *reset, *mask;   // [B, T], or NULL
    void *c, *out[3];          // any [B, T, U]
    float *raw;                // [B, T, G]
    float *last;               // [B, J-1, U]
} xl_project_forward;

typedef struct {
    int64_t B, T, U, J, G;
    int64_t threads;
    int64_t bf16;
    int64_t x_strides[2];
    const void *x;
    const float *w, *b, *maps[3], *gate_w, *past;
    const uint8_t *reset, *mask;
    const void *c, *out[3];    // as forward wrote them; not read without maps
    const void *dc, *dout[3];  // any [B, T, U], or NULL
    const float *draw;         // [B, T, G]
    const float *dlast;        // [B, J-1, U], or NULL
    void *dx;                  // any [B, T, U]
    float *dw, *db, *dmaps[3], *dgate_w, *dgate_b, *dpast;
} xl_project_backward;

// What stands behind the cell of an m block: y = (norm(h) weight + skip c) silu(z), the norm over each head by itself.
typedef struct {
    int64_t rows, H, V;
    int64_t threads;
    int64_t bf16;
    int64_t z_stride;          // between rows
    double eps;
    const void *h, *c, *z;     // any [rows, H V]
    const float *weight, *skip;  // [H V]
    void *y;                   // any [rows, H V]
} xl_gate_forward;

typedef struct {
    int64_t rows, H, V;
    int64_t threads;
    int64_t bf16;
    int64_t z_stride;
    double eps;
    const void *dy, *h, *c, *z;
    const float *weight, *skip;
    void *dh, *dc, *dz;        // any [rows, H V]
    float *dweight, *dskip;
} xl_gate_backward;

// LayerNorm with a weight and without a bias, from one element type to another.
typedef struct {
    int64_t rows, D;
    int64_t threads;
    int64_t x_bf16, y_bf16;    // element types of x and dx, of y and dy
    double eps;
    const void *x;             // [rows, D]
    const float *weight;
    void *y;
} xl_norm_forward;

typedef struct {
    int64_t rows, D;
    int64_t threads;
    int64_t x_bf16, y_bf16;
    double eps;
    const void *dy, *x;
    const float *weight;
    void *dx;
    float *dweight;
} xl_norm_backward;

#define XL_CHUNK 256  // the longest chunk of the mLSTM

// A state as it is kept: C with its rows XL_PITCH(V) apart, and n behind its XL_ROWS(K) rows. Both are rounded up to whole
// tiles, and rows are not a power of two apart: they would share a few sets of the cache.
#define XL_ROWS(K) (((K) + 31) / 32 * 32)
#define XL_PITCH(V) (((V) + 31) / 32 * 32 + 16)
#define XL_SLOT(K, V) (XL_ROWS(K) * (XL_PITCH(V) + 1))

int xl_version(void);
// The best instruction set of this machine: 0 the compiler's baseline, 1 AVX2 with FMA and F16C, 2 AVX-512 (F, BW, VL,
// DQ), 3 AVX-512 with BF16 and VNNI, 4 the same and AMX with BF16.
int xl_best_isa(void);
int xl_has_amx(void);  // 0 the processor has none, 1 it is in use, 2 the operating system does not grant it
int xl_run_slstm_forward(int isa, const xl_slstm_forward *call);
int xl_run_slstm_backward(int isa, const xl_slstm_backward *call);
int xl_run_mlstm_step(int isa, const xl_mlstm_step *call);
int xl_run_mlstm_forward(int isa, const xl_mlstm_forward *call);
int xl_run_mlstm_backward(int isa, const xl_mlstm_backward *call);
int xl_run_decode(int isa, const xl_decode *call);
int xl_run_product(int isa, const xl_product *call);
int xl_run_packing(int isa, const xl_packing *call);
int xl_run_project_forward(int isa, const xl_project_forward *call);
int xl_run_project_backward(int isa, const xl_project_backward *call);
int xl_run_gate_forward(int isa, const xl_gate_forward *call);
int xl_run_gate_backward(int isa, const xl_gate_backward *call);
int xl_run_norm_forward(int isa, const xl_norm_forward *call);
int xl_run_norm_backward(int isa, const xl_norm_backward *call);
// name: "exp", "log1p" (0 <= x <= 1), "tanh", "sigmoid"; for the tests of their accuracy.
int xl_run_function(int isa, const char *name, const float *x, float *y, int64_t count);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
