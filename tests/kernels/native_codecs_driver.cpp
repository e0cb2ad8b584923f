// Runs the kernels of the codecs on random and on hostile inputs, in memory allocated to the byte, for a sanitizer to
// watch. Results of every instruction set are compared with the input (`exponent`) or with plain C++ (`int8`, `int4`).
// Exits with 1 and a message at the first difference.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "bitmap.h"
#include "exponent.h"
#include "quantized.h"
#include "quantized_encode.h"

using namespace endor;

namespace {

std::mt19937_64 random_bits(1);

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// Exactly n elements on the heap, full of rubbish.
template <class T>
struct Exact {
    explicit Exact(int64_t n) : size(n), data(static_cast<T*>(std::malloc(n * sizeof(T)))) {
        if (n) std::memset(data, 0xA5, n * sizeof(T));
    }
    Exact(const Exact& other) : Exact(other.size) {
        if (size) std::memcpy(data, other.data, size * sizeof(T));
    }
    ~Exact() { std::free(data); }
    Exact& operator=(const Exact&) = delete;

    int64_t size;
    T* data;
};

struct Isa {
    const Kernels* mask;
    const ExponentKernels* exponent;
    const QuantizedKernels* quantized;
    const QuantizeKernels* quantize;
};

std::vector<Isa> isas() {
    std::vector<Isa> found;
    if (avx512_exponent_kernels() && avx512_quantized_kernels()) {
        found.push_back({avx512_kernels(), avx512_exponent_kernels(), avx512_quantized_kernels(), avx512_quantize_kernels()});
    }
    if (avx2_exponent_kernels() && avx2_quantized_kernels()) {
        found.push_back({avx2_kernels(), avx2_exponent_kernels(), avx2_quantized_kernels(), avx2_quantize_kernels()});
    }
    found.push_back({scalar_kernels(), scalar_exponent_kernels(), scalar_quantized_kernels(), scalar_quantize_kernels()});
    return found;
}

void require(bool holds, const char* what, const Shape& shape, const char* isa) {
    if (holds) return;
    std::printf("%s: %s, %lld x %lld, row block %lld\n", what, isa, static_cast<long long>(shape.rows),
                static_cast<long long>(shape.cols), static_cast<long long>(shape.row_block));
    std::exit(1);
}

Shape random_shape() {
    const int64_t widths[] = {0, 1, 5, 63, 64, 65, 127, 128, 200, 1000, 4099, 20000};
    const int64_t cols = widths[below(12)];
    return {below(cols > 500 ? 6 : 60), cols, int64_t{1} << below(7)};
}

// A matrix under a mask: bitmap and starts, or only starts.
struct Masked {
    Shape shape;
    bool dense;
    Exact<uint16_t> matrix;
    Exact<uint8_t> bitmap;
    Exact<int64_t> starts;
    Exact<uint16_t> values;
    int64_t nnz;

    Masked(const Shape& s, bool is_dense, int density_percent)
        : shape(s), dense(is_dense), matrix(s.rows * s.cols), bitmap(is_dense ? 0 : s.rows * s.words_per_row() * 8),
          starts(s.row_blocks() + 1), values(matrix.size), nnz(matrix.size) {
        const int common = static_cast<int>(below(256));
        for (int64_t i = 0; i < matrix.size; ++i) {
            uint16_t value = static_cast<uint16_t>(random_bits());
            // Mostly a few exponents, now and then any.
            if (below(10)) value = static_cast<uint16_t>((value & 0x807F) | ((common + below(4)) & 0xFF) << 7);
            matrix.data[i] = below(100) < density_percent ? value : 0;
        }
        if (!dense) {
            nnz = encode({1, scalar_kernels(), shape, 1, reinterpret_cast<uint8_t*>(matrix.data), bitmap.data, starts.data,
                          reinterpret_cast<uint8_t*>(values.data)});
            return;
        }
        for (int64_t b = 0; b <= shape.row_blocks(); ++b) {
            starts.data[b] = std::min(b * shape.row_block, shape.rows) * shape.cols;
        }
        if (matrix.size) std::memcpy(values.data, matrix.data, matrix.size * 2);
    }

    DecodeJob job(const Isa& isa, int size_log2, uint8_t* out) const {
        return {isa.mask, shape, size_log2, bitmap.data, dense ? nullptr : starts.data, true, nullptr, nnz, out, 0,
                shape.row_blocks(), below(2) == 1};
    }
};

struct Records {
    Levels levels;
    bool float16;
    Exact<int64_t> offsets;
    Exact<uint8_t> bytes;
    Exact<uint8_t> heads;
    Exact<uint8_t> low;
};

int64_t record_bytes(const int64_t* histogram, const uint8_t* table, Levels levels) {
    int64_t left = std::accumulate(histogram, histogram + 256, int64_t{0}), bytes = levels.table_bytes();
    int named = 0;
    for (int i = 0; i < levels.count(); ++i) {
        bytes += levels.width(i) * ((left + 7) / 8);
        for (int k = 0; k < (1 << levels.width(i)) - 1; ++k) left -= histogram[table[named++]];
    }
    return bytes + left;
}

Records encode_records(const Masked& m, Levels levels, bool float16) {
    const int64_t blocks = m.shape.row_blocks();
    const ExponentEncodeJob job{static_cast<int>(1 + below(3)), m.shape, m.starts.data, m.values.data, float16};
    std::vector<int64_t> histograms(blocks * 256), offsets(blocks + 1);
    exponent_histograms(job, histograms.data());
    std::vector<uint8_t> tables(blocks * 256);
    for (int64_t b = 0; b < blocks; ++b) {
        uint8_t* table = tables.data() + 256 * b;
        const int64_t* histogram = histograms.data() + 256 * b;
        std::iota(table, table + 256, uint8_t{0});
        std::stable_sort(table, table + 256, [&](uint8_t x, uint8_t y) { return histogram[x] > histogram[y]; });
        offsets[b + 1] = offsets[b] + record_bytes(histogram, table, levels);
    }
    Records r{levels, float16, Exact<int64_t>(blocks + 1), Exact<uint8_t>(offsets[blocks] + kSlackBytes),
              Exact<uint8_t>(m.nnz), Exact<uint8_t>(float16 ? (3 * m.nnz + 7) / 8 : 0)};
    std::memcpy(r.offsets.data, offsets.data(), offsets.size() * sizeof(int64_t));
    const Exact<uint8_t> scratch(m.nnz);
    exponent_heads(job, r.heads.data, r.low.data);
    exponent_records(job, levels, tables.data(), r.offsets.data, scratch.data, r.bytes.data);
    return r;
}

int64_t run_exponent(const Masked& m, const Records& r, const Isa& isa, uint16_t* out) {
    return decode_exponent({m.job(isa, 1, reinterpret_cast<uint8_t*>(out)), isa.exponent, r.levels, r.float16,
                            r.offsets.data, true, r.bytes.data, r.bytes.size - kSlackBytes, r.heads.data, r.low.data},
                           static_cast<int>(1 + below(3)));
}

void exponent_round_trip(int density_percent) {
    const Masked m(random_shape(), below(3) == 0, density_percent);
    Levels levels{static_cast<int>(below(3)), static_cast<int>(below(9))};
    if (levels.count() == 0) levels.singles = 1;
    const Records r = encode_records(m, levels, below(2) == 1);
    for (const Isa& isa : isas()) {
        const Exact<uint16_t> out(m.matrix.size);
        require(run_exponent(m, r, isa, out.data) == -1, "exponent accepts", m.shape, isa.mask->name);
        require(!out.size || !std::memcmp(out.data, m.matrix.data, out.size * 2), "exponent restores", m.shape,
                isa.mask->name);
    }
    for (int lie = 0; lie < 4; ++lie) {
        const Records lying = r;
        const Masked lying_mask = m;
        for (int change = 0; change <= below(3); ++change) {
            const int64_t wrong[] = {-1, 0, m.nnz, lying.bytes.size, INT32_MAX, INT64_MIN, below(lying.bytes.size)};
            if (below(2)) {
                lying.bytes.data[below(lying.bytes.size)] ^= static_cast<uint8_t>(1u << below(8));
            } else if (below(3) == 0 && lying_mask.bitmap.size) {
                lying_mask.bitmap.data[below(lying_mask.bitmap.size)] ^= static_cast<uint8_t>(1u << below(8));
            } else {
                lying.offsets.data[below(lying.offsets.size)] = wrong[below(7)];
            }
        }
        const Exact<uint16_t> expected(m.matrix.size);
        const int64_t answer = run_exponent(lying_mask, lying, isas().back(), expected.data);
        for (const Isa& isa : isas()) {
            const Exact<uint16_t> out(m.matrix.size);
            const int64_t found = run_exponent(lying_mask, lying, isa, out.data);
            require(found == answer, "all answer alike", m.shape, isa.mask->name);
            require(found != -1 || !out.size || !std::memcmp(out.data, expected.data, out.size * 2),
                    "all decode alike", m.shape, isa.mask->name);
        }
    }
}

void quantized_round_trip(int density_percent) {
    const Masked m(random_shape(), below(3) == 0, density_percent);
    const bool int4 = below(2);
    const auto type = static_cast<FloatType>(below(3));
    const int size_log2 = type == kFloat32 ? 2 : 1;
    const int64_t group_columns = 64 * (1 + below(3)), groups = (m.shape.cols + group_columns - 1) / group_columns;
    const Exact<uint8_t> codes(int4 ? (m.nnz + 1) / 2 : m.nnz);
    const Exact<int8_t> codebook(16);
    const Exact<uint16_t> scales(m.shape.rows * groups);
    for (int64_t i = 0; i < codes.size; ++i) codes.data[i] = static_cast<uint8_t>(random_bits());
    for (int i = 0; i < 16; ++i) codebook.data[i] = static_cast<int8_t>(random_bits());
    for (int64_t i = 0; i < scales.size; ++i) scales.data[i] = static_cast<uint16_t>((90 + below(60)) << 7 | below(128));
    const bool lie = scales.size && below(4) == 0;
    const uint16_t bad_scales[] = {0x7FC0, 0x7F80, 0x7F81, 0x0001, 0x007F, 0x8000, 0xBF80, 0xFFFF};
    const int64_t wrong_row = lie ? below(m.shape.rows) : 0;
    if (lie) scales.data[wrong_row * groups + below(groups)] = bad_scales[below(8)];
    const int64_t right_answer = lie ? 4 * (wrong_row / m.shape.row_block) + kBadRecord : -1;
    const Exact<uint8_t> expected(m.matrix.size << size_log2);
    const std::vector<Isa> all = isas();
    for (size_t i = all.size(); i-- > 0;) {
        const Exact<uint8_t> out(expected.size);
        uint8_t* const to = i == all.size() - 1 ? expected.data : out.data;
        const int64_t answer =
            decode_quantized({m.job(all[i], size_log2, to), all[i].quantized, int4, type, codes.data,
                              int4 ? codebook.data : nullptr, scales.data, group_columns},
                             static_cast<int>(1 + below(3)));
        require(answer == right_answer, "quantized accepts", m.shape, all[i].mask->name);
        require(lie || !out.size || to == expected.data || !std::memcmp(out.data, expected.data, out.size),
                "quantized agrees", m.shape, all[i].mask->name);
    }
}

// Scales and codes of random bits, in memory to the byte: all alike, or all refused.
void quantized_encoding(int density_percent) {
    const Masked m(random_shape(), below(3) == 0, density_percent);
    const bool int4 = below(2), scales_only = below(8) == 0;
    const auto type = static_cast<FloatType>(below(2));  // of 16 bits, as the matrix
    const bool finite = below(4) != 0;
    for (int64_t i = 0; finite && i < m.matrix.size; ++i) m.matrix.data[i] &= 0xBBFF;
    const int64_t groups = (m.shape.cols + kGroupColumns - 1) / kGroupColumns;
    const Exact<int8_t> codebook(16);
    for (int i = 0, entry = 0; i < 8; ++i) {
        entry += static_cast<int>(1 + below(15));
        codebook.data[i] = static_cast<int8_t>(entry);
        codebook.data[i + 8] = static_cast<int8_t>(-entry);
    }
    codebook.data[7] = 127;  // as in every codebook that is written: sums of squares are sure to fit
    codebook.data[15] = -127;
    const Exact<float> factors(below(12) + 1);
    for (int64_t i = 0; i < factors.size; ++i) factors.data[i] = 1 - (int4 ? 0.03f : 0.005f) * static_cast<float>(i);
    const Exact<uint16_t> expected_scales(m.shape.rows * groups);
    const Exact<uint8_t> expected_codes(int4 ? (m.nnz + 1) / 2 : m.nnz);
    const std::vector<Isa> all = isas();
    bool answer = true;
    for (size_t i = all.size(); i-- > 0;) {
        const bool first = i == all.size() - 1;
        const Exact<uint8_t> bitmap(m.bitmap.size);
        const Exact<int64_t> starts(m.starts.size);
        const Exact<uint16_t> scales(expected_scales.size);
        const Exact<uint8_t> codes(expected_codes.size);
        std::fill(codes.data, codes.data + codes.size, uint8_t{0});
        QuantizedEncodeJob job{static_cast<int>(1 + below(3)), all[i].mask, all[i].quantize, m.shape, int4, type,
                               reinterpret_cast<const uint8_t*>(m.matrix.data), nullptr, m.starts.data, factors.data,
                               static_cast<int>(factors.size), type == kFloat16 ? 508.0f : 0x1.fep120f,
                               int4 ? codebook.data : nullptr, scales.data, codes.data};
        if (!m.dense) {
            if (!finite) {
                job.bitmap = m.bitmap.data;
            } else {
                scan_mask(job, bitmap.data, starts.data);
                job.bitmap = bitmap.data;
                job.starts = starts.data;
            }
        }
        if (scales_only) job.starts = nullptr;
        const bool found = encode_quantized(job);
        if (first) {
            answer = found;
            std::copy(scales.data, scales.data + scales.size, expected_scales.data);
            std::copy(codes.data, codes.data + codes.size, expected_codes.data);
        }
        const char* const name = all[i].mask->name;
        require(found == answer, "encoding answers alike", m.shape, name);
        if (!answer) continue;
        require(std::equal(scales.data, scales.data + scales.size, expected_scales.data), "scales agree", m.shape, name);
        require(std::equal(codes.data, codes.data + codes.size, expected_codes.data), "codes agree", m.shape, name);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const int trials = argc > 1 ? std::atoi(argv[1]) : 300;
    const int densities[] = {0, 3, 50, 97, 100};
    for (int trial = 0; trial < trials; ++trial) {
        exponent_round_trip(densities[below(5)]);
        quantized_round_trip(densities[below(5)]);
        quantized_encoding(densities[below(5)]);
    }
    for (const Isa& isa : isas()) std::printf("%s ok\n", isa.mask->name);
    return 0;
}
