// y = x W^T for a few rows of x, straight from a packed W: its values are expanded into registers and never written.
//
// Sums are collected in single precision, each output in one order that depends on the instruction set alone: not on
// the number of threads, nor on how many rows x has.

#pragma once

#include <cstdint>

#include "bitmap.h"

namespace endor {

constexpr int kMaxXRows = 8;      // that share one expansion of W; more are multiplied in turns
constexpr int kMaxGroupRows = 4;  // rows of W that are walked side by side

// Where the values of a row of W lie; they are as many as its bits.
struct RawRow {
    const uint8_t* bitmap;
    const uint16_t* values;
};

struct PreparedX {
    const uint8_t* data;
    int64_t stride_bytes;
};

// Rows of W times rows of x: sums[row of W * rows of x + row of x].
using DotRows = void (*)(const RawRow* rows, const uint16_t* values_end, int64_t words, PreparedX x, float* sums);

// The functions of one instruction set for one type of x. Tables are indexed by the rows of x less one.
struct MatmulKernels {
    const char* name;
    bool takes_fp32;  // x: single precision, or bfloat16
    int prepared_size;  // bytes of an element of x as `group` and `single` want it
    // Rows of x in whole words of 64 columns, zeros behind the last column.
    void (*prepare)(const void* x, int64_t rows, int64_t cols, uint8_t* prepared, int64_t stride_bytes);
    int group_rows[kMaxXRows];
    DotRows group[kMaxXRows];       // `group_rows` rows of W; may read 64 values further than there are
    DotRows near_end[kMaxXRows];    // one row of W; reads nothing at or behind `values_end`
};

// nullptr where the machine (or the build) does not have the instruction set.
const MatmulKernels* avx512bf16_matmul(bool fp32);
const MatmulKernels* avx512_matmul(bool fp32);
const MatmulKernels* avx2_matmul(bool fp32);
const MatmulKernels* scalar_matmul(bool fp32);

struct MatmulJob {
    const Kernels* bits;
    const MatmulKernels* kernels;
    Shape shape;
    const uint8_t* bitmap;
    const void* offsets;  // [row_blocks + 1], int32 or int64
    bool offsets_are_64;
    const uint16_t* values;
    int64_t nnz;
    const void* x;  // [x_rows, shape.cols]
    int64_t x_rows;
    const float* bias;   // [shape.rows], or nullptr
    uint8_t* scratch;    // matmul_scratch_bytes()
    void* y;             // [x_rows, shape.rows], of the type of x
};

// Room for x as any kernel may want it.
int64_t matmul_scratch_bytes(int64_t x_rows, int64_t cols);

// -1 if all is well, else 4 * row block + Rule of the first row block that is wrong; y is then undefined.
int64_t matmul(const MatmulJob& job, int threads);

}  // namespace endor
