// Encode codec `exponent`: histograms, heads and records, each in one pass over the kept values.
//
// Which exponents get which rank and how many levels there are is decided in between, in exponent_levels.py, for all
// backends alike.

#include <cstring>

#include "exponent.h"
#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

constexpr int64_t kHeadValues = 64 * 1024;  // per chunk; a multiple of 8, so that no two chunks share a byte

inline uint8_t exponent_of(uint16_t value, bool float16) {
    return static_cast<uint8_t>(float16 ? value >> 10 & 0x1F : value >> 7 & 0xFF);
}

struct Encoding {
    const ExponentEncodeJob& job;
    Chunks chunks;
    Levels levels;
    const uint8_t* tables;
    const int64_t* record_offsets;
    uint8_t* scratch;
    uint8_t* records;
    int64_t* histograms;
};

// Four counters per exponent: the same exponent often comes again at once, and would wait for its own counter.
void count_block(const ExponentEncodeJob& job, int64_t block, int64_t* histogram) {
    uint32_t counters[4][256] = {};
    const int64_t stop = job.starts[block + 1];
    std::memset(histogram, 0, 256 * sizeof(int64_t));
    for (int64_t i = job.starts[block]; i < stop;) {
        // Counters have 32 bits.
        const int64_t part_stop = stop - i < (int64_t{1} << 30) ? stop : i + (int64_t{1} << 30);
        for (; i + 4 <= part_stop; i += 4) {
            for (int lane = 0; lane < 4; ++lane) ++counters[lane][exponent_of(job.values[i + lane], job.float16)];
        }
        for (; i < part_stop; ++i) ++counters[0][exponent_of(job.values[i], job.float16)];
        for (int e = 0; e < 256; ++e) {
            for (auto& counter : counters) {
                histogram[e] += counter[e];
                counter[e] = 0;
            }
        }
    }
}

void count_chunk(void* context, int64_t chunk) {
    const auto& encoding = *static_cast<const Encoding*>(context);
    for (int64_t block = encoding.chunks.begin(chunk); block < encoding.chunks.end(chunk); ++block) {
        count_block(encoding.job, block, encoding.histograms + 256 * block);
    }
}

struct HeadWork {
    const ExponentEncodeJob& job;
    uint8_t* sign_mantissa;
    uint8_t* mantissa_low;
};

void split_low(const uint16_t* values, int64_t count, uint8_t* low) {
    for (int64_t i = 0; i < count; i += 8) {
        const int64_t here = count - i < 8 ? count - i : 8;
        uint32_t bits = 0;
        for (int64_t k = 0; k < here; ++k) bits |= static_cast<uint32_t>(values[i + k] & 7) << 3 * k;
        const uint8_t bytes[3] = {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8),
                                  static_cast<uint8_t>(bits >> 16)};
        std::memcpy(low + i / 8 * 3, bytes, (here * 3 + 7) / 8);
    }
}

void split_chunk(void* context, int64_t chunk) {
    const auto& work = *static_cast<const HeadWork*>(context);
    const int64_t first = chunk * kHeadValues, all = work.job.starts[work.job.shape.row_blocks()];
    const int64_t count = all - first < kHeadValues ? all - first : kHeadValues;
    const uint16_t* values = work.job.values + first;
    uint8_t* heads = work.sign_mantissa + first;
    if (work.job.float16) {
        for (int64_t i = 0; i < count; ++i) heads[i] = static_cast<uint8_t>((values[i] >> 8 & 0x80) | (values[i] >> 3 & 0x7F));
        split_low(values, count, work.mantissa_low + first * 3 / 8);
    } else {
        for (int64_t i = 0; i < count; ++i) heads[i] = static_cast<uint8_t>((values[i] >> 8 & 0x80) | (values[i] & 0x7F));
    }
}

// Writes the planes of one level for `count` ranks and moves the ranks that go on, less those named, to the front.
// Returns how many they are.
template <int kPlanes>
int64_t write_level(uint8_t* ranks, int64_t count, uint8_t* planes) {
    constexpr int kTop = (1 << kPlanes) - 1;
    const int64_t stride = (count + 7) / 8;
    uint8_t* to = ranks;
    for (int64_t i = 0; i < count; i += 64) {
        const int64_t here = count - i < 64 ? count - i : 64;
        uint64_t bits[2] = {};
        for (int64_t k = 0; k < here; ++k) {
            const uint8_t rank = ranks[i + k];
            const uint64_t code = rank < kTop ? rank : kTop;
            bits[0] |= (code & 1) << k;
            bits[1] |= (code >> 1) << k;
            *to = static_cast<uint8_t>(rank - kTop);
            to += rank >= kTop;
        }
        for (int plane = 0; plane < kPlanes; ++plane) {
            std::memcpy(planes + plane * stride + i / 8, &bits[plane], (here + 7) / 8);
        }
    }
    return to - ranks;
}

void write_record(const Encoding& encoding, int64_t block) {
    const ExponentEncodeJob& job = encoding.job;
    const uint8_t* table = encoding.tables + 256 * block;
    uint8_t rank_of[256];
    for (int rank = 0; rank < 256; ++rank) rank_of[table[rank]] = static_cast<uint8_t>(rank);
    uint8_t* const ranks = encoding.scratch + job.starts[block];
    int64_t count = job.starts[block + 1] - job.starts[block];
    const uint16_t* values = job.values + job.starts[block];
    for (int64_t i = 0; i < count; ++i) ranks[i] = rank_of[exponent_of(values[i], job.float16)];
    uint8_t* position = encoding.records + encoding.record_offsets[block];
    std::memcpy(position, table, encoding.levels.table_bytes());
    position += encoding.levels.table_bytes();
    for (int i = 0; i < encoding.levels.count(); ++i) {
        const int64_t before = count;
        const int planes = encoding.levels.width(i);
        count = planes == 2 ? write_level<2>(ranks, count, position) : write_level<1>(ranks, count, position);
        position += planes * ((before + 7) / 8);
    }
    table += encoding.levels.table_bytes();
    for (int64_t i = 0; i < count; ++i) position[i] = table[ranks[i]];
}

void write_chunk(void* context, int64_t chunk) {
    const auto& encoding = *static_cast<const Encoding*>(context);
    for (int64_t block = encoding.chunks.begin(chunk); block < encoding.chunks.end(chunk); ++block) {
        write_record(encoding, block);
    }
}

}  // namespace

void exponent_histograms(const ExponentEncodeJob& job, int64_t* histograms) {
    Encoding encoding{job, Chunks(job.shape, 1, 0, job.shape.row_blocks()), {}, nullptr, nullptr, nullptr, nullptr,
                      histograms};
    run_chunks(job.threads, encoding.chunks.count(), count_chunk, &encoding);
}

void exponent_heads(const ExponentEncodeJob& job, uint8_t* sign_mantissa, uint8_t* mantissa_low) {
    HeadWork work{job, sign_mantissa, mantissa_low};
    const int64_t values = job.starts[job.shape.row_blocks()];
    run_chunks(job.threads, (values + kHeadValues - 1) / kHeadValues, split_chunk, &work);
}

void exponent_records(const ExponentEncodeJob& job, Levels levels, const uint8_t* tables, const int64_t* record_offsets,
                      uint8_t* scratch, uint8_t* records) {
    Encoding encoding{job, Chunks(job.shape, 1, 0, job.shape.row_blocks()), levels, tables, record_offsets, scratch,
                      records, nullptr};
    run_chunks(job.threads, encoding.chunks.count(), write_chunk, &encoding);
}

}  // namespace endor
