// Decode and encode codec `exponent`: find the levels of each record, check that they fit it, run.

#include "exponent.h"

#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

constexpr int64_t kVector = 64;        // values that kernels take at a time
constexpr int64_t kTileValues = 2048;  // elements between two visits of the mask: reads and writes of memory overlap

// Memory for the exponents of two levels: on the stack, or on the heap for rows that are unusually long.
class Scratch {
   public:
    // Two runs of `each` bytes, nullptr without memory.
    bool reserve(int64_t each) {
        each_ = each;
        if (2 * each > kInside) heap_.reset(new (std::nothrow) uint8_t[2 * each]);
        return 2 * each <= kInside || heap_;
    }
    uint8_t* run(int i) { return (2 * each_ > kInside ? heap_.get() : inside_) + i * each_; }

   private:
    static constexpr int64_t kInside = 8192;

    alignas(64) uint8_t inside_[kInside];
    std::unique_ptr<uint8_t[]> heap_;
    int64_t each_ = 0;
};

struct Record {
    Level levels[kMaxPairs + kMaxSingles];
    const uint8_t* rest;  // the exponents that no level names
};

// Whether bits behind the last value of a plane are set: such a record was not written by an encoder.
bool has_padding_bits(const Level& level, int planes) {
    const int64_t used = level.count % 8;
    if (!used) return false;
    int bits = 0;
    for (int plane = 1; plane <= planes; ++plane) bits |= level.planes[plane * level.stride() - 1];
    return bits >> used;
}

// Where everything lies in the record of a row block with `count` values. False if it does not lie there.
bool find_levels(const ExponentDecodeJob& job, int64_t block, int64_t count, Record& record) {
    const int64_t begin = offset_at(job.record_offsets, job.record_offsets_are_64, block);
    const int64_t end = offset_at(job.record_offsets, job.record_offsets_are_64, block + 1);
    const bool runs_from_0_to_all =
        (block != 0 || begin == 0) && (block != job.mask.shape.row_blocks() - 1 || end == job.exponent_bytes);
    if (begin < 0 || end < begin || end > job.exponent_bytes || !runs_from_0_to_all) return false;
    int64_t left = end - begin - job.levels.table_bytes();
    if (left < 0) return false;
    const uint8_t* table = job.records + begin;
    const uint8_t* position = table + job.levels.table_bytes();
    for (int i = 0; i < job.levels.count(); ++i) {
        const int planes = job.levels.width(i);
        const Level level{position, count, table};
        left -= planes * level.stride();
        if (left < 0 || has_padding_bits(level, planes)) return false;
        count = job.kernels->escapes[planes - 1](level);
        record.levels[i] = level;
        position += planes * level.stride();
        table += (1 << planes) - 1;
    }
    record.rest = position;
    return left == count;
}

// What the first level sends on, by way of all further ones. nullptr without memory.
const uint8_t* passed_on(const ExponentDecodeJob& job, const Record& record, Scratch& scratch) {
    const uint8_t* next = record.rest;
    if (job.levels.count() < 2) return next;
    const int64_t room = (record.levels[1].count + kVector - 1) / kVector * kVector + kSlackBytes;
    if (!scratch.reserve(room)) return nullptr;
    for (int i = job.levels.count() - 1; i > 0; --i) {
        uint8_t* const out = scratch.run(i % 2);
        job.kernels->exponents[job.levels.width(i) - 1](record.levels[i], next, out);
        next = out;
    }
    return next;
}

// The values of one row block, in order.
class Values {
   public:
    Values(const ExponentDecodeJob& job, const Record& record, const uint8_t* next, int64_t start)
        : level_(record.levels[0]), next_(next), join_(job.kernels->join[job.levels.width(0) - 1][job.float16]) {
        heads_.sign_mantissa = job.sign_mantissa + start;
        if (job.float16) {
            heads_.low = job.mantissa_low + start * 3 / 8;
            heads_.low_end = job.mantissa_low + (job.mask.nnz * 3 + 7) / 8;
            heads_.low_shift = static_cast<int>(start * 3 % 8);
        }
    }

    // At least the next `count` values, of those there are.
    void read(int64_t count, uint16_t* out, bool streaming) {
        const int64_t wanted = (count + kVector - 1) / kVector * kVector;
        const int64_t stop = wanted < level_.count - done_ ? done_ + wanted : level_.count;
        next_ = join_(level_, next_, heads_, done_, stop, out, streaming);
        done_ = stop;
    }

   private:
    Level level_;
    Heads heads_{};
    const uint8_t* next_;
    JoinValues join_;
    int64_t done_ = 0;
};

// Expands tile after tile of a row block: as many rows as fit, or a part of one.
void expand_block(const DecodeJob& job, const Block& block, Values& values) {
    alignas(64) uint16_t tile[kTileValues + 2 * kVector];
    const int64_t cols = job.shape.cols, words = job.shape.words_per_row();
    const int64_t tile_rows = cols < kTileValues ? kTileValues / (cols ? cols : 1) : 1;
    int64_t kept_over = 0;  // values that were read along with the tile before
    for (int64_t row = 0; row < block.rows; row += tile_rows) {
        const int64_t rows = block.rows - row < tile_rows ? block.rows - row : tile_rows;
        for (int64_t col = 0; col < cols; col += kTileValues) {
            const int64_t width = cols - col < kTileValues ? cols - col : kTileValues;
            const uint8_t* bitmap = block.bitmap + row * words * 8 + col / 8;
            const int64_t needed = job.kernels->count(bitmap, rows, width);
            if (needed > kept_over) values.read(needed - kept_over, tile + kept_over, false);
            job.kernels->decode[1](bitmap, reinterpret_cast<const uint8_t*>(tile),
                                   reinterpret_cast<const uint8_t*>(tile + kTileValues + 2 * kVector),
                                   block.out + (row * cols + col) * 2, rows, width, job.streaming);
            kept_over = needed > kept_over ? (needed - kept_over + kVector - 1) / kVector * kVector - (needed - kept_over)
                                           : kept_over - needed;
            std::memmove(tile, tile + needed, kVector * sizeof(uint16_t));
        }
    }
}

int64_t decode_block(const void* context, const Block& block) {
    const auto& job = *static_cast<const ExponentDecodeJob*>(context);
    const int64_t count = block.stop - block.start;
    Record record;
    if (!find_levels(job, block.number, count, record)) return kBadRecord;
    Scratch scratch;
    const uint8_t* const next = passed_on(job, record, scratch);
    if (!next) return kNoMemory;
    Values values(job, record, next, block.start);
    if (block.bitmap) {
        expand_block(job.mask, block, values);
    } else if (count) {
        const bool aligned = reinterpret_cast<uintptr_t>(block.out) % 64 == 0;
        values.read(count, reinterpret_cast<uint16_t*>(block.out), job.mask.streaming && aligned);
    }
    return -1;
}

}  // namespace

int64_t decode_exponent(const ExponentDecodeJob& job, int threads) {
    const int64_t last = job.mask.shape.row_blocks();
    const bool empty = last == 0;
    if (empty && (offset_at(job.record_offsets, job.record_offsets_are_64, 0) != 0 || job.exponent_bytes)) return kBadRecord;
    return decode_blocks(job.mask, threads, decode_block, &job);
}

}  // namespace endor
