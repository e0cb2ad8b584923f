// Runs the native kernels on random and on hostile inputs, in memory allocated to the byte, for a sanitizer to watch.
// Every result is compared with a few lines of naive code. Exits with 1 and a message at the first difference.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "bitmap.h"

using namespace endor;

namespace {

std::mt19937_64 random_bits(1);

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// Exactly n bytes on the heap, `shift` bytes off the allocator's alignment, full of rubbish.
struct Block {
    explicit Block(int64_t n, int64_t shift = 0)
        : size(n), memory(static_cast<uint8_t*>(std::malloc(n + shift))), data(memory + shift) {
        std::memset(memory, 0xA5, n + shift);
    }
    ~Block() { std::free(memory); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    int64_t size;
    uint8_t* memory;
    uint8_t* data;
};

struct Case {
    const Kernels* kernels;
    Shape shape;
    int size_log2;
    int threads;

    int64_t numel() const { return shape.rows * shape.cols; }
    int64_t bytes() const { return numel() << size_log2; }
    int64_t bitmap_bytes() const { return shape.rows * shape.words_per_row() * 8; }
};

void require(bool holds, const char* what, const Case& c) {
    if (holds) return;
    std::printf("%s: %s, %lld x %lld of %d bytes, row block %lld, %d threads\n", what, c.kernels->name,
                static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.cols), 1 << c.size_log2,
                static_cast<long long>(c.shape.row_block), c.threads);
    std::exit(1);
}

void fill_dense(const Case& c, uint8_t* dense, int density_percent) {
    for (int64_t i = 0; i < c.numel(); ++i) {
        const bool keep = below(100) < density_percent;
        for (int b = 0; b < 1 << c.size_log2; ++b) {
            dense[(i << c.size_log2) + b] = keep ? static_cast<uint8_t>(random_bits()) : 0;
        }
    }
}

bool is_zero(const Case& c, const uint8_t* dense, int64_t i) {
    for (int b = 0; b < 1 << c.size_log2; ++b) {
        if (dense[(i << c.size_log2) + b]) return false;
    }
    return true;
}

int64_t kept_in(const Case& c, const uint8_t* dense) {
    int64_t kept = 0;
    for (int64_t i = 0; i < c.numel(); ++i) kept += !is_zero(c, dense, i);
    return kept;
}

bool bit(const Case& c, const uint8_t* bitmap, int64_t row, int64_t col) {
    return bitmap[row * c.shape.words_per_row() * 8 + col / 8] >> (col % 8) & 1;
}

// What decode must answer.
int64_t naive_failure(const Case& c, const uint8_t* bitmap, const std::vector<int64_t>& offsets, int64_t nnz) {
    const int64_t blocks = c.shape.row_blocks();
    if (blocks == 0 && offsets[0] != 0) return kOffsetsOutOfRange;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = offsets[block], stop = offsets[block + 1];
        if (start < 0 || stop < start || stop > nnz || (block == 0 && start != 0) ||
            (block == blocks - 1 && stop != nnz)) {
            return 4 * block + kOffsetsOutOfRange;
        }
        int64_t bits = 0, padding = 0;
        for (int64_t row = block * c.shape.row_block; row < std::min((block + 1) * c.shape.row_block, c.shape.rows);
             ++row) {
            for (int64_t col = 0; col < c.shape.words_per_row() * 64; ++col) {
                (col < c.shape.cols ? bits : padding) += bit(c, bitmap, row, col);
            }
        }
        if (padding) return 4 * block + kBitsInPadding;
        if (bits != stop - start) return 4 * block + kCountMismatch;
    }
    return -1;
}

int64_t run_decode(const Case& c, const uint8_t* bitmap, const std::vector<int64_t>& offsets, bool wide,
                   const Block& values, uint8_t* out, bool streaming) {
    const std::unique_ptr<int32_t[]> narrow(new int32_t[offsets.size()]);
    for (size_t i = 0; i < offsets.size(); ++i) narrow[i] = static_cast<int32_t>(offsets[i]);
    const void* given = wide ? static_cast<const void*>(offsets.data()) : narrow.get();
    return decode({c.kernels, c.shape, c.size_log2, bitmap, given, wide, values.data, values.size >> c.size_log2, out,
                   0, c.shape.row_blocks(), streaming},
                  c.threads);
}

void round_trip(const Case& c, int density_percent) {
    const Block dense(c.bytes());
    fill_dense(c, dense.data, density_percent);
    const Block bitmap(c.bitmap_bytes()), out(c.bytes(), below(2) ? 0 : 1 << c.size_log2);
    const Block values(kept_in(c, dense.data) << c.size_log2, below(3) << c.size_log2);
    std::vector<int64_t> offsets(c.shape.row_blocks() + 1);
    const int64_t nnz = encode({c.threads, c.kernels, c.shape, c.size_log2, dense.data, bitmap.data, offsets.data(),
                                values.data});
    require(nnz == values.size >> c.size_log2, "encode counts", c);
    require(naive_failure(c, bitmap.data, offsets, nnz) == -1, "encode agrees with itself", c);
    const bool wide = below(2), streaming = below(2);
    require(run_decode(c, bitmap.data, offsets, wide, values, out.data, streaming) == -1, "decode accepts", c);
    require(c.bytes() == 0 || !std::memcmp(out.data, dense.data, c.bytes()), "decode restores", c);

    for (int lie = 0; lie < 6; ++lie) {
        std::vector<int64_t> lying = offsets;
        const Block lying_bitmap(c.bitmap_bytes());
        if (c.bitmap_bytes()) std::memcpy(lying_bitmap.data, bitmap.data, c.bitmap_bytes());
        for (int change = 0; change <= below(3); ++change) {
            if (below(2) && c.bitmap_bytes()) {
                lying_bitmap.data[below(c.bitmap_bytes())] ^= static_cast<uint8_t>(1u << below(8));
            } else {
                const int64_t wrong[] = {-1, 0, nnz, nnz + 1, INT32_MAX, INT32_MIN, below(nnz + 2)};
                lying[below(static_cast<int64_t>(lying.size()))] = wrong[below(7)];
            }
        }
        require(run_decode(c, lying_bitmap.data, lying, wide, values, out.data, streaming) ==
                    naive_failure(c, lying_bitmap.data, lying, nnz),
                "decode names the first lie", c);
    }
}

Case random_case(const Kernels* kernels) {
    const int64_t widths[] = {0, 1, 5, 63, 64, 65, 127, 128, 200, 1000, 4099};
    const int64_t cols = widths[below(11)];
    const int64_t rows = below(cols > 500 ? 12 : 80);
    return {kernels, {rows, cols, int64_t{1} << below(7)}, static_cast<int>(below(3)), below(2) ? 1 : 3};
}

// Large enough for several chunks per thread.
void round_trips_at_once(const Kernels* kernels) {
    const Case large{kernels, {600, 1024, 4}, 1, 3};
    std::vector<std::thread> callers;
    Block dense(large.bytes());
    fill_dense(large, dense.data, 50);
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([&] {
            const Block bitmap(large.bitmap_bytes()), out(large.bytes());
            const Block values(kept_in(large, dense.data) << 1);
            std::vector<int64_t> offsets(large.shape.row_blocks() + 1);
            for (int again = 0; again < 5; ++again) {
                encode({3, kernels, large.shape, 1, dense.data, bitmap.data, offsets.data(), values.data});
                std::memset(out.data, 0xA5, out.size);
                require(run_decode(large, bitmap.data, offsets, true, values, out.data, again % 2) == -1, "accept", large);
                require(!std::memcmp(out.data, dense.data, out.size), "decode restores at once", large);
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main(int argc, char** argv) {
    const int trials = argc > 1 ? std::atoi(argv[1]) : 300;
    for (const Kernels* kernels : {avx512_kernels(), avx2_kernels(), neon_kernels(), scalar_kernels()}) {
        if (!kernels) continue;
        const int densities[] = {0, 3, 50, 97, 100};
        for (int trial = 0; trial < trials; ++trial) round_trip(random_case(kernels), densities[below(5)]);
        round_trips_at_once(kernels);
        std::printf("%s ok\n", kernels->name);
    }
    return 0;
}
