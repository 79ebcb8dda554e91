// Which instruction set serves a call. Each is the same source compiled with its own flags, in a namespace of its own.

#include "openxlstm.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define XL_DECLARE(isa)                                         \
    namespace isa {                                             \
    int slstm_forward(const xl_slstm_forward &);                \
    int slstm_backward(const xl_slstm_backward &);              \
    int mlstm_step(const xl_mlstm_step &);                      \
    int mlstm_forward(const xl_mlstm_forward &);                \
    int mlstm_backward(const xl_mlstm_backward &);              \
    int decode(const xl_decode &);                              \
    int product(const xl_product &);                            \
    int packing(const xl_packing &);                            \
    int project_forward(const xl_project_forward &);            \
    int project_backward(const xl_project_backward &);          \
    int gate_forward(const xl_gate_forward &);                  \
    int gate_backward(const xl_gate_backward &);                \
    int norm_forward(const xl_norm_forward &);                  \
    int norm_backward(const xl_norm_backward &);                \
    int function(const char *, const float *, float *, int64_t); \
    }

XL_DECLARE(xl_baseline)
#if defined(__x86_64__)
XL_DECLARE(xl_avx2)
XL_DECLARE(xl_avx512)
XL_DECLARE(xl_avx512_bf16)
namespace xl_amx {
using namespace xl_avx512_bf16;  // AMX multiplies matrices: only what consists of products is compiled for it
int mlstm_forward(const xl_mlstm_forward &);
int mlstm_backward(const xl_mlstm_backward &);
}
#endif

namespace {

struct Table {
    int (*slstm_forward)(const xl_slstm_forward &);
    int (*slstm_backward)(const xl_slstm_backward &);
    int (*mlstm_step)(const xl_mlstm_step &);
    int (*mlstm_forward)(const xl_mlstm_forward &);
    int (*mlstm_backward)(const xl_mlstm_backward &);
    int (*decode)(const xl_decode &);
    int (*product)(const xl_product &);
    int (*packing)(const xl_packing &);
    int (*project_forward)(const xl_project_forward &);
    int (*project_backward)(const xl_project_backward &);
    int (*gate_forward)(const xl_gate_forward &);
    int (*gate_backward)(const xl_gate_backward &);
    int (*norm_forward)(const xl_norm_forward &);
    int (*norm_backward)(const xl_norm_backward &);
    int (*function)(const char *, const float *, float *, int64_t);
};

#define XL_TABLE(isa) \
    {isa::slstm_forward, isa::slstm_backward, isa::mlstm_step, isa::mlstm_forward, isa::mlstm_backward, isa::decode, \
     isa::product, isa::packing, isa::project_forward, isa::project_backward, isa::gate_forward, isa::gate_backward, \
     isa::norm_forward, isa::norm_backward, isa::function}
const Table tables[] = {
    XL_TABLE(xl_baseline),
#if defined(__x86_64__)
    XL_TABLE(xl_avx2),
    XL_TABLE(xl_avx512),
    XL_TABLE(xl_avx512_bf16),
    XL_TABLE(xl_amx),
#endif
};

const Table *table(int isa) { return isa >= 0 && isa <= xl_best_isa() ? &tables[isa] : nullptr; }

// 0: the processor has no AMX with bf16, 1: it has and we may use it, 2: it has, and the operating system refuses. Tiles are
// 8 KB of state that Linux saves only for processes which have asked; threads and forked children inherit the permission.
int ask_for_amx() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return 0;
#if defined(__linux__) && defined(SYS_arch_prctl)
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? 1 : 2;
#else
    return 2;
#endif
#else
    return 0;
#endif
}

}  // namespace

extern "C" {

int xl_version(void) { return XL_VERSION; }

int xl_has_amx(void) {
    static const int answer = ask_for_amx();
    return answer;
}

int xl_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();  // asks the operating system too whether it saves the wide registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return xl_has_amx() == 1 ? 4 : 3;
    if (avx512) return 2;
    if (avx2) return 1;
#endif
    return 0;
}

int xl_run_slstm_forward(int isa, const xl_slstm_forward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->slstm_forward(*call);
}

int xl_run_slstm_backward(int isa, const xl_slstm_backward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->slstm_backward(*call);
}

int xl_run_mlstm_step(int isa, const xl_mlstm_step *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->mlstm_step(*call);
}

int xl_run_mlstm_forward(int isa, const xl_mlstm_forward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->mlstm_forward(*call);
}

int xl_run_mlstm_backward(int isa, const xl_mlstm_backward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->mlstm_backward(*call);
}

int xl_run_decode(int isa, const xl_decode *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->decode(*call);
}

int xl_run_product(int isa, const xl_product *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->product(*call);
}

int xl_run_packing(int isa, const xl_packing *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->packing(*call);
}

int xl_run_project_forward(int isa, const xl_project_forward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->project_forward(*call);
}

int xl_run_project_backward(int isa, const xl_project_backward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->project_backward(*call);
}

int xl_run_gate_forward(int isa, const xl_gate_forward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->gate_forward(*call);
}

int xl_run_gate_backward(int isa, const xl_gate_backward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->gate_backward(*call);
}

int xl_run_norm_forward(int isa, const xl_norm_forward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->norm_forward(*call);
}

int xl_run_norm_backward(int isa, const xl_norm_backward *call) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->norm_backward(*call);
}

int xl_run_function(int isa, const char *name, const float *x, float *y, int64_t count) {
    const Table *t = table(isa);
    return t == nullptr ? XL_NO_ISA : t->function(name, x, y, count);
}
}
