// Encode codecs `int8` and `int4`: scales by search, then codes. What is chosen, and why no order of additions matters, is
// said in endor/kernels/quantize.py; these kernels write the same bytes.

#pragma once

#include <cstdint>

#include "quantized.h"

namespace endor {

constexpr int64_t kGroupColumns = 128;  // GROUP_COLUMNS
constexpr int kInt8Steps = 128, kInt4Steps = 32;
constexpr int kMaxFactors = 32;

// What the integers of a codebook's eight magnitudes round to, by twice the magnitude in units of the scale.
struct NearestTable {
    alignas(64) uint8_t index[256];
    alignas(64) uint8_t magnitude[256];
    uint8_t midpoints[8];   // twice the points between neighbours; the last is 255: never exceeded
    uint8_t magnitudes[8];
};

NearestTable make_nearest_table(const int8_t* codebook);

// The functions of one instruction set on one group of kGroupColumns; arrays are indexed by `int4`.
struct QuantizeKernels {
    // `count` elements as float32, zeros behind them. Returns the bits of the largest magnitude. By FloatType.
    uint32_t (*load[3])(const uint8_t* dense, int64_t count, float* values);
    // Magnitudes as shares of the largest.
    void (*shares)(const float* values, float largest, float* shares);
    // For each reach: the sum of squared distances, in steps, of shares times reach from what they round to.
    void (*errors[2])(const float* shares, const float* reaches, int count, const NearestTable& table, int32_t* errors);
    void (*codes[2])(const float* values, float scale, const NearestTable& table, uint8_t* codes);
    // Moves the codes that the word names to the front; may write 64. Returns how many there are.
    int64_t (*compress)(uint64_t word, const uint8_t* codes, uint8_t* packed);
};

const QuantizeKernels* avx512_quantize_kernels();
const QuantizeKernels* avx2_quantize_kernels();
const QuantizeKernels* scalar_quantize_kernels();

struct QuantizedEncodeJob {
    int threads;
    const Kernels* bits;
    const QuantizeKernels* kernels;
    Shape shape;
    bool int4;
    FloatType type;
    const uint8_t* dense;
    const uint8_t* bitmap;   // null under mask `dense`
    const int64_t* starts;   // [row_blocks + 1], values before each row block; null: scales alone are wanted
    const float* factors;    // at most kMaxFactors
    int factor_count;
    float highest_scale;
    const int8_t* codebook;  // of int4
    uint16_t* scales;        // [rows, groups]
    uint8_t* codes;          // zeros

    int size_log2() const { return type == kFloat32 ? 2 : 1; }
};

// Writes the bitmap and the values before each row block (int64 [row_blocks + 1]).
void scan_mask(const QuantizedEncodeJob& job, uint8_t* bitmap, int64_t* starts);

// Writes scales and codes. False if the matrix holds NaN or infinity; what is written is then undefined.
bool encode_quantized(const QuantizedEncodeJob& job);

}  // namespace endor
