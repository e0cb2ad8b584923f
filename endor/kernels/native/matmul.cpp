// Multiply a whole matrix: split it into chunks of row blocks, find and check the rows of each, multiply.

#include "matmul.h"

#include <atomic>
#include <cstring>

#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

// Where rows of x are a multiple of 4096 bytes long, the same columns of all of them would compete for one set of a cache.
constexpr int64_t kRowSkewBytes = 64;

struct Multiplying {
    const MatmulJob& job;
    PreparedX x;
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
    RowReader(const MatmulJob& job, int64_t block) : job_(job), row_(block * job.shape.row_block), block_(block - 1) {}

    // False if the row block that the row is part of, or the one before it, breaks a rule.
    bool next(RawRow& row) {
        if (row_ % job_.shape.row_block == 0 && !(at_end() && enter(block_ + 1))) return false;
        const uint8_t* bitmap = job_.bitmap + row_ * job_.shape.words_per_row() * 8;
        const int64_t bits = job_.bits->count(bitmap, 1, job_.shape.cols);
        if (bits < 0) return fails(kBitsInPadding);
        if (bits > stop_ - position_) return fails(kCountMismatch);
        row = {bitmap, job_.values + position_};
        position_ += bits;
        ++row_;
        return true;
    }

    bool at_end() { return position_ == stop_ || fails(kCountMismatch); }
    int64_t failure() const { return failure_; }
    int64_t values_left() const { return job_.nnz - position_; }  // behind the row handed out last

   private:
    bool fails(Rule rule) {
        failure_ = 4 * block_ + rule;
        return false;
    }

    bool enter(int64_t block) {
        block_ = block;
        position_ = offset_at(job_.offsets, job_.offsets_are_64, block);
        stop_ = offset_at(job_.offsets, job_.offsets_are_64, block + 1);
        const bool runs_from_0_to_nnz =
            (block != 0 || position_ == 0) && (block != job_.shape.row_blocks() - 1 || stop_ == job_.nnz);
        const bool in_range = 0 <= position_ && position_ <= stop_ && stop_ <= job_.nnz;
        return (in_range && runs_from_0_to_nnz) || fails(kOffsetsOutOfRange);
    }

    const MatmulJob& job_;
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
            const int64_t at = (work.x_first + m) * job.shape.rows + row + r;
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

void multiply_chunk(void* context, int64_t chunk) {
    auto& work = *static_cast<Multiplying*>(context);
    const MatmulJob& job = work.job;
    const int64_t block = chunk * work.blocks_per_chunk, words = job.shape.words_per_row();
    const int64_t wanted = (block + work.blocks_per_chunk) * job.shape.row_block;
    const int64_t stop = wanted < job.shape.rows ? wanted : job.shape.rows;
    const uint16_t* values_end = job.values + job.nnz;
    const int per_group = job.kernels->group_rows[work.x_rows - 1];
    RowReader reader(job, block);
    for (int64_t row = block * job.shape.row_block; row < stop;) {
        RawRow rows[kMaxGroupRows];
        float sums[kMaxGroupRows * kMaxXRows];
        const int count = stop - row < per_group ? static_cast<int>(stop - row) : per_group;
        for (int r = 0; r < count; ++r) {
            if (!reader.next(rows[r])) return report(work.failure, reader.failure());
        }
        if (count == per_group && reader.values_left() >= kWordBits) {
            job.kernels->group[work.x_rows - 1](rows, values_end, words, work.x, sums);
        } else {
            for (int r = 0; r < count; ++r) {
                job.kernels->near_end[work.x_rows - 1](rows + r, values_end, words, work.x, sums + r * work.x_rows);
            }
        }
        write_outputs(work, row, count, sums);
        row += count;
    }
    if (!reader.at_end()) report(work.failure, reader.failure());
}

int64_t x_stride_bytes(int64_t cols, int64_t element_bytes) {
    return (cols + kWordBits - 1) / kWordBits * kWordBits * element_bytes + kRowSkewBytes;
}

PreparedX prepare(const MatmulJob& job, int64_t first, int rows) {
    const int64_t element_bytes = job.kernels->takes_fp32 ? 4 : 2, cols = job.shape.cols;
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * cols * element_bytes;
    const int64_t stride_bytes = x_stride_bytes(cols, job.kernels->prepared_size);
    job.kernels->prepare(x, rows, cols, job.scratch, stride_bytes);
    return {job.scratch, stride_bytes};
}

}  // namespace

int64_t matmul_scratch_bytes(int64_t x_rows, int64_t cols) {
    return (x_rows < kMaxXRows ? x_rows : kMaxXRows) * x_stride_bytes(cols, sizeof(float));
}

int64_t matmul(const MatmulJob& job, int threads) {
    const Shape& shape = job.shape;
    if (shape.row_blocks() == 0) return offset_at(job.offsets, job.offsets_are_64, 0) == 0 ? -1 : int64_t{kOffsetsOutOfRange};
    const int64_t per_chunk = Chunks(shape, 1, 0, shape.row_blocks()).per_chunk;
    const int64_t blocks_per_chunk = (per_chunk + kMaxGroupRows - 1) / kMaxGroupRows * kMaxGroupRows;  // whole groups
    const int64_t chunks = (shape.row_blocks() + blocks_per_chunk - 1) / blocks_per_chunk;
    for (int64_t first = 0; first < job.x_rows; first += kMaxXRows) {
        const int rows = static_cast<int>(job.x_rows - first < kMaxXRows ? job.x_rows - first : kMaxXRows);
        Multiplying work{job, prepare(job, first, rows), first, rows, blocks_per_chunk};
        // OpenMP waits for its workers even when there is nothing left for them to do. With others using half of the
        // machine that costs 7.9 ms where our own threads need 0.6 (5632 x 2048, two threads, two cores).
        run_chunks(threads, chunks, multiply_chunk, &work, Team::kOwn);
        if (const int64_t failure = work.failure.load(); failure != INT64_MAX) return failure;
    }
    return -1;
}

}  // namespace endor
