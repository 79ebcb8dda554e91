// A product of many rows with one matrix in blocks, and the packing of such a matrix: what a quantised layer is made of when
// it stands alone.

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "linear.h"
#include "openxlstm.h"

namespace XL_ISA {

int product(const xl_product &call) {
    const Matrix matrix = {static_cast<const uint8_t *>(call.weight), call.format, call.width, call.out};
    const int64_t grain = matrix.grain(), grains = (call.out + grain - 1) / grain;
    const int threads = static_cast<int>(call.threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
        const int64_t thread = 0, count = 1;
#endif
        const int64_t begin = grains * thread / count * grain, last = grains * (thread + 1) / count * grain;
        const int64_t end = last < call.out ? last : call.out;
        const Walk walk(matrix, begin, end);
        Product own;
        own.bind(call.scratch_memory + thread * call.scratch);
        for (int64_t row = 0; row < call.rows; row += XL_ROWS_TOGETHER) {
            const int64_t rows = call.rows - row < XL_ROWS_TOGETHER ? call.rows - row : XL_ROWS_TOGETHER;
            const Results to = {call.result + row * call.out_ld, call.out_ld, nullptr, false};
            own.run(walk, call.x + row * call.x_ld, call.x_ld, rows, walk, to);
        }
    }
    return XL_OK;
}

int packing(const xl_packing &call) {
    const int64_t groups = (call.rows + GROUP - 1) / GROUP;
    const int threads = static_cast<int>(call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * GROUP, rows = call.rows - first < GROUP ? call.rows - first : GROUP;
        const uint8_t *from = call.from + first * call.row_bytes;
        uint8_t *to = call.to + first * call.row_bytes;
        if (call.format == XL_Q8_0) {
            pack_group<Q8_0>(from, call.row_bytes, call.row_bytes / Q8_0::SIZE, rows, to);
        } else {
            pack_group<Q4_0>(from, call.row_bytes, call.row_bytes / Q4_0::SIZE, rows, to);
        }
    }
    return XL_OK;
}

}  // namespace XL_ISA
