// y = x W^T for a few rows of x, straight from a packed W, which is never written to memory as a whole.
//
// Values are expanded into registers where an instruction set has a loop for their codec. Elsewhere a few rows at a time
// are decoded to memory that stays in a cache, and multiplied from there.
//
// The products are those of the weights that decoding gives. Sums are collected in single precision, each output in one
// order that depends on the instruction set and the codec alone: not on the number of threads, nor on how many rows x has.

#pragma once

#include <cstdint>

#include "bitmap.h"
#include "exponent.h"
#include "row_blocks.h"

namespace endor {

constexpr int kMaxXRows = 8;      // that share one expansion of W; more are multiplied in turns
constexpr int kMaxGroupRows = 4;  // rows of W that are walked side by side
constexpr int kMaxGroupBlocks = 2;  // row blocks of codec `exponent` that are

// Where the weights of a row come from.
enum MatmulSource { kRawValues = 0, kInt8Values = 1, kInt4Values = 2, kDecodedRows = 3, kRecords = 4 };
constexpr int kRowSources = 4;  // those whose rows can be found one by one

// A row of W whose values are known to be as many as its bits and to lie within the section.
struct MatmulRow {
    const uint8_t* bitmap;  // of decoded rows: not used
    int64_t first;          // number of its first value
    int64_t row;
};

// The kept values of W, or some of its rows as they are decoded.
struct MatmulValues {
    const uint8_t* data;  // raw and decoded: uint16; int8 and int4: codes
    const uint8_t* end;
    int64_t group_words;     // of columns that share a scale; without scales those of a row
    const int8_t* codebook;  // int4: 16 integers
    const uint16_t* scales;  // int8, int4: bfloat16, [rows, groups]
    int64_t groups;
};

struct PreparedX {
    const uint8_t* data;
    int64_t stride_bytes;
};

// Rows of W times rows of x: sums[row of W * rows of x + row of x].
using DotRows = void (*)(const MatmulRow* rows, const MatmulValues& values, int64_t words, PreparedX x, float* sums);

// Tables are indexed by the rows of x less one.
struct MatmulLoops {
    // Rows of x in whole words of 64 columns, in the order that the loops want, zeros behind the last column.
    void (*prepare)(const void* x, int64_t rows, int64_t cols, uint8_t* prepared, int64_t stride_bytes);
    int64_t reach;  // values that `group` may read behind those of its last row
    int group_rows[kMaxXRows];
    DotRows group[kMaxXRows];     // `group_rows` rows of W
    DotRows near_end[kMaxXRows];  // one row of W; reads nothing at or behind the end of the values
};

// The next row of each of some records of codec `exponent`: sums[record * rows of x + row of x]. The bitmaps are checked.
using DotRecords = void (*)(RecordCursor* records, const uint8_t* const* bitmaps, int64_t words, PreparedX x, float* sums);

// As MatmulLoops; the first index is the planes of the first level less one.
struct MatmulRecordLoops {
    void (*prepare)(const void* x, int64_t rows, int64_t cols, uint8_t* prepared, int64_t stride_bytes);
    int group_blocks[kMaxXRows];
    DotRecords group[2][kMaxXRows];
    DotRecords single[2][kMaxXRows];
};

// The functions of one instruction set for one type of x.
struct MatmulKernels {
    const char* name;
    bool takes_fp32;    // x: single precision, or bfloat16
    int prepared_size;  // bytes of an element of x as the loops want it
    const MatmulLoops* loops[kRowSources];  // nullptr: decode first
    const MatmulRecordLoops* records;         // the same
};

// nullptr where the machine (or the build) does not have the instruction set.
const MatmulKernels* avx512bf16_matmul(bool fp32);
const MatmulKernels* avx512_matmul(bool fp32);
const MatmulKernels* avx2_matmul(bool fp32);
const MatmulKernels* scalar_matmul(bool fp32);

struct MatmulJob {
    const MatmulKernels* kernels;
    DecodeJob mask;  // and raw values; without out
    MatmulSource source;
    MatmulValues values;
    const ExponentDecodeJob* exponent;  // of kRecords: bfloat16, with the same mask
    BlockDecoder decoder;  // where the kernels have no loops for the source: bfloat16 rows
    const void* decoder_context;
    const void* x;  // [x_rows, shape.cols]
    int64_t x_rows;
    const float* bias;  // [shape.rows], or nullptr
    uint8_t* scratch;   // matmul_scratch_bytes()
    void* y;            // [x_rows, shape.rows], of the type of x
};

// Room for x as any kernel may want it, and for the bitmap of a row without zeros.
int64_t matmul_scratch_bytes(int64_t x_rows, int64_t cols);

// -1 if all is well, else kNoMemory, or 4 * row block + Rule of the first row block that is wrong; y is then undefined.
int64_t matmul(const MatmulJob& job, int threads);

}  // namespace endor
