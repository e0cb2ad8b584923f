// Codec `exponent`: the exponents of 16-bit floats by nested bitmaps, everything else as it is.
//
// A row block's record is a table of exponents, the planes of its levels, and the exponents that no level names. A level
// of one plane gives every value that reaches it a bit, a level of two planes two bits; whoever has all bits set goes on
// to the next level, everyone else has the exponent that the table names for the code. docs/format.md is normative.

#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "bitmap.h"
#include "row_blocks.h"

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

// Where the bits of an exponent stand in the higher byte of a weight; of a bfloat16 the lowest one, which belongs to the
// lower byte, comes to stand where the sign will be. Kernels know exponents only like this.
inline uint8_t placed(uint8_t exponent, bool float16) {
    return static_cast<uint8_t>(float16 ? (exponent & 0x1F) << 2 : exponent >> 1 | exponent << 7);
}

// One level of one record.
struct Level {
    const uint8_t* planes;
    int64_t count;     // values that reach it
    uint8_t named[3];  // the exponents it names, placed

    int64_t stride() const { return (count + 7) / 8; }
};

// A record that has been checked, and how far its values are read. 64 bytes may be read at `next`, at the next value's
// byte of `sign_mantissa`, and (32) at the byte with its bits of `low`, as long as values are taken as the mask says.
struct RecordCursor {
    const uint8_t* planes[2];  // of the first level; both the same if it has one
    uint8_t named[3];          // the exponents that it names, placed
    const uint8_t* next;       // the exponents of the values that it sends on, placed
    const uint8_t* sign_mantissa;  // of the record's first value
    const uint8_t* low;            // float16: the byte with that value's lowest mantissa bits
    int low_shift;                 // bits of that byte that belong to values before
    int64_t value;                 // values taken so far
    int64_t count;                 // of the record's values
    int64_t planes_bytes;          // of all its planes; the next record's lie behind them and are about as many
};

// What to fetch ahead: of signs, mantissas and low bits what comes in a while, and of the planes, which are walked level
// by level before any value is read, those of the next record.
class Ahead {
   public:
    explicit Ahead(const RecordCursor& record)
        : planes_(reinterpret_cast<uintptr_t>(record.planes[0]) + static_cast<uintptr_t>(record.planes_bytes)),
          planes_per_value_(record.count ? (record.planes_bytes << 16) / record.count : 0) {}

    template <bool kFloat16>
    void fetch(const RecordCursor& record, int64_t value) const {
        const auto heads = reinterpret_cast<uintptr_t>(record.sign_mantissa), low = reinterpret_cast<uintptr_t>(record.low);
        const auto i = static_cast<uintptr_t>(value);
        fetch_line(heads + i + kAheadBytes);
        if constexpr (kFloat16) fetch_line(low + (i + kAheadBytes) / 8 * 3);
        fetch_line(planes_ + (i * static_cast<uintptr_t>(planes_per_value_) >> 16));
    }

    // Fetching a line that does not exist is harmless, so nobody checks: but the address must not be made with pointers.
    static void fetch_line(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address)); }

   private:
    static constexpr uintptr_t kAheadBytes = 4096;

    uintptr_t planes_;
    int64_t planes_per_value_;  // in 1 / 65536 bytes
};

// The loops of one instruction set; arrays are indexed by the planes of the level less one, and by whether values are
// float16.
struct ExponentKernels {
    // Bits that are set in all planes: the values that go on.
    int64_t (*escapes[2])(const Level& level);
    // Places exponents.
    void (*place[2])(const uint8_t* exponents, int64_t count, uint8_t* out);
    // The exponents of all values of a level; reads 64 bytes wherever `next` comes to stand, writes whole vectors of 64.
    void (*exponents[2])(const Level& level, const uint8_t* next, uint8_t* out);
    // The next `count` values; a multiple of 64, or all that are left.
    void (*values[2][2])(RecordCursor& cursor, int64_t count, uint16_t* out, bool streaming);
    // The next rows under a bitmap that keeps no more values than the record has left. Null where it is faster to read
    // values first and then to expand them.
    void (*rows[2][2])(RecordCursor& cursor, const uint8_t* bitmap, uint8_t* out, int64_t rows, int64_t cols,
                       bool streaming);
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

// Memory that an open record needs: on the stack, or on the heap for rows that are unusually long.
class RecordScratch {
   public:
    // `bytes` at once, nullptr without memory.
    uint8_t* reserve(int64_t bytes) {
        if (bytes <= kInside) return inside_;
        heap_.reset(new (std::nothrow) uint8_t[static_cast<size_t>(bytes)]);
        return heap_.get();
    }

   private:
    static constexpr int64_t kInside = 8192;

    alignas(64) uint8_t inside_[kInside];
    std::unique_ptr<uint8_t[]> heap_;
};

// Checks the record of a row block with values [start, stop), of which the mask has been checked, and makes a cursor at
// its first value that is valid as long as `scratch` is. Returns -1, kBadRecord or kNoMemory.
int64_t open_record(const ExponentDecodeJob& job, int64_t block, int64_t start, int64_t stop, RecordScratch& scratch,
                    RecordCursor& cursor);

// A BlockDecoder; its context is a ExponentDecodeJob.
int64_t decode_exponent_block(const void* context, const Block& block);

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
