// Encode a whole matrix with codec `int8` or `int4`: chunks of row blocks, group by group.

#include "quantized_encode.h"

#include <atomic>
#include <cstring>

#include "parallel.h"
#include "row_blocks.h"

namespace endor {
namespace {

constexpr float kTop = 127.0f;
constexpr float kSmallestScale = 0x1p-126f;
constexpr uint32_t kInfinity = 0x7F800000;

// Writes codes one after the other. Two threads share a byte where one begins in the middle of it.
class CodeWriter {
   public:
    CodeWriter(uint8_t* codes, int64_t first, bool int4)
        : int4_(int4), to_(codes + (int4 ? first / 2 : first)), waiting_(int4 ? first % 2 : 0), shared_(waiting_ != 0) {}

    uint8_t* next() { return buffer_ + waiting_; }

    // Sends on the `count` codes that have been written to next().
    void wrote(int64_t count) {
        if (!int4_) {
            std::memcpy(to_, buffer_, count);
            to_ += count;
            return;
        }
        const int64_t bytes = (waiting_ + count) / 2;
        const bool odd = (waiting_ + count) % 2;
        int64_t done = 0;
        if (shared_ && bytes) {
            __atomic_fetch_or(to_, static_cast<uint8_t>(buffer_[1] << 4), __ATOMIC_RELAXED);
            shared_ = false;
            done = 1;
        }
        for (int64_t i = done; i < bytes; ++i) to_[i] = static_cast<uint8_t>(buffer_[2 * i] | buffer_[2 * i + 1] << 4);
        if (bytes && odd) buffer_[0] = buffer_[2 * bytes];
        to_ += bytes;
        waiting_ = odd;
    }

    void finish() {
        if (waiting_ && !shared_) __atomic_fetch_or(to_, buffer_[0], __ATOMIC_RELAXED);
    }

   private:
    alignas(64) uint8_t buffer_[1 + kGroupColumns + kWordBits] = {};
    bool int4_;
    uint8_t* to_;
    int64_t waiting_;  // codes in the buffer
    bool shared_;      // the first byte's lower half is somebody else's
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float nearest_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    return bfloat16_scale(static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
}

float fit_scale(const QuantizedEncodeJob& job, const NearestTable& table, const float* values, float largest) {
    alignas(64) float shares[kGroupColumns];
    float scales[kMaxFactors], reaches[kMaxFactors];
    int32_t errors[kMaxFactors];
    job.kernels->shares(values, largest, shares);
    const float widest = largest / kTop;
    for (int i = 0; i < job.factor_count; ++i) {
        const float scale = nearest_bfloat16(widest * job.factors[i]);
        scales[i] = scale < kSmallestScale ? kSmallestScale : scale > job.highest_scale ? job.highest_scale : scale;
        reaches[i] = largest / scales[i] * static_cast<float>(job.int4 ? kInt4Steps : kInt8Steps);
    }
    job.kernels->errors[job.int4](shares, reaches, job.factor_count, table, errors);
    float best_scale = 0, best = 0;
    for (int i = 0; i < job.factor_count; ++i) {
        const float share = scales[i] / largest;
        const float error = static_cast<float>(errors[i]) * (share * share);
        if (i == 0 || error < best) {
            best = error;
            best_scale = scales[i];
        }
    }
    return best_scale;
}

struct QuantizedEncoding {
    const QuantizedEncodeJob& job;
    Chunks chunks;
    NearestTable table;
    std::atomic<bool> finite{true};
};

void write_codes(const QuantizedEncoding& work, const float* values, float scale, const uint8_t* bitmap, int64_t count,
                 CodeWriter& writer) {
    alignas(64) uint8_t codes[kGroupColumns];
    const QuantizeKernels& kernels = *work.job.kernels;
    kernels.codes[work.job.int4](values, scale < kSmallestScale ? kSmallestScale : scale, work.table, codes);
    uint8_t* const next = writer.next();
    if (!bitmap) {
        std::memcpy(next, codes, count);
        return writer.wrote(count);
    }
    int64_t kept = 0;
    for (int64_t col = 0; col < count; col += kWordBits) {
        uint64_t word;
        std::memcpy(&word, bitmap + col / 8, sizeof word);
        kept += kernels.compress(word, codes + col, next + kept);
    }
    writer.wrote(kept);
}

bool encode_row(const QuantizedEncoding& work, int64_t row, CodeWriter* writer) {
    const QuantizedEncodeJob& job = work.job;
    const int64_t cols = job.shape.cols, groups = (cols + kGroupColumns - 1) / kGroupColumns;
    const uint8_t* const dense = job.dense + (row * cols << job.size_log2());
    const uint8_t* const bitmap = job.bitmap ? job.bitmap + row * job.shape.words_per_row() * 8 : nullptr;
    alignas(64) float values[kGroupColumns];
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t col = group * kGroupColumns, left = cols - col;
        const int64_t count = left < kGroupColumns ? left : kGroupColumns;
        const uint32_t largest_bits = job.kernels->load[job.type](dense + (col << job.size_log2()), count, values);
        if (largest_bits >= kInfinity) return false;
        float largest;
        std::memcpy(&largest, &largest_bits, sizeof largest);
        const float scale = largest_bits ? fit_scale(job, work.table, values, largest) : 0;
        job.scales[row * groups + group] = static_cast<uint16_t>(bits_of(scale) >> 16);
        if (writer) write_codes(work, values, scale, bitmap ? bitmap + col / 8 : nullptr, count, *writer);
    }
    return true;
}

void encode_quantized_chunk(void* context, int64_t chunk) {
    auto& work = *static_cast<QuantizedEncoding*>(context);
    const QuantizedEncodeJob& job = work.job;
    const int64_t begin = work.chunks.begin(chunk);
    const Rows rows(job.shape, begin, work.chunks.end(chunk));
    CodeWriter writer(job.codes, job.starts ? job.starts[begin] : 0, job.int4);
    for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
        if (!encode_row(work, row, job.starts ? &writer : nullptr)) work.finite.store(false);
    }
    if (job.starts) writer.finish();
}

struct MaskScan {
    const QuantizedEncodeJob& job;
    Chunks chunks;
    uint8_t* bitmap;
    int64_t* starts;
};

void scan_chunk(void* context, int64_t chunk) {
    auto& scan = *static_cast<MaskScan*>(context);
    const QuantizedEncodeJob& job = scan.job;
    for (int64_t block = scan.chunks.begin(chunk); block < scan.chunks.end(chunk); ++block) {
        const Rows rows(job.shape, block, block + 1);
        scan.starts[block + 1] = job.bits->scan[job.size_log2()](
            job.dense + (rows.first * job.shape.cols << job.size_log2()),
            scan.bitmap + rows.first * job.shape.words_per_row() * 8, rows.count, job.shape.cols);
    }
}

}  // namespace

NearestTable make_nearest_table(const int8_t* codebook) {
    NearestTable table{};
    if (!codebook) return table;
    for (int i = 0; i < 8; ++i) {
        table.magnitudes[i] = static_cast<uint8_t>(codebook[i]);
        table.midpoints[i] = static_cast<uint8_t>(i < 7 ? codebook[i] + codebook[i + 1] : 255);
    }
    for (int half = 0; half < 256; ++half) {
        uint8_t index = 0;
        while (index < 7 && table.midpoints[index] < half) ++index;
        table.index[half] = index;
        table.magnitude[half] = table.magnitudes[index];
    }
    return table;
}

void scan_mask(const QuantizedEncodeJob& job, uint8_t* bitmap, int64_t* starts) {
    MaskScan scan{job, Chunks(job.shape, job.size_log2(), 0, job.shape.row_blocks()), bitmap, starts};
    run_chunks(job.threads, scan.chunks.count(), scan_chunk, &scan);
    starts[0] = 0;
    for (int64_t block = 0; block < job.shape.row_blocks(); ++block) starts[block + 1] += starts[block];
}

bool encode_quantized(const QuantizedEncodeJob& job) {
    QuantizedEncoding work{job, Chunks(job.shape, job.size_log2(), 0, job.shape.row_blocks()),
                           make_nearest_table(job.codebook)};
    run_chunks(job.threads, work.chunks.count(), encode_quantized_chunk, &work);
    return work.finite.load();
}

}  // namespace endor
