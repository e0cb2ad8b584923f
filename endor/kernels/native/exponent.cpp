// Decode and encode codec `exponent`: find the levels of each record, check that they fit it, run.

#include "exponent.h"

#include <cstring>

#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

constexpr int64_t kVector = 64;        // values that kernels take at a time
constexpr int64_t kTileValues = 2048;  // elements between two visits of the mask: reads and writes of memory overlap

struct Record {
    Level levels[kMaxPairs + kMaxSingles];
    const uint8_t* rest;  // the exponents that no level names
    int64_t rest_count;
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
        Level level{position, count, {}};
        for (int k = 0; k < (1 << planes) - 1; ++k) level.named[k] = placed(table[k], job.float16);
        left -= planes * level.stride();
        if (left < 0 || has_padding_bits(level, planes)) return false;
        count = job.kernels->escapes[planes - 1](level);
        record.levels[i] = level;
        position += planes * level.stride();
        table += (1 << planes) - 1;
    }
    record.rest = position;
    record.rest_count = count;
    return left == count;
}

int64_t whole_vectors(int64_t count) { return (count + kVector - 1) / kVector * kVector; }

// What the first level sends on, by way of all further ones; two runs of `room` bytes take turns.
const uint8_t* passed_on(const ExponentDecodeJob& job, const Record& record, uint8_t* runs, int64_t room) {
    int i = job.levels.count();
    uint8_t* out = runs + i % 2 * room;
    job.kernels->place[job.float16](record.rest, record.rest_count, out);
    while (--i > 0) {
        const uint8_t* const next = out;
        out = runs + i % 2 * room;
        job.kernels->exponents[job.levels.width(i) - 1](record.levels[i], next, out);
    }
    return out;
}

// Where a vector would reach over the end of a section: a copy of its bytes [first, last) with memory behind it.
const uint8_t* with_slack(const uint8_t* section, int64_t first, int64_t last, int64_t all, uint8_t* copy) {
    if (all - last >= kSlackBytes) return section + first;
    if (last > first) std::memcpy(copy, section + first, static_cast<size_t>(last - first));
    std::memset(copy + (last - first), 0, kSlackBytes);
    return copy;
}

// The values of one record, in order.
class Values {
   public:
    Values(const ExponentDecodeJob& job, RecordCursor& cursor)
        : read_(job.kernels->values[job.levels.width(0) - 1][job.float16]), cursor_(cursor) {}

    // At least the next `count`, of those there are.
    void read(int64_t count, uint16_t* out, bool streaming) {
        const int64_t left = cursor_.count - cursor_.value, wanted = whole_vectors(count);
        read_(cursor_, wanted < left ? wanted : left, out, streaming);
    }

   private:
    void (*read_)(RecordCursor&, int64_t, uint16_t*, bool);
    RecordCursor& cursor_;
};

// Expands tile after tile of a row block: as many rows as fit, or a part of one.
void expand_block(const DecodeJob& job, const Block& block, Values values) {
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
            kept_over += (needed > kept_over ? whole_vectors(needed - kept_over) : 0) - needed;
            std::memmove(tile, tile + needed, kVector * sizeof(uint16_t));
        }
    }
}

}  // namespace

int64_t decode_exponent_block(const void* context, const Block& block) {
    const auto& job = *static_cast<const ExponentDecodeJob*>(context);
    RecordScratch scratch;
    RecordCursor cursor;
    const int64_t broken = open_record(job, block.number, block.start, block.stop, scratch, cursor);
    if (broken != -1) return broken;
    const auto expand_rows = job.kernels->rows[job.levels.width(0) - 1][job.float16];
    if (!block.bitmap) {
        Values(job, cursor).read(cursor.count, reinterpret_cast<uint16_t*>(block.out), job.mask.streaming);
    } else if (expand_rows) {
        expand_rows(cursor, block.bitmap, block.out, block.rows, job.mask.shape.cols, job.mask.streaming);
    } else {
        expand_block(job.mask, block, Values(job, cursor));
    }
    return -1;
}

int64_t open_record(const ExponentDecodeJob& job, int64_t block, int64_t start, int64_t stop, RecordScratch& scratch,
                    RecordCursor& cursor) {
    Record record;
    if (!find_levels(job, block, stop - start, record)) return kBadRecord;
    const Level& first = record.levels[0];
    const int64_t sent_on = job.levels.count() > 1 ? record.levels[1].count : record.rest_count;
    const int64_t room = whole_vectors(sent_on) + kSlackBytes;
    const int64_t low_first = start * 3 / 8, low_last = (stop * 3 + 7) / 8, low_all = (job.mask.nnz * 3 + 7) / 8;
    const bool last = job.mask.nnz - stop < 3 * kSlackBytes;  // its vectors may reach over the end of a section
    uint8_t* const runs = scratch.reserve(2 * room + (last ? 2 * (stop - start + kSlackBytes) + 8 : 0));
    if (!runs) return kNoMemory;
    cursor = {{first.planes, first.planes + (job.levels.width(0) - 1) * first.stride()},
              {first.named[0], first.named[1], first.named[2]},
              passed_on(job, record, runs, room),
              job.sign_mantissa + start,
              nullptr,
              0,
              0,
              stop - start,
              record.rest - first.planes};
    uint8_t* const copies = runs + 2 * room;
    if (last) cursor.sign_mantissa = with_slack(job.sign_mantissa, start, stop, job.mask.nnz, copies);
    if (job.float16) {
        cursor.low = job.mantissa_low + low_first;
        if (last) {
            uint8_t* const copy = copies + (stop - start) + kSlackBytes;
            cursor.low = with_slack(job.mantissa_low, low_first, low_last, low_all, copy);
        }
        cursor.low_shift = static_cast<int>(start * 3 % 8);
    }
    return -1;
}

int64_t decode_exponent(const ExponentDecodeJob& job, int threads) {
    const int64_t last = job.mask.shape.row_blocks();
    const bool empty = last == 0;
    if (empty && (offset_at(job.record_offsets, job.record_offsets_are_64, 0) != 0 || job.exponent_bytes)) return kBadRecord;
    return decode_blocks(job.mask, threads, decode_exponent_block, &job);
}

}  // namespace endor
