// Decode and encode whole matrices: split into chunks of row blocks, check what a file may have made up, run.

#include "bitmap.h"

#include <atomic>
#include <thread>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace endor {
namespace {

// Dense bytes one thread takes at a time: large against a wake-up, small enough that the last one is not waited for.
constexpr int64_t kChunkBytes = 256 * 1024;

// Non-temporal stores are visible to whoever waits for this chunk only after a fence.
inline void drain_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

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
    if (job.streaming) drain_stores();
}

struct Encoding {
    const EncodeJob& job;
    Chunks chunks;
    std::atomic<int64_t> chunks_placed{0};
    int64_t values_placed = 0;  // owned by whoever places chunk number `chunks_placed`
};

// Where the chunk's values start. Chunks are placed in order, each as soon as its bits are counted, so that counting and
// compressing happen in one pass over memory. Chunks are handed out in order too: the one waited for is being counted.
int64_t place_chunk(Encoding& encoding, int64_t chunk, int64_t count) {
    for (int spins = 0; encoding.chunks_placed.load(std::memory_order_acquire) != chunk;) {
        if (++spins > 1000) std::this_thread::yield();
    }
    const int64_t start = encoding.values_placed;
    encoding.values_placed = start + count;
    encoding.chunks_placed.store(chunk + 1, std::memory_order_release);
    return start;
}

void encode_chunk(void* context, int64_t chunk) {
    auto& encoding = *static_cast<Encoding*>(context);
    const EncodeJob& job = encoding.job;
    const int64_t begin = encoding.chunks.begin(chunk), end = encoding.chunks.end(chunk);
    const int64_t row_bytes = job.shape.cols << job.size_log2, bitmap_row_bytes = job.shape.words_per_row() * 8;
    int64_t count = 0;
    for (int64_t block = begin; block < end; ++block) {
        const Rows rows(job.shape, block, block + 1);
        count += job.kernels->scan[job.size_log2](job.dense + rows.first * row_bytes,
                                                  job.bitmap + rows.first * bitmap_row_bytes, rows.count,
                                                  job.shape.cols);
        job.offsets[block + 1] = count;
    }
    const int64_t start = place_chunk(encoding, chunk, count);
    for (int64_t block = begin; block < end; ++block) job.offsets[block + 1] += start;
    const Rows rows(job.shape, begin, end);
    // Compressing is bound by arithmetic, counting by memory: fetch the chunk this thread is likely to count next.
    const int64_t prefetch_bytes = job.threads * rows.count * row_bytes;
    job.kernels->compress[job.size_log2](job.dense + rows.first * row_bytes,
                                         job.bitmap + rows.first * bitmap_row_bytes,
                                         job.values + (start << job.size_log2), rows.count, job.shape.cols,
                                         prefetch_bytes);
    drain_stores();
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

int64_t encode(const EncodeJob& job) {
    Encoding encoding{job, Chunks(job.shape, job.size_log2, 0, job.shape.row_blocks())};
    job.offsets[0] = 0;
    run_chunks(job.threads, encoding.chunks.count(), encode_chunk, &encoding);
    return encoding.values_placed;
}

}  // namespace endor
