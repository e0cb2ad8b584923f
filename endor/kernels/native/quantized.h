// Codecs `int8` and `int4`: integers times a scale per run of columns. docs/format.md is normative.
//
// A product is exact in float32 (8 bits times 8 bits) and then rounded once, to nearest even, to the tensor's type: the
// same bits on every machine.

#pragma once

#include <cstdint>
#include <cstring>

#include "bitmap.h"
#include "row_blocks.h"

namespace endor {

enum FloatType { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

inline float bfloat16_scale(uint16_t scale) {
    const uint32_t bits = static_cast<uint32_t>(scale) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// One row, and where its codes are.
struct QuantizedRow {
    const uint8_t* bitmap;  // null under mask `dense`
    const uint8_t* codes;   // of the whole tensor
    const uint8_t* codes_end;
    int64_t first;  // number of the row's first value
    const int8_t* codebook;  // int4: 16 integers
    const uint16_t* scales;  // bfloat16
    int64_t group_words;
    int64_t cols;
    uint8_t* out;
    bool streaming;
};

// The loops of one instruction set: [int4][FloatType]. Return the number of values of the row.
struct QuantizedKernels {
    int64_t (*decode[2][3])(const QuantizedRow& row);
};

const QuantizedKernels* avx512_quantized_kernels();
const QuantizedKernels* avx2_quantized_kernels();
const QuantizedKernels* scalar_quantized_kernels();

// Whether all are zero, or positive, finite and normal. A product with anything else depends on how a machine treats
// subnormals and NaN, and a pruned element would not be zero.
bool scales_are_valid(const uint16_t* scales, int64_t count);

struct QuantizedDecodeJob {
    DecodeJob mask;  // without values
    const QuantizedKernels* kernels;
    bool int4;
    FloatType type;
    const uint8_t* codes;
    const int8_t* codebook;
    const uint16_t* scales;  // [rows, groups]
    int64_t group_columns;   // a multiple of 64
};

// A BlockDecoder; its context is a QuantizedDecodeJob.
int64_t decode_quantized_block(const void* context, const Block& block);

// As `decode` of a bitmap; kBadRecord for a scale that rule F30 forbids.
int64_t decode_quantized(const QuantizedDecodeJob& job, int threads);

}  // namespace endor
