// The three operations over whole matrices: split into chunks of row blocks, check what a file may have made up, run.

#include "bitmap.h"

#include <atomic>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace endor {
namespace {

// Dense bytes one thread takes at a time: large against a wake-up, small enough that the last one is not waited for.
constexpr int64_t kChunkBytes = 256 * 1024;

struct Chunks {
    int64_t first;
    int64_t stop;
    int64_t per_chunk;

    Chunks(const Shape& shape, int size_log2, int64_t first_block, int64_t stop_block)
        : first(first_block), stop(stop_block) {
        const int64_t block_bytes = (shape.row_block * shape.cols) << size_log2;
        per_chunk = block_bytes < kChunkBytes ? kChunkBytes / (block_bytes ? block_bytes : 1) : 1;
    }
    int64_t count() const { return (stop - first + per_chunk - 1) / per_chunk; }
    int64_t begin(int64_t chunk) const { return first + chunk * per_chunk; }
    int64_t end(int64_t chunk) const { return begin(chunk + 1) < stop ? begin(chunk + 1) : stop; }
};

struct Rows {
    int64_t first;
    int64_t count;

    Rows(const Shape& shape, int64_t first_block, int64_t stop_block) : first(first_block * shape.row_block) {
        const int64_t stop = stop_block * shape.row_block;
        count = (stop < shape.rows ? stop : shape.rows) - first;
    }
};

struct Decoding {
    const DecodeJob& job;
    Chunks chunks;
    std::atomic<int64_t> failure;
};

inline int64_t offset_at(const DecodeJob& job, int64_t block) {
    return job.offsets_are_64 ? static_cast<const int64_t*>(job.offsets)[block]
                              : static_cast<const int32_t*>(job.offsets)[block];
}

// The rule that a row block breaks, or -1.
int64_t broken_rule(const DecodeJob& job, int64_t block, int64_t start, int64_t stop, const uint8_t* bitmap,
                    int64_t rows) {
    const bool runs_from_0_to_nnz =
        (block != 0 || start == 0) && (block != job.shape.row_blocks() - 1 || stop == job.nnz);
    if (start < 0 || stop < start || stop > job.nnz || !runs_from_0_to_nnz) return kOffsetsOutOfRange;
    const int64_t bits = job.kernels->count(bitmap, rows, job.shape.cols);
    if (bits < 0) return kBitsInPadding;
    return bits == stop - start ? int64_t{-1} : kCountMismatch;
}

void decode_chunk(void* context, int64_t chunk) {
    auto& decoding = *static_cast<Decoding*>(context);
    const DecodeJob& job = decoding.job;
    const Shape& shape = job.shape;
    const int64_t row_bytes = shape.cols << job.size_log2;
    const int64_t out_row = job.start_block * shape.row_block;
    const uint8_t* values_end = job.values + (job.nnz << job.size_log2);
    for (int64_t block = decoding.chunks.begin(chunk); block < decoding.chunks.end(chunk); ++block) {
        const Rows rows(shape, block, block + 1);
        const uint8_t* bitmap = job.bitmap + rows.first * shape.words_per_row() * 8;
        const int64_t start = offset_at(job, block);
        const int64_t rule = broken_rule(job, block, start, offset_at(job, block + 1), bitmap, rows.count);
        if (rule >= 0) {
            const int64_t found = 4 * block + rule;
            int64_t lowest = decoding.failure.load();
            while (found < lowest && !decoding.failure.compare_exchange_weak(lowest, found)) {}
            continue;
        }
        job.kernels->decode[job.size_log2](bitmap, job.values + (start << job.size_log2), values_end,
                                           job.out + (rows.first - out_row) * row_bytes, rows.count, shape.cols,
                                           job.streaming);
    }
#if defined(__x86_64__)
    if (job.streaming) _mm_sfence();  // make the non-temporal stores visible to whoever waits for this chunk
#endif
}

struct Encoding {
    const EncodeJob& job;
    Chunks chunks;
};

void scan_chunk(void* context, int64_t chunk) {
    auto& encoding = *static_cast<Encoding*>(context);
    const EncodeJob& job = encoding.job;
    for (int64_t block = encoding.chunks.begin(chunk); block < encoding.chunks.end(chunk); ++block) {
        const Rows rows(job.shape, block, block + 1);
        job.offsets[block + 1] = job.kernels->scan[job.size_log2](
            job.dense + (rows.first * job.shape.cols << job.size_log2),
            job.bitmap + rows.first * job.shape.words_per_row() * 8, rows.count, job.shape.cols);
    }
}

void compress_chunk(void* context, int64_t chunk) {
    auto& encoding = *static_cast<Encoding*>(context);
    const EncodeJob& job = encoding.job;
    const int64_t begin = encoding.chunks.begin(chunk), end = encoding.chunks.end(chunk);
    const Rows rows(job.shape, begin, end);
    job.kernels->compress[job.size_log2](job.dense + (rows.first * job.shape.cols << job.size_log2),
                                         job.bitmap + rows.first * job.shape.words_per_row() * 8,
                                         job.values + (job.offsets[begin] << job.size_log2),
                                         job.values + (job.offsets[end] << job.size_log2), rows.count,
                                         job.shape.cols);
}

}  // namespace

int64_t decode(const DecodeJob& job, int threads) {
    constexpr int64_t kNone = INT64_MAX;
    Decoding decoding{job, Chunks(job.shape, job.size_log2, job.start_block, job.stop_block), {kNone}};
    if (job.shape.row_blocks() == 0 && offset_at(job, 0) != 0) return kOffsetsOutOfRange;
    run_chunks(threads, decoding.chunks.count(), decode_chunk, &decoding);
    const int64_t failure = decoding.failure.load();
    return failure == kNone ? -1 : failure;
}

int64_t scan(const EncodeJob& job, int threads) {
    const int64_t blocks = job.shape.row_blocks();
    Encoding encoding{job, Chunks(job.shape, job.size_log2, 0, blocks)};
    job.offsets[0] = 0;
    run_chunks(threads, encoding.chunks.count(), scan_chunk, &encoding);
    for (int64_t block = 0; block < blocks; ++block) job.offsets[block + 1] += job.offsets[block];
    return job.offsets[blocks];
}

void compress(const EncodeJob& job, int threads) {
    Encoding encoding{job, Chunks(job.shape, job.size_log2, 0, job.shape.row_blocks())};
    run_chunks(threads, encoding.chunks.count(), compress_chunk, &encoding);
}

}  // namespace endor
