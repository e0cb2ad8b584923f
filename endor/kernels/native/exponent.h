// Codec `exponent`: the exponents of 16-bit floats by nested bitmaps, everything else as it is.
//
// A row block's record is a table of exponents, the planes of its levels, and the exponents that no level names. A level
// of one plane gives every value that reaches it a bit, a level of two planes two bits; whoever has all bits set goes on
// to the next level, everyone else has the exponent that the table names for the code. docs/format.md is normative.

#pragma once

#include <cstdint>

#include "bitmap.h"

namespace endor {

constexpr int kMaxPairs = 2;
constexpr int kMaxSingles = 8;
constexpr int64_t kSlackBytes = 64;  // zeros behind the last record: loads may run into them

// How many levels of two planes come first, and how many of one plane follow.
struct Levels {
    int pairs;
    int singles;

    int count() const { return pairs + singles; }
    int width(int level) const { return level < pairs ? 2 : 1; }
    int table_bytes() const { return 3 * pairs + singles; }
};

// One level of one record.
struct Level {
    const uint8_t* planes;
    int64_t count;         // values that reach it
    const uint8_t* table;  // the exponents it names

    int64_t stride() const { return (count + 7) / 8; }
};

// What is left of 16 bits without the exponent: of values that follow one another.
struct Heads {
    const uint8_t* sign_mantissa;
    const uint8_t* low;      // float16: the byte with the first value's lowest mantissa bits
    const uint8_t* low_end;
    int low_shift;           // bits of that byte that belong to values before
};

// Values [first, stop) of a first level as bits; `first` is a multiple of 64, and `stop` too or the end. Returns where
// `next` comes to stand.
using JoinValues = const uint8_t* (*)(const Level& level, const uint8_t* next, const Heads& heads, int64_t first,
                                      int64_t stop, uint16_t* out, bool streaming);

// The loops of one instruction set; arrays are indexed by the planes of the level less one.
struct ExponentKernels {
    // Bits that are set in all planes: the values that go on.
    int64_t (*escapes[2])(const Level& level);
    // The exponents of all values; reads 64 bytes wherever `next` comes to stand, writes whole vectors of 64.
    void (*exponents[2])(const Level& level, const uint8_t* next, uint8_t* out);
    JoinValues join[2][2];  // and by whether values are float16
};

const ExponentKernels* avx512_exponent_kernels();
const ExponentKernels* avx2_exponent_kernels();
const ExponentKernels* scalar_exponent_kernels();

struct ExponentDecodeJob {
    DecodeJob mask;  // without values
    const ExponentKernels* kernels;
    Levels levels;
    bool float16;
    const void* record_offsets;  // [row_blocks + 1], int32 or int64
    bool record_offsets_are_64;
    const uint8_t* records;  // exponent_bytes and kSlackBytes more
    int64_t exponent_bytes;
    const uint8_t* sign_mantissa;
    const uint8_t* mantissa_low;
};

// As `decode` of a bitmap; kBadRecord for a record that is not what it should be, kNoMemory.
int64_t decode_exponent(const ExponentDecodeJob& job, int threads);

struct ExponentEncodeJob {
    int threads;
    Shape shape;
    const int64_t* starts;   // [row_blocks + 1], values before each row block
    const uint16_t* values;  // the kept ones
    bool float16;
};

// How often each exponent occurs in each row block: [row_blocks, 256].
void exponent_histograms(const ExponentEncodeJob& job, int64_t* histograms);

// Everything but exponents: one byte per value, and for float16 three bits.
void exponent_heads(const ExponentEncodeJob& job, uint8_t* sign_mantissa, uint8_t* mantissa_low);

// All records; `tables` is [row_blocks, 256], exponents by frequency, and `scratch` has a byte for every value.
void exponent_records(const ExponentEncodeJob& job, Levels levels, const uint8_t* tables, const int64_t* record_offsets,
                      uint8_t* scratch, uint8_t* records);

}  // namespace endor
