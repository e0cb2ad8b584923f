// The loops of a matmul that every instruction set shares. The including file defines ENDOR_TARGET, the function
// attribute that enables its instructions, and `struct Isa` with
//
//   Columns                                             64 columns of a row of W in registers
//   Sums                                                partial sums of one output
//   X                                                   an element of x as `add` wants it
//   static constexpr int kSums                          partial sums that fit the registers beside the rest
//   static Columns expand(uint64_t word, const uint16_t* values)   may read 64 values
//   static void add(Sums&, const Columns&, const X*)    plus the products with 64 columns of x
//   static float total(const Sums&)                     in a fixed order
//   static constexpr int kHalf                          x goes in runs of this many even and as many odd columns; 0: in order
//
// Another codec is another kind of row (what RawRow is to `raw`) with an `expand` of its own that yields Columns. Codes
// with a scale per group of columns fit too: small integers are exact as bfloat16, so such a row adds up a group in Sums
// of its own and adds these, times the scale, to the output's.

#include <cstring>
#include <type_traits>
#include <utility>

namespace endor {
namespace {

inline uint64_t matmul_word(const uint8_t* bitmap) {
    uint64_t word;
    std::memcpy(&word, bitmap, sizeof word);
    return word;
}

inline float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline float widened(float value) { return value; }

constexpr int group_rows_for(int x_rows) {
    int rows = kMaxGroupRows;
    while (rows > 1 && rows * x_rows > Isa::kSums) rows /= 2;
    return rows;
}

template <bool kNearEnd>
ENDOR_TARGET inline typename Isa::Columns expand_next(uint64_t word, const uint16_t*& values, const uint16_t* end) {
    const uint16_t* from = values;
    values += __builtin_popcountll(word);
    if constexpr (kNearEnd) {
        const int64_t left = end - from;
        if (left < kWordBits) {
            uint16_t buffer[kWordBits];
            if (left > 0) std::memcpy(buffer, from, left * sizeof *buffer);
            return Isa::expand(word, buffer);
        }
    }
    return Isa::expand(word, from);
}

// Into the second-level cache: by the time it is used it would have left the first. Fetching what does not exist is
// harmless, but the address must not be made with pointers.
inline void fetch_ahead(const void* from, uintptr_t bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + bytes), 0, 2);
}

// Rows are a few cache lines long, and the hardware starts anew with each: so every row fetches the one as many rows
// further on as there are in a group. Without, 4096 x 11008 takes twice as long (5.6 against 2.8 ms, one thread).
inline uintptr_t values_ahead_bytes(const RawRow* rows, int count) {
    constexpr uintptr_t kAlone = 4096;
    const auto first = reinterpret_cast<uintptr_t>(rows[0].values), last = reinterpret_cast<uintptr_t>(rows[count - 1].values);
    return count == 1 ? kAlone : (last - first) / static_cast<uintptr_t>(count - 1) * static_cast<uintptr_t>(count);
}

template <int kRows, int kXRows, bool kNearEnd>
ENDOR_TARGET void dot_rows(const RawRow* rows, const uint16_t* values_end, int64_t words, PreparedX x, float* sums) {
    using X = typename Isa::X;
    typename Isa::Sums partial[kRows][kXRows] = {};
    const uint8_t* bitmap[kRows];
    const uint16_t* values[kRows];
    for (int r = 0; r < kRows; ++r) {
        bitmap[r] = rows[r].bitmap;
        values[r] = rows[r].values;
    }
    const uintptr_t values_ahead = values_ahead_bytes(rows, kRows), bitmap_ahead = kRows * words * 8;
    const uint8_t* columns_of_x = x.data;
    for (int64_t i = 0; i < words; ++i, columns_of_x += kWordBits * sizeof(X)) {
        for (int r = 0; r < kRows; ++r) {
            fetch_ahead(values[r], values_ahead);
            fetch_ahead(bitmap[r] + i * 8, bitmap_ahead);
            const auto columns = expand_next<kNearEnd>(matmul_word(bitmap[r] + i * 8), values[r], values_end);
            for (int m = 0; m < kXRows; ++m) {
                Isa::add(partial[r][m], columns, reinterpret_cast<const X*>(columns_of_x + m * x.stride_bytes));
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int m = 0; m < kXRows; ++m) sums[r * kXRows + m] = Isa::total(partial[r][m]);
    }
}

template <class T>
void prepare_rows(const void* x, int64_t rows, int64_t cols, uint8_t* prepared, int64_t stride_bytes) {
    using X = typename Isa::X;
    const int64_t words = (cols + kWordBits - 1) / kWordBits;
    for (int64_t m = 0; m < rows; ++m) {
        const T* from = static_cast<const T*>(x) + m * cols;
        X* to = reinterpret_cast<X*>(prepared + m * stride_bytes);
        std::memset(to, 0, words * kWordBits * sizeof(X));
        if constexpr (std::is_same_v<X, T> && Isa::kHalf == 0) {
            std::memcpy(to, from, cols * sizeof(X));
        } else {
            constexpr int64_t kHalf = Isa::kHalf ? Isa::kHalf : 1, kRun = 2 * kHalf;
            int64_t c = 0;
            for (; c + kRun <= cols; c += kRun) {
                for (int64_t i = 0; i < kHalf; ++i) {
                    to[c + i] = widened(from[c + 2 * i]);
                    to[c + kHalf + i] = widened(from[c + 2 * i + 1]);
                }
            }
            for (int64_t i = 0; c + i < cols; ++i) to[c + i % 2 * kHalf + i / 2] = widened(from[c + i]);
        }
    }
}

template <class T, int... kIndex>
constexpr MatmulKernels make_matmul(const char* name, std::integer_sequence<int, kIndex...>) {
    return {name,
            sizeof(T) == 4,
            sizeof(typename Isa::X),
            prepare_rows<T>,
            {group_rows_for(kIndex + 1)...},
            {dot_rows<group_rows_for(kIndex + 1), kIndex + 1, false>...},
            {dot_rows<1, kIndex + 1, true>...}};
}

template <class T>
constexpr MatmulKernels make_matmul(const char* name) {
    return make_matmul<T>(name, std::make_integer_sequence<int, kMaxXRows>());
}

}  // namespace
}  // namespace endor
