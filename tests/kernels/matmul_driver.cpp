// Runs every matmul of this machine on honest and on lying sections, in memory allocated to the byte, for a sanitizer to
// watch. Honest products are sums of small integers, so they must be exact. Exits with 1 at the first difference.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "matmul.h"
#include "quantized.h"

using namespace endor;

namespace {

std::mt19937_64 random_bits(1);

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// Exactly as many bytes as the elements need, so that a sanitizer sees every step beyond them.
template <class T>
struct Block {
    explicit Block(int64_t n) : size(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {
        std::memset(static_cast<void*>(data), 0xA5, n * sizeof(T));
    }
    explicit Block(const std::vector<T>& from) : Block(static_cast<int64_t>(from.size())) {
        if (!from.empty()) std::memcpy(data, from.data(), from.size() * sizeof(T));
    }
    ~Block() { std::free(data); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    int64_t size;
    T* data;
};

uint16_t narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

constexpr int kSources = 6;  // raw, int8, int4, int8 and int4 decoded first, exponent

// A weight of small integers in one of the codecs. Scales are powers of two, so that sums of products are exact.
struct Case {
    int source;
    Shape shape;
    bool mask_is_dense;
    int64_t group_words;
    std::vector<float> dense;
    std::vector<uint64_t> bitmap;
    std::vector<int32_t> offsets;
    std::vector<uint16_t> raw;
    std::vector<uint8_t> codes;
    std::vector<int8_t> codebook;
    std::vector<uint16_t> scales;
    Levels levels{0, 1};
    std::vector<int32_t> record_offsets;
    std::vector<uint8_t> records;
    int64_t nnz = 0;

    // Records of the values so far that have none yet: levels that name exponents at random, some not at all.
    void end_block(int64_t first) {
        std::vector<uint16_t> left(raw.begin() + first, raw.end());
        const size_t table = records.size();
        for (int i = 0; i < levels.table_bytes(); ++i) records.push_back(static_cast<uint8_t>(126 + below(6)));
        size_t named = table;
        for (int level = 0; level < levels.count(); ++level) {
            const int planes = levels.width(level), codes = (1 << planes) - 1;
            const size_t stride = (left.size() + 7) / 8, at = records.size();
            records.resize(at + planes * stride);
            std::vector<uint16_t> passed_on;
            for (size_t i = 0; i < left.size(); ++i) {
                int code = 0;
                while (code < codes && records[named + code] != (left[i] >> 7 & 0xFF)) ++code;
                if (code == codes) passed_on.push_back(left[i]);
                for (int plane = 0; plane < planes; ++plane) {
                    records[at + plane * stride + i / 8] |= static_cast<uint8_t>((code >> plane & 1) << i % 8);
                }
            }
            left = passed_on;
            named += codes;
        }
        for (const uint16_t value : left) records.push_back(static_cast<uint8_t>(value >> 7));
        record_offsets.push_back(static_cast<int32_t>(records.size()));
    }

    bool int4() const { return source == 2 || source == 4; }
    int64_t groups() const { return (shape.words_per_row() + group_words - 1) / group_words; }

    // The next kept value: its code, and what it stands for.
    float keep(int64_t row, int64_t col) {
        const float scale = static_cast<float>(1 << below_scale(row, col));
        const int64_t nibble = nnz++ % 2;
        if (source == 0 || source == 5) {
            const float value = static_cast<float>(below(9) + 1);
            raw.push_back(narrowed(value));
            return value;
        }
        if (!int4()) {
            codes.push_back(static_cast<uint8_t>(below(256)));
            return scale * static_cast<int8_t>(codes.back());
        }
        const uint8_t code = static_cast<uint8_t>(below(16));
        if (nibble == 0) codes.push_back(0);
        codes.back() |= static_cast<uint8_t>(code << 4 * nibble);
        return scale * codebook[code];
    }

    int below_scale(int64_t row, int64_t col) const {
        return (scales[row * groups() + col / (group_words * kWordBits)] >> 7) - 127;
    }
};

Case random_case() {
    Case c;
    const int64_t widths[] = {0, 1, 63, 64, 65, 127, 128, 200, 513};
    c.source = static_cast<int>(below(kSources));
    c.shape = {below(40), widths[below(9)], int64_t{1} << below(4)};
    c.mask_is_dense = c.source != 0 && below(3) == 0;
    c.group_words = 1 + below(3);
    for (int i = 0; i < 16; ++i) c.codebook.push_back(static_cast<int8_t>(below(256) - 128));
    for (int64_t i = 0; i < c.shape.rows * c.groups(); ++i) c.scales.push_back(static_cast<uint16_t>((127 + below(3)) << 7));
    const int64_t words = c.shape.words_per_row(), density = c.mask_is_dense ? 100 : below(5) * 25;
    c.bitmap.assign(c.shape.rows * words, 0);
    c.offsets.push_back(0);
    c.record_offsets.push_back(0);
    c.levels = {static_cast<int>(below(3)), static_cast<int>(below(3))};
    if (c.levels.count() == 0) c.levels.singles = 1;
    for (int64_t row = 0; row < c.shape.rows; ++row) {
        const bool empty = !c.mask_is_dense && below(6) == 0;
        for (int64_t col = 0; col < c.shape.cols; ++col) {
            const bool kept = !empty && below(100) < density;
            c.dense.push_back(kept ? c.keep(row, col) : 0.0f);
            if (kept) c.bitmap[row * words + col / 64] |= uint64_t{1} << col % 64;
        }
        if ((row + 1) % c.shape.row_block == 0 || row + 1 == c.shape.rows) {
            if (c.source == 5) c.end_block(c.offsets.back());
            c.offsets.push_back(static_cast<int32_t>(c.nnz));
        }
    }
    return c;
}

bool tell_a_lie(Case& c) {
    if (c.source == 5 && !c.records.empty() && below(2)) {
        const int64_t wrong[] = {-1, 0, INT32_MAX, below(static_cast<int64_t>(c.records.size()))};
        for (int64_t change = below(3); change >= 0; --change) {
            if (below(2)) {
                c.records[below(static_cast<int64_t>(c.records.size()))] ^= static_cast<uint8_t>(1u << below(8));
            } else {
                c.record_offsets[below(static_cast<int64_t>(c.record_offsets.size()))] = static_cast<int32_t>(wrong[below(4)]);
            }
        }
        return true;
    }
    if (c.mask_is_dense) return false;
    switch (below(4)) {
        case 0: c.offsets[below(static_cast<int64_t>(c.offsets.size()))] ^= static_cast<int32_t>(1u << below(32)); return true;
        case 1:
            if (c.bitmap.empty()) return false;
            c.bitmap[below(static_cast<int64_t>(c.bitmap.size()))] ^= uint64_t{1} << below(64);
            return true;
        case 2:
            if (!c.nnz) return false;
            c.nnz = below(c.nnz);
            c.raw.resize(c.source == 0 || c.source == 5 ? c.nnz : 0);
            c.codes.resize(c.source == 0 || c.source == 5 ? 0 : c.int4() ? (c.nnz + 1) / 2 : c.nnz);
            return true;
        default: return false;
    }
}

struct Isa {
    const MatmulKernels* (*matmul)(bool);
    const Kernels* bits;
    const QuantizedKernels* quantized;
    const ExponentKernels* exponent;
};

// Half of the odd cases take x in single precision, a third has a bias, nobody aligns anything.
bool run(const Isa& isa, const Case& c, bool fp32, bool honest) {
    const int64_t x_rows = below(20), x_size = x_rows * c.shape.cols, y_size = x_rows * c.shape.rows;
    const bool biased = below(3) == 0;
    std::vector<float> x_wide(x_size), bias_values(c.shape.rows);
    std::vector<uint16_t> x_narrow;
    for (float& x : x_wide) x = static_cast<float>(below(5)) - 2;
    for (float& bias : bias_values) bias = static_cast<float>(below(9));
    for (const float x : x_wide) x_narrow.push_back(narrowed(x));
    const Block<float> x4(x_wide), bias(bias_values);
    const Block<uint16_t> x2(x_narrow), raw(c.raw), scales(c.scales);
    std::vector<uint8_t> head_bytes, record_bytes = c.records;
    for (const uint16_t value : c.raw) head_bytes.push_back(static_cast<uint8_t>((value >> 8 & 0x80) | (value & 0x7F)));
    record_bytes.resize(record_bytes.size() + kSlackBytes);
    const Block<uint8_t> codes(c.codes), heads(head_bytes), records(record_bytes);
    const Block<int32_t> record_offsets(c.record_offsets);
    const Block<int8_t> codebook(c.codebook);
    const Block<uint64_t> bitmap(c.bitmap);
    const Block<int32_t> offsets(c.offsets);
    const Block<uint8_t> scratch(matmul_scratch_bytes(x_rows, c.shape.cols));
    const Block<uint8_t> y(y_size * (fp32 ? 4 : 2));
    QuantizedDecodeJob quantized{};
    ExponentDecodeJob exponent{};
    MatmulJob job{};
    job.kernels = isa.matmul(fp32);
    job.mask.kernels = isa.bits;
    job.mask.shape = c.shape;
    job.mask.size_log2 = 1;
    job.mask.bitmap = c.mask_is_dense ? nullptr : reinterpret_cast<const uint8_t*>(bitmap.data);
    job.mask.offsets = c.mask_is_dense ? nullptr : offsets.data;
    job.mask.nnz = c.nnz;
    if (c.source == 0) {
        job.source = kRawValues;
        job.values.data = reinterpret_cast<const uint8_t*>(raw.data);
        job.values.end = reinterpret_cast<const uint8_t*>(raw.data + c.nnz);
    } else if (c.source == 5) {
        exponent = {job.mask, isa.exponent, c.levels, false, record_offsets.data, false, records.data,
                    static_cast<int64_t>(c.records.size()), heads.data, nullptr};
        job.source = kRecords;
        job.exponent = &exponent;
        job.decoder = decode_exponent_block;
        job.decoder_context = &exponent;
    } else {
        quantized = {job.mask, isa.quantized, c.int4(), kBfloat16, codes.data, codebook.data, scales.data,
                     c.group_words * kWordBits};
        job.source = c.source == 1 ? kInt8Values : c.source == 2 ? kInt4Values : kDecodedRows;
        job.values = {codes.data, codes.data + codes.size, c.group_words, codebook.data, scales.data, c.groups()};
        job.decoder = decode_quantized_block;
        job.decoder_context = &quantized;
    }
    job.x = fp32 ? static_cast<const void*>(x4.data) : x2.data;
    job.x_rows = x_rows;
    job.bias = biased ? bias.data : nullptr;
    job.scratch = scratch.data;
    job.y = y.data;
    const int64_t failure = matmul(job, static_cast<int>(1 + below(3)));
    if (!honest) return true;  // refused or not: what matters is what it touched
    if (failure != -1) return false;
    for (int64_t m = 0; m < x_rows; ++m) {
        for (int64_t row = 0; row < c.shape.rows; ++row) {
            float expected = biased ? bias_values[row] : 0.0f;
            for (int64_t col = 0; col < c.shape.cols; ++col) {
                expected += c.dense[row * c.shape.cols + col] * x_wide[m * c.shape.cols + col];
            }
            float found;
            if (fp32) {
                std::memcpy(&found, y.data + 4 * (m * c.shape.rows + row), 4);
            } else {
                uint32_t wide = 0;
                std::memcpy(reinterpret_cast<uint8_t*>(&wide) + 2, y.data + 2 * (m * c.shape.rows + row), 2);
                std::memcpy(&found, &wide, 4);
            }
            const float error = found < expected ? expected - found : found - expected;
            if (error > (fp32 ? 0.0f : (expected < 0 ? -expected : expected) / 256)) return false;
        }
    }
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    const int trials = count > 1 ? std::atoi(arguments[1]) : 100;
    const QuantizedKernels* const fast = avx512_quantized_kernels();
    const Isa isas[] = {{avx512bf16_matmul, avx512_kernels(), fast, avx512_exponent_kernels()},
                        {avx512_matmul, avx512_kernels(), fast, avx512_exponent_kernels()},
                        {avx2_matmul, avx2_kernels(), avx2_quantized_kernels(), avx2_exponent_kernels()},
                        {scalar_matmul, scalar_kernels(), scalar_quantized_kernels(), scalar_exponent_kernels()}};
    for (const Isa& isa : isas) {
        if (!isa.matmul(false)) continue;
        for (int trial = 0; trial < trials; ++trial) {
            Case c = random_case();
            const bool honest = below(2) == 0 || !tell_a_lie(c);
            for (const bool fp32 : {false, true}) {
                if (run(isa, c, fp32, honest)) continue;
                std::printf("wrong product: %s, source %d, %lld x %lld, row block %lld\n", isa.matmul(fp32)->name, c.source,
                            static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.cols),
                            static_cast<long long>(c.shape.row_block));
                return 1;
            }
        }
        std::printf("%s ok\n", isa.matmul(false)->name);
    }
    return 0;
}
