// Multiply a whole matrix: split it into chunks of row blocks, find and check the rows of each, multiply.

#include "matmul.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "parallel.h"
#include "quantized.h"

namespace endor {
namespace {

// Where rows of x are a multiple of 4096 bytes long, the same columns of all of them would compete for one set of a cache.
constexpr int64_t kRowSkewBytes = 64;

struct Multiplying {
    const MatmulJob& job;
    PreparedX x;
    const uint8_t* full_row;  // the bitmap of a row without zeros
    int64_t x_first;
    int x_rows;
    int64_t blocks_per_chunk;
    std::atomic<int64_t> failure{INT64_MAX};
};

// Hands out the rows from a row block on, each only when its values are known to lie within the row block's, which are
// known to lie within the section: that is what keeps every address in bounds. A row block whose rows have fewer bits
// than its offsets say is found out at its end, when its outputs are already written.
class RowReader {
   public:
    RowReader(const Multiplying& work, int64_t block)
        : mask_(work.job.mask),
          values_(work.job.values),
          full_row_(work.full_row),
          row_(block * mask_.shape.row_block),
          block_(block - 1) {}

    // False if the row block that the row is part of, or the one before it, breaks a rule.
    bool next(MatmulRow& row) {
        const int64_t cols = mask_.shape.cols;
        if (!mask_.offsets) {
            block_ = row_ / mask_.shape.row_block;
            row = {full_row_, row_ * cols, row_};
            position_ = (row_ + 1) * cols;
            return scales_hold() && ++row_;
        }
        if (row_ % mask_.shape.row_block == 0 && !(at_end() && enter(block_ + 1))) return false;
        const uint8_t* bitmap = mask_.bitmap + row_ * mask_.shape.words_per_row() * 8;
        const int64_t bits = mask_.kernels->count(bitmap, 1, cols);
        if (bits < 0) return fails(kBitsInPadding);
        if (bits > stop_ - position_) return fails(kCountMismatch);
        row = {bitmap, position_, row_};
        position_ += bits;
        return scales_hold() && ++row_;
    }

    bool at_end() { return !mask_.offsets || position_ == stop_ || fails(kCountMismatch); }
    int64_t failure() const { return failure_; }
    int64_t values_left() const { return mask_.nnz - position_; }  // behind the row handed out last

   private:
    bool fails(Rule rule) {
        failure_ = 4 * block_ + rule;
        return false;
    }

    bool scales_hold() {
        const uint16_t* scales = values_.scales;
        return !scales || scales_are_valid(scales + row_ * values_.groups, values_.groups) || fails(kBadRecord);
    }

    bool enter(int64_t block) {
        block_ = block;
        position_ = offset_at(mask_.offsets, mask_.offsets_are_64, block);
        stop_ = offset_at(mask_.offsets, mask_.offsets_are_64, block + 1);
        const bool runs_from_0_to_nnz =
            (block != 0 || position_ == 0) && (block != mask_.shape.row_blocks() - 1 || stop_ == mask_.nnz);
        const bool in_range = 0 <= position_ && position_ <= stop_ && stop_ <= mask_.nnz;
        return (in_range && runs_from_0_to_nnz) || fails(kOffsetsOutOfRange);
    }

    const DecodeJob& mask_;
    const MatmulValues& values_;
    const uint8_t* full_row_;
    int64_t row_;
    int64_t block_;
    int64_t position_ = 0;
    int64_t stop_ = 0;
    int64_t failure_ = -1;
};

uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write_outputs(const Multiplying& work, int64_t row, int rows, const float* sums) {
    const MatmulJob& job = work.job;
    for (int r = 0; r < rows; ++r) {
        const float bias = job.bias ? job.bias[row + r] : 0.0f;
        for (int m = 0; m < work.x_rows; ++m) {
            const int64_t at = (work.x_first + m) * job.mask.shape.rows + row + r;
            const float y = job.bias ? sums[r * work.x_rows + m] + bias : sums[r * work.x_rows + m];
            if (job.kernels->takes_fp32) {
                static_cast<float*>(job.y)[at] = y;
            } else {
                static_cast<uint16_t*>(job.y)[at] = rounded(y);
            }
        }
    }
}

void report(std::atomic<int64_t>& failure, int64_t found) {
    int64_t lowest = failure.load();
    while (found < lowest && !failure.compare_exchange_weak(lowest, found)) {}
}

// Straight from the values. Returns -1, or what is wrong first.
int64_t multiply_packed(const Multiplying& work, int64_t first_block, int64_t stop_row) {
    const MatmulJob& job = work.job;
    const MatmulLoops& loops = *job.kernels->loops[job.source];
    const int64_t words = job.mask.shape.words_per_row();
    const int per_group = loops.group_rows[work.x_rows - 1];
    RowReader reader(work, first_block);
    for (int64_t row = first_block * job.mask.shape.row_block; row < stop_row;) {
        MatmulRow rows[kMaxGroupRows];
        float sums[kMaxGroupRows * kMaxXRows];
        const int count = stop_row - row < per_group ? static_cast<int>(stop_row - row) : per_group;
        for (int r = 0; r < count; ++r) {
            if (!reader.next(rows[r])) return reader.failure();
        }
        if (count == per_group && reader.values_left() >= loops.reach) {
            loops.group[work.x_rows - 1](rows, job.values, words, work.x, sums);
        } else {
            for (int r = 0; r < count; ++r) {
                loops.near_end[work.x_rows - 1](rows + r, job.values, words, work.x, sums + r * work.x_rows);
            }
        }
        write_outputs(work, row, count, sums);
        row += count;
    }
    return reader.at_end() ? int64_t{-1} : reader.failure();
}

// As many row blocks as make a group of rows are decoded before they are multiplied, unless their rows are so long that
// they would leave the second-level cache.
int64_t blocks_per_tile(const Shape& shape) {
    constexpr int64_t kTileBytes = 128 * 1024;
    const int64_t block_bytes = shape.row_block * shape.cols * 2;
    const int64_t wanted = (kMaxGroupRows + shape.row_block - 1) / shape.row_block;
    return wanted * block_bytes <= kTileBytes ? wanted : 1;
}

void multiply_rows(const Multiplying& work, const uint16_t* tile, int64_t first_row, int64_t stop_row) {
    const MatmulLoops& loops = *work.job.kernels->loops[kDecodedRows];
    const int64_t cols = work.job.mask.shape.cols, words = work.job.mask.shape.words_per_row();
    const int per_group = loops.group_rows[work.x_rows - 1];
    for (int64_t row = first_row; row < stop_row;) {
        MatmulRow rows[kMaxGroupRows];
        float sums[kMaxGroupRows * kMaxXRows];
        const bool group = cols % kWordBits == 0 && stop_row - row >= per_group;
        const int count = group ? per_group : 1;
        for (int r = 0; r < count; ++r) rows[r] = {nullptr, (row + r - first_row) * cols, row + r};
        MatmulValues values = work.job.values;
        values.data = reinterpret_cast<const uint8_t*>(tile);
        values.end = reinterpret_cast<const uint8_t*>(tile + (row + count - first_row) * cols);
        const DotRows* dot = group ? loops.group : loops.near_end;
        dot[work.x_rows - 1](rows, values, words, work.x, sums);
        write_outputs(work, row, count, sums);
        row += count;
    }
}

// From rows that are decoded to a tile first. Returns -1, kNoMemory, or what is wrong first.
int64_t multiply_decoded(const Multiplying& work, int64_t first_block, int64_t stop_row) {
    const MatmulJob& job = work.job;
    const Shape& shape = job.mask.shape;
    const int64_t per_tile = blocks_per_tile(shape), stop_block = (stop_row + shape.row_block - 1) / shape.row_block;
    const int64_t elements = per_tile * shape.row_block * shape.cols;
    // Decoders write whole vectors, and the fastest of them only where they are aligned.
    constexpr int64_t kAlign = 64;
    std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[elements * 2 + kAlign]);
    if (!memory) return kNoMemory;
    uint8_t* const tile = memory.get() + (kAlign - reinterpret_cast<uintptr_t>(memory.get()) % kAlign) % kAlign;
    for (int64_t block = first_block; block < stop_block; block += per_tile) {
        const int64_t stop = stop_block - block < per_tile ? stop_block : block + per_tile;
        for (int64_t i = block; i < stop; ++i) {
            Block at;
            int64_t rule = check_block(job.mask, i, at);
            at.out = tile + (i - block) * shape.row_block * shape.cols * 2;
            if (rule == -1) rule = job.decoder(job.decoder_context, at);
            if (rule != -1) return rule == kNoMemory ? kNoMemory : 4 * i + rule;
        }
        const Rows rows(shape, block, stop);
        multiply_rows(work, reinterpret_cast<const uint16_t*>(tile), rows.first, rows.first + rows.count);
    }
    return -1;
}

// A row block of codec `exponent` whose mask and record are known to be right.
struct OpenBlock {
    RecordScratch scratch;
    RecordCursor cursor;
    Block block;

    // Returns -1, kNoMemory, or the Rule that the row block breaks.
    int64_t open(const MatmulJob& job, int64_t number) {
        const int64_t rule = check_block(job.mask, number, block);
        return rule == -1 ? open_record(*job.exponent, number, block.start, block.stop, scratch, cursor) : rule;
    }
};

// Opening a record reads all of it at once, too fast for the hardware to have fetched it: so the one before fetches what
// lies behind it, as many bytes as it has itself.
void fetch_record_behind(const ExponentDecodeJob& job, int64_t block) {
    const int64_t begin = offset_at(job.record_offsets, job.record_offsets_are_64, block);
    const int64_t end = offset_at(job.record_offsets, job.record_offsets_are_64, block + 1);
    const auto from = reinterpret_cast<uintptr_t>(job.records) + static_cast<uintptr_t>(end);
    for (int64_t i = 0; i < end - begin; i += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(i)), 0, 2);
    }
}

// Rows of `count` open blocks that have equally many.
void multiply_blocks(const Multiplying& work, OpenBlock* blocks, int count, const DotRecords* dot) {
    const int64_t words = work.job.mask.shape.words_per_row();
    RecordCursor cursors[kMaxGroupBlocks];
    for (int b = 0; b < count; ++b) cursors[b] = blocks[b].cursor;
    for (int64_t row = 0; row < blocks[0].block.rows; ++row) {
        const uint8_t* bitmaps[kMaxGroupBlocks];
        float sums[kMaxGroupBlocks * kMaxXRows];
        for (int b = 0; b < count; ++b) {
            bitmaps[b] = blocks[b].block.bitmap ? blocks[b].block.bitmap + row * words * 8 : work.full_row;
        }
        dot[work.x_rows - 1](cursors, bitmaps, words, work.x, sums);
        for (int b = 0; b < count; ++b) {
            write_outputs(work, blocks[b].block.first_row + row, 1, sums + b * work.x_rows);
        }
    }
}

// Straight from the records of codec `exponent`. Returns -1, kNoMemory, or what is wrong first.
int64_t multiply_records(const Multiplying& work, int64_t first_block, int64_t stop_row) {
    const MatmulJob& job = work.job;
    const Shape& shape = job.mask.shape;
    const MatmulRecordLoops& loops = *job.kernels->records;
    const int planes = job.exponent->levels.width(0);
    const int per_group = loops.group_blocks[work.x_rows - 1];
    const int64_t stop = (stop_row + shape.row_block - 1) / shape.row_block;
    OpenBlock blocks[kMaxGroupBlocks];
    for (int64_t block = first_block; block < stop;) {
        const int count = stop - block < per_group ? static_cast<int>(stop - block) : per_group;
        for (int b = 0; b < count; ++b) {
            const int64_t rule = blocks[b].open(job, block + b);
            if (rule != -1) return rule == kNoMemory ? kNoMemory : 4 * (block + b) + rule;
            fetch_record_behind(*job.exponent, block + b);
        }
        if (count == per_group && blocks[count - 1].block.rows == blocks[0].block.rows) {
            multiply_blocks(work, blocks, count, loops.group[planes - 1]);
        } else {
            for (int b = 0; b < count; ++b) multiply_blocks(work, blocks + b, 1, loops.single[planes - 1]);
        }
        block += count;
    }
    return -1;
}

void multiply_chunk(void* context, int64_t chunk) {
    auto& work = *static_cast<Multiplying*>(context);
    const Shape& shape = work.job.mask.shape;
    const int64_t block = chunk * work.blocks_per_chunk;
    const int64_t wanted = (block + work.blocks_per_chunk) * shape.row_block;
    const int64_t stop = wanted < shape.rows ? wanted : shape.rows;
    const MatmulSource source = work.job.source;
    const int64_t failure = source == kRecords       ? multiply_records(work, block, stop)
                            : source == kDecodedRows ? multiply_decoded(work, block, stop)
                                                     : multiply_packed(work, block, stop);
    if (failure != -1) report(work.failure, failure);
}

int64_t x_stride_bytes(int64_t cols, int64_t element_bytes) {
    return (cols + kWordBits - 1) / kWordBits * kWordBits * element_bytes + kRowSkewBytes;
}

PreparedX prepare(const MatmulJob& job, int64_t first, int rows, uint8_t* scratch) {
    const int64_t element_bytes = job.kernels->takes_fp32 ? 4 : 2, cols = job.mask.shape.cols;
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * cols * element_bytes;
    const int64_t stride_bytes = x_stride_bytes(cols, job.kernels->prepared_size);
    const bool records = job.source == kRecords;
    const auto prepare_rows = records ? job.kernels->records->prepare : job.kernels->loops[job.source]->prepare;
    prepare_rows(x, rows, cols, scratch, stride_bytes);
    return {scratch, stride_bytes};
}

// Padding bits are zero in a full row as in any other.
void write_full_row(uint8_t* row, int64_t cols) {
    std::memset(row, 0, (cols + kWordBits - 1) / kWordBits * 8);
    std::memset(row, 0xFF, cols / 8);
    if (cols % 8) row[cols / 8] = static_cast<uint8_t>((1 << cols % 8) - 1);
}

// The job as the kernels can do it: from decoded rows where they have no loops for the codec.
MatmulJob possible(const MatmulJob& wanted) {
    MatmulJob job = wanted;
    const bool has_loops = job.source == kRecords ? job.kernels->records != nullptr : job.kernels->loops[job.source] != nullptr;
    if (!has_loops) job.source = kDecodedRows;
    if (job.source == kRawValues || job.source == kDecodedRows) job.values.group_words = INT64_MAX;
    return job;
}

}  // namespace

int64_t matmul_scratch_bytes(int64_t x_rows, int64_t cols) {
    const int64_t full_row = (cols + kWordBits - 1) / kWordBits * 8;
    return full_row + (x_rows < kMaxXRows ? x_rows : kMaxXRows) * x_stride_bytes(cols, sizeof(float));
}

int64_t matmul(const MatmulJob& wanted, int threads) {
    const MatmulJob job = possible(wanted);
    const Shape& shape = job.mask.shape;
    if (shape.row_blocks() == 0) {
        const bool none = !job.mask.offsets || offset_at(job.mask.offsets, job.mask.offsets_are_64, 0) == 0;
        return none ? int64_t{-1} : int64_t{kOffsetsOutOfRange};
    }
    const int64_t per_chunk = Chunks(shape, 1, 0, shape.row_blocks()).per_chunk;
    const int64_t blocks_per_chunk = (per_chunk + kMaxGroupRows - 1) / kMaxGroupRows * kMaxGroupRows;  // whole groups
    const int64_t chunks = (shape.row_blocks() + blocks_per_chunk - 1) / blocks_per_chunk;
    if (!job.mask.offsets) write_full_row(job.scratch, shape.cols);
    uint8_t* const x_scratch = job.scratch + shape.words_per_row() * 8;
    for (int64_t first = 0; first < job.x_rows; first += kMaxXRows) {
        const int rows = static_cast<int>(job.x_rows - first < kMaxXRows ? job.x_rows - first : kMaxXRows);
        const PreparedX x = prepare(job, first, rows, x_scratch);
        Multiplying work{job, x, job.scratch, first, rows, blocks_per_chunk};
        // OpenMP waits for its workers even when there is nothing left for them to do. With others using half of the
        // machine that costs 7.9 ms where our own threads need 0.6 (5632 x 2048, two threads, two cores).
        run_chunks(threads, chunks, multiply_chunk, &work, Team::kOwn);
        if (const int64_t failure = work.failure.load(); failure != INT64_MAX) return failure;
    }
    return -1;
}

}  // namespace endor
