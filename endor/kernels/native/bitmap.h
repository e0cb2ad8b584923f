// Bitmap kernels: what a packed matrix looks like in memory, and the three operations on it.
//
// A matrix of `rows` x `cols` elements of 1, 2 or 4 bytes is a bitmap of one bit per element (little-endian, each row
// padded to whole 64-bit words, padding bits zero), the elements whose bits are not all zero in row-major order, and
// for every `row_block` rows the number of elements kept before them. docs/format.md is normative.
//
// Nothing here allocates, throws or calls Python.

#pragma once

#include <cstdint>

namespace endor {

constexpr int64_t kWordBits = 64;

// What can be wrong with a bitmap and its row offsets; `Failure` names the first row block where it is.
enum Rule : int64_t {
    kOffsetsOutOfRange = 0,   // not 0 at the start, not nnz at the end, decreasing, or outside the values
    kBitsInPadding = 1,       // bits set beyond the last column
    kCountMismatch = 2,       // the bitmap does not have as many bits set as the offsets say
    kBadRecord = 3,           // codec `exponent`: a record does not fill the bytes that its offsets give it;
                              // `int8`, `int4`: a scale is neither zero nor a positive normal number
};

struct Shape {
    int64_t rows;
    int64_t cols;
    int64_t row_block;  // rows per offset

    int64_t words_per_row() const { return (cols + kWordBits - 1) / kWordBits; }
    int64_t row_blocks() const { return (rows + row_block - 1) / row_block; }
};

// The functions of one instruction set, over consecutive rows; arrays are indexed by log2 of the element size.
struct Kernels {
    const char* name;
    // Bits set in the bitmap, or -1 if one lies in the padding.
    int64_t (*count)(const uint8_t* bitmap, int64_t rows, int64_t cols);
    // Needs a bitmap whose bits are at most the elements in [values, values_end); reads nothing outside them.
    void (*decode[3])(const uint8_t* bitmap, const uint8_t* values, const uint8_t* values_end, uint8_t* out,
                      int64_t rows, int64_t cols, bool streaming);
    // Writes the bitmap and returns the number of bits set.
    int64_t (*scan[3])(const uint8_t* dense, uint8_t* bitmap, int64_t rows, int64_t cols);
    // Writes the elements the bitmap names and nothing else; fetches ahead what lies `prefetch_bytes` further on.
    void (*compress[3])(const uint8_t* dense, const uint8_t* bitmap, uint8_t* values, int64_t rows, int64_t cols,
                        int64_t prefetch_bytes);
};

// nullptr where the machine (or the build) does not have the instruction set.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* scalar_kernels();

struct DecodeJob {
    const Kernels* kernels;
    Shape shape;
    int size_log2;
    const uint8_t* bitmap;
    const void* offsets;  // [row_blocks + 1], int32 or int64; null under mask `dense`, which raw values do not have
    bool offsets_are_64;
    const uint8_t* values;
    int64_t nnz;
    uint8_t* out;  // of the first row of start_block
    int64_t start_block;
    int64_t stop_block;
    bool streaming;  // the output will not be read soon: bypass the caches
};

struct EncodeJob {
    int threads;
    const Kernels* kernels;
    Shape shape;
    int size_log2;
    const uint8_t* dense;
    uint8_t* bitmap;
    int64_t* offsets;  // [row_blocks + 1]
    uint8_t* values;   // room for every element; only as many as are kept are touched
};

// -1 if all is well, else 4 * row block + Rule of the first row block that is wrong.
int64_t decode(const DecodeJob& job, int threads);

// Bitmap, offsets and values. Returns the number of values.
int64_t encode(const EncodeJob& job);

}  // namespace endor
