// Decode codecs `int8` and `int4`, row by row.

#include "quantized.h"

#include "row_blocks.h"

namespace endor {
bool scales_are_valid(const uint16_t* scales, int64_t count) {
    constexpr uint16_t kSmallest = 0x0080, kInfinity = 0x7F80;
    bool wrong = false;
    for (int64_t i = 0; i < count; ++i) {
        const auto above = static_cast<uint16_t>(scales[i] - kSmallest);
        wrong |= (above >= kInfinity - kSmallest) & (scales[i] != 0);
    }
    return !wrong;
}

int64_t decode_quantized_block(const void* context, const Block& block) {
    const auto& job = *static_cast<const QuantizedDecodeJob*>(context);
    const Shape& shape = job.mask.shape;
    const int64_t groups = (shape.cols + job.group_columns - 1) / job.group_columns;
    const int64_t row_bytes = shape.cols << job.mask.size_log2;
    const uint8_t* const codes_end = job.codes + (job.int4 ? (job.mask.nnz + 1) / 2 : job.mask.nnz);
    const auto decode = job.kernels->decode[job.int4][job.type];
    if (!scales_are_valid(job.scales + block.first_row * groups, block.rows * groups)) return kBadRecord;
    int64_t first = block.start;
    for (int64_t i = 0; i < block.rows; ++i) {
        uint8_t* const out = block.out + i * row_bytes;
        // Non-temporal stores exist for whole aligned vectors only.
        const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0;
        first += decode({block.bitmap ? block.bitmap + i * shape.words_per_row() * 8 : nullptr, job.codes, codes_end,
                         first, job.codebook, job.scales + (block.first_row + i) * groups,
                         job.group_columns / kWordBits, shape.cols, out, job.mask.streaming && aligned});
    }
    return -1;
}

int64_t decode_quantized(const QuantizedDecodeJob& job, int threads) {
    return decode_blocks(job.mask, threads, decode_quantized_block, &job);
}

}  // namespace endor
