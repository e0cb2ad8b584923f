// What every codec's drivers share: row blocks, chunks of them, and decoding block by block with the mask checked.

#pragma once

#include <cstdint>

#include "bitmap.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace endor {

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

inline int64_t offset_at(const void* offsets, bool are_64, int64_t i) {
    return are_64 ? static_cast<const int64_t*>(offsets)[i] : static_cast<const int32_t*>(offsets)[i];
}

// One row block whose mask is known to be right.
struct Block {
    int64_t number;
    int64_t first_row;
    int64_t rows;
    int64_t start;          // number of the block's first value
    int64_t stop;
    const uint8_t* bitmap;  // of first_row; null under mask `dense`
    uint8_t* out;
};

// Writes a block's rows. Returns -1, kNoMemory, or the Rule that the block breaks.
using BlockDecoder = int64_t (*)(const void* context, const Block& block);

constexpr int64_t kNoMemory = -2;

// Where a row block lies, but not where it goes. Returns -1, or the Rule that its mask breaks.
int64_t check_block(const DecodeJob& job, int64_t number, Block& block);

// Checks the mask of every block and decodes it. Returns -1, kNoMemory, or 4 * row block + Rule of the first block that
// is wrong.
int64_t decode_blocks(const DecodeJob& job, int threads, BlockDecoder decoder, const void* context);

}  // namespace endor
