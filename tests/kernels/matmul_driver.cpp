// Runs every matmul of this machine on honest and on lying sections, in memory allocated to the byte, for a sanitizer to
// watch. Honest products are sums of small integers, so they must be exact. Exits with 1 at the first difference.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "matmul.h"

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

struct Case {
    Shape shape;
    std::vector<float> dense;
    std::vector<uint64_t> bitmap;
    std::vector<int32_t> offsets;
    std::vector<uint16_t> values;
};

Case random_case() {
    Case c;
    const int64_t widths[] = {0, 1, 63, 64, 65, 127, 128, 200, 513};
    c.shape = {below(40), widths[below(9)], int64_t{1} << below(4)};
    const int64_t words = c.shape.words_per_row(), density = below(5) * 25;
    c.bitmap.assign(c.shape.rows * words, 0);
    c.offsets.push_back(0);
    for (int64_t row = 0; row < c.shape.rows; ++row) {
        const bool empty = below(6) == 0;
        for (int64_t col = 0; col < c.shape.cols; ++col) {
            const bool kept = !empty && below(100) < density;
            c.dense.push_back(kept ? static_cast<float>(below(9) + 1) : 0.0f);
            if (!kept) continue;
            c.bitmap[row * words + col / 64] |= uint64_t{1} << col % 64;
            c.values.push_back(narrowed(c.dense.back()));
        }
        if ((row + 1) % c.shape.row_block == 0 || row + 1 == c.shape.rows) {
            c.offsets.push_back(static_cast<int32_t>(c.values.size()));
        }
    }
    return c;
}

bool tell_a_lie(Case& c) {
    switch (below(4)) {
        case 0: c.offsets[below(static_cast<int64_t>(c.offsets.size()))] ^= static_cast<int32_t>(1u << below(32)); return true;
        case 1:
            if (c.bitmap.empty()) return false;
            c.bitmap[below(static_cast<int64_t>(c.bitmap.size()))] ^= uint64_t{1} << below(64);
            return true;
        case 2:
            if (c.values.empty()) return false;
            c.values.resize(below(static_cast<int64_t>(c.values.size())));
            return true;
        default: return false;
    }
}

// Half of the odd cases take x in single precision, a third has a bias, nobody aligns anything.
bool run(const MatmulKernels* kernels, const Kernels* bits, const Case& c, bool honest) {
    const bool fp32 = kernels->takes_fp32;
    const int64_t x_rows = below(20), x_size = x_rows * c.shape.cols, y_size = x_rows * c.shape.rows;
    const bool biased = below(3) == 0;
    std::vector<float> x_wide(x_size), bias_values(c.shape.rows);
    std::vector<uint16_t> x_narrow;
    for (float& x : x_wide) x = static_cast<float>(below(5)) - 2;
    for (float& bias : bias_values) bias = static_cast<float>(below(9));
    for (const float x : x_wide) x_narrow.push_back(narrowed(x));
    const Block<float> x4(x_wide), bias(bias_values);
    const Block<uint16_t> x2(x_narrow), values(c.values);
    const Block<uint64_t> bitmap(c.bitmap);
    const Block<int32_t> offsets(c.offsets);
    const Block<uint8_t> scratch(matmul_scratch_bytes(x_rows, c.shape.cols));
    const Block<uint8_t> y(y_size * (fp32 ? 4 : 2));
    MatmulJob job{};
    job.bits = bits;
    job.kernels = kernels;
    job.shape = c.shape;
    job.bitmap = reinterpret_cast<const uint8_t*>(bitmap.data);
    job.offsets = offsets.data;
    job.values = values.data;
    job.nnz = static_cast<int64_t>(c.values.size());
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
    using Choice = const MatmulKernels* (*)(bool);
    const Choice choices[] = {avx512bf16_matmul, avx512_matmul, avx2_matmul, scalar_matmul};
    const Kernels* bits[] = {avx512_kernels(), avx512_kernels(), avx2_kernels(), scalar_kernels()};
    for (int isa = 0; isa < 4; ++isa) {
        if (!choices[isa](false)) continue;
        for (int trial = 0; trial < trials; ++trial) {
            Case c = random_case();
            const bool honest = below(2) == 0 || !tell_a_lie(c);
            for (const bool fp32 : {false, true}) {
                const MatmulKernels* kernels = choices[isa](fp32);
                if (run(kernels, bits[isa], c, honest)) continue;
                std::printf("wrong product: %s, %lld x %lld, row block %lld\n", kernels->name,
                            static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.cols),
                            static_cast<long long>(c.shape.row_block));
                return 1;
            }
        }
        std::printf("%s ok\n", choices[isa](false)->name);
    }
    return 0;
}
