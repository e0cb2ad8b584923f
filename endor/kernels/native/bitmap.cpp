// Decode and encode whole matrices: split into chunks of row blocks, check what a file may have made up, run.

#include "bitmap.h"

#include <atomic>
#include <thread>

#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

struct Decoding {
    const DecodeJob& job;
    Chunks chunks;
    BlockDecoder decoder;
    const void* context;
    std::atomic<int64_t> failure;
};

// Where the values of a block lie. Under mask `dense` every element is one.
int64_t values_before(const DecodeJob& job, int64_t block) {
    if (job.offsets) return offset_at(job.offsets, job.offsets_are_64, block);
    const int64_t row = block * job.shape.row_block;
    return (row < job.shape.rows ? row : job.shape.rows) * job.shape.cols;
}

// The rule that the mask of a row block breaks, or -1.
int64_t broken_rule(const DecodeJob& job, const Block& block) {
    if (!job.offsets) return -1;
    const bool runs_from_0_to_nnz = (block.number != 0 || block.start == 0) &&
                                    (block.number != job.shape.row_blocks() - 1 || block.stop == job.nnz);
    if (block.start < 0 || block.stop < block.start || block.stop > job.nnz || !runs_from_0_to_nnz) {
        return kOffsetsOutOfRange;
    }
    const int64_t bits = job.kernels->count(block.bitmap, block.rows, job.shape.cols);
    if (bits < 0) return kBitsInPadding;
    return bits == block.stop - block.start ? int64_t{-1} : kCountMismatch;
}

void decode_chunk(void* context, int64_t chunk) {
    auto& decoding = *static_cast<Decoding*>(context);
    const DecodeJob& job = decoding.job;
    const int64_t row_bytes = job.shape.cols << job.size_log2;
    for (int64_t number = decoding.chunks.begin(chunk); number < decoding.chunks.end(chunk); ++number) {
        Block block;
        int64_t rule = check_block(job, number, block);
        block.out = job.out + (number - job.start_block) * job.shape.row_block * row_bytes;
        if (rule < 0) rule = decoding.decoder(decoding.context, block);
        if (rule == -1) continue;
        const int64_t found = rule == kNoMemory ? kNoMemory : 4 * number + rule;
        int64_t lowest = decoding.failure.load();
        while (found < lowest && !decoding.failure.compare_exchange_weak(lowest, found)) {}
    }
    if (job.streaming) drain_stores();
}

int64_t decode_raw_block(const void* context, const Block& block) {
    const DecodeJob& job = *static_cast<const DecodeJob*>(context);
    job.kernels->decode[job.size_log2](block.bitmap, job.values + (block.start << job.size_log2),
                                       job.values + (job.nnz << job.size_log2), block.out, block.rows, job.shape.cols,
                                       job.streaming);
    return -1;
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

int64_t check_block(const DecodeJob& job, int64_t number, Block& block) {
    const Rows rows(job.shape, number, number + 1);
    block = {number,
             rows.first,
             rows.count,
             values_before(job, number),
             values_before(job, number + 1),
             job.offsets ? job.bitmap + rows.first * job.shape.words_per_row() * 8 : nullptr,
             nullptr};
    return broken_rule(job, block);
}

int64_t decode_blocks(const DecodeJob& job, int threads, BlockDecoder decoder, const void* context) {
    constexpr int64_t kNone = INT64_MAX;
    const Chunks chunks(job.shape, job.size_log2, job.start_block, job.stop_block);
    Decoding decoding{job, chunks, decoder, context, {kNone}};
    if (job.shape.row_blocks() == 0 && job.offsets && values_before(job, 0) != 0) return kOffsetsOutOfRange;
    run_chunks(threads, chunks.count(), decode_chunk, &decoding);
    const int64_t failure = decoding.failure.load();
    return failure == kNone ? -1 : failure;
}

int64_t decode(const DecodeJob& job, int threads) { return decode_blocks(job, threads, decode_raw_block, &job); }

int64_t encode(const EncodeJob& job) {
    Encoding encoding{job, Chunks(job.shape, job.size_log2, 0, job.shape.row_blocks())};
    job.offsets[0] = 0;
    run_chunks(job.threads, encoding.chunks.count(), encode_chunk, &encoding);
    return encoding.values_placed;
}

}  // namespace endor
