// The loops of a matmul that every instruction set shares. The including file defines ENDOR_TARGET, the function
// attribute that enables its instructions, and `struct Isa` with
//
//   Columns                                             64 columns of a row of W in registers
//   Sums                                                partial sums of one output
//   X                                                   an element of x as `add` wants it
//   static constexpr int kSums                          partial sums that fit the registers beside the rest
//   static Columns expand(uint64_t word, const uint16_t* values)   may read 64 values
//   static Columns load(const uint16_t* columns)        64 columns that lie side by side
//   static void add(Sums&, const Columns&, const X*)    plus the products with 64 columns of x
//   static float total(const Sums&)                     in a fixed order
//   static constexpr int kHalf                          x goes in runs of this many even and as many odd columns; 0: in order
//
// Where Columns come from is a source, of which there are two here:
//
//   Cursor                                              where a row has got to
//   static Cursor begin(const MatmulRow&, const MatmulValues&)
//   static void enter(Cursor&, const MatmulValues&)     a run of columns with one scale begins
//   static Columns next<kNearEnd>(Cursor&, uint64_t word, const MatmulValues&)
//   static uintptr_t address(const Cursor&, const MatmulValues&)   what `next` will read first
//   static constexpr int64_t kReach                     values that `next` may read more than the word has, unless near the end
//   static constexpr int column_of(int i)               which of 64 columns `next` gives in place i

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

// 64 elements from `from` on, through a buffer where there are fewer.
ENDOR_TARGET inline const uint16_t* readable(const uint16_t* from, const uint8_t* end, uint16_t* buffer) {
    const int64_t left = reinterpret_cast<const uint16_t*>(end) - from;
    if (left >= kWordBits) return from;
    std::memset(buffer, 0, kWordBits * sizeof *buffer);
    if (left > 0) std::memcpy(buffer, from, left * sizeof *buffer);
    return buffer;
}

struct RawSource {
    struct Cursor {
        const uint16_t* at;
    };
    static constexpr int64_t kReach = kWordBits;
    static constexpr int column_of(int i) { return i; }

    ENDOR_TARGET static inline Cursor begin(const MatmulRow& row, const MatmulValues& values) {
        return {reinterpret_cast<const uint16_t*>(values.data) + row.first};
    }
    ENDOR_TARGET static inline void enter(Cursor&, const MatmulValues&) {}
    ENDOR_TARGET static inline uintptr_t address(const Cursor& cursor, const MatmulValues&) {
        return reinterpret_cast<uintptr_t>(cursor.at);
    }

    template <bool kNearEnd>
    ENDOR_TARGET static inline typename Isa::Columns next(Cursor& cursor, uint64_t word, const MatmulValues& values) {
        const uint16_t* from = cursor.at;
        uint16_t buffer[kWordBits];
        cursor.at += __builtin_popcountll(word);
        return Isa::expand(word, kNearEnd ? readable(from, values.end, buffer) : from);
    }
};

// Rows that were decoded: every column is there.
struct DecodedSource {
    using Cursor = RawSource::Cursor;
    static constexpr int64_t kReach = 0;
    static constexpr int column_of(int i) { return i; }

    ENDOR_TARGET static inline Cursor begin(const MatmulRow& row, const MatmulValues& values) {
        return RawSource::begin(row, values);
    }
    ENDOR_TARGET static inline void enter(Cursor&, const MatmulValues&) {}
    ENDOR_TARGET static inline uintptr_t address(const Cursor& cursor, const MatmulValues& values) {
        return RawSource::address(cursor, values);
    }

    template <bool kNearEnd>
    ENDOR_TARGET static inline typename Isa::Columns next(Cursor& cursor, uint64_t, const MatmulValues& values) {
        const uint16_t* from = cursor.at;
        uint16_t buffer[kWordBits];
        cursor.at += kWordBits;
        return Isa::load(kNearEnd ? readable(from, values.end, buffer) : from);
    }
};

// Into the second-level cache: by the time it is used it would have left the first. Fetching what does not exist is
// harmless, but the address must not be made with pointers.
inline void fetch_ahead(uintptr_t from, uintptr_t bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + bytes), 0, 2);
}

// Rows are a few cache lines long, and the hardware starts anew with each: so every row fetches the one as many rows
// further on as there are in a group. Without, 4096 x 11008 takes twice as long (5.6 against 2.8 ms, one thread).
template <class Source>
inline uintptr_t values_ahead_bytes(const typename Source::Cursor* cursors, const MatmulValues& values, int count) {
    constexpr uintptr_t kAlone = 4096;
    const uintptr_t first = Source::address(cursors[0], values), last = Source::address(cursors[count - 1], values);
    return count == 1 ? kAlone : (last - first) / static_cast<uintptr_t>(count - 1) * static_cast<uintptr_t>(count);
}

template <class Source, int kRows, int kXRows, bool kNearEnd>
ENDOR_TARGET void dot_rows(const MatmulRow* rows, const MatmulValues& values, int64_t words, PreparedX x, float* sums) {
    using X = typename Isa::X;
    constexpr bool kDecoded = std::is_same_v<Source, DecodedSource>;
    typename Isa::Sums partial[kRows][kXRows] = {};
    typename Source::Cursor cursors[kRows];
    const uint8_t* bitmaps[kRows];
    for (int r = 0; r < kRows; ++r) {
        bitmaps[r] = rows[r].bitmap;
        cursors[r] = Source::begin(rows[r], values);
    }
    const uintptr_t values_ahead = values_ahead_bytes<Source>(cursors, values, kRows), bitmap_ahead = kRows * words * 8;
    const uint8_t* columns_of_x = x.data;
    for (int64_t first = 0; first < words; first += values.group_words) {
        const int64_t stop = words - first < values.group_words ? words : first + values.group_words;
        for (int r = 0; r < kRows; ++r) Source::enter(cursors[r], values);
        for (int64_t i = first; i < stop; ++i, columns_of_x += kWordBits * sizeof(X)) {
            for (int r = 0; r < kRows; ++r) {
                uint64_t word = 0;
                if constexpr (!kDecoded) {
                    fetch_ahead(Source::address(cursors[r], values), values_ahead);
                    fetch_ahead(reinterpret_cast<uintptr_t>(bitmaps[r] + i * 8), bitmap_ahead);
                    word = matmul_word(bitmaps[r] + i * 8);
                }
                const auto columns = Source::template next<kNearEnd>(cursors[r], word, values);
                for (int m = 0; m < kXRows; ++m) {
                    Isa::add(partial[r][m], columns, reinterpret_cast<const X*>(columns_of_x + m * x.stride_bytes));
                }
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int m = 0; m < kXRows; ++m) sums[r * kXRows + m] = Isa::total(partial[r][m]);
    }
}

// Which of 64 columns of x meets place i of the columns that `add` multiplies.
constexpr int place_of(int i) {
    constexpr int kHalf = Isa::kHalf ? Isa::kHalf : 1;
    if (Isa::kHalf == 0) return i;
    const int run = i / (2 * kHalf) * (2 * kHalf), j = i % (2 * kHalf);
    return run + (j < kHalf ? 2 * j : 2 * (j - kHalf) + 1);
}

template <class Source>
struct Order {
    uint8_t columns[kWordBits];
    bool is_natural;
};

template <class Source>
constexpr Order<Source> make_order() {
    Order<Source> order{{}, true};
    for (int i = 0; i < kWordBits; ++i) {
        const int column = Source::column_of(place_of(i));
        order.columns[i] = static_cast<uint8_t>(column);
        if (column != i) order.is_natural = false;
    }
    return order;
}

template <class Source, class T>
void prepare_rows(const void* x, int64_t rows, int64_t cols, uint8_t* prepared, int64_t stride_bytes) {
    using X = typename Isa::X;
    static constexpr Order<Source> kOrder = make_order<Source>();
    const int64_t words = (cols + kWordBits - 1) / kWordBits;
    for (int64_t m = 0; m < rows; ++m) {
        const T* from = static_cast<const T*>(x) + m * cols;
        X* to = reinterpret_cast<X*>(prepared + m * stride_bytes);
        if constexpr (std::is_same_v<X, T> && kOrder.is_natural) {
            std::memset(to + cols, 0, (words * kWordBits - cols) * sizeof(X));
            if (cols) std::memcpy(to, from, cols * sizeof(X));
        } else {
            T last[kWordBits] = {};
            for (int64_t col = 0; col < cols; col += kWordBits, from += kWordBits, to += kWordBits) {
                const T* word = from;
                if (cols - col < kWordBits) {
                    std::memcpy(last, from, (cols - col) * sizeof(T));
                    word = last;
                }
                if constexpr (std::is_same_v<X, T>) {
                    for (int i = 0; i < kWordBits; ++i) to[i] = word[kOrder.columns[i]];
                } else {
                    for (int i = 0; i < kWordBits; ++i) to[i] = widened(word[kOrder.columns[i]]);
                }
            }
        }
    }
}

template <class Source, class T, int... kIndex>
constexpr MatmulLoops make_loops(std::integer_sequence<int, kIndex...>) {
    return {prepare_rows<Source, T>,
            Source::kReach,
            {group_rows_for(kIndex + 1)...},
            {dot_rows<Source, group_rows_for(kIndex + 1), kIndex + 1, false>...},
            {dot_rows<Source, 1, kIndex + 1, true>...}};
}

template <class Source, class T>
constexpr MatmulLoops kLoops = make_loops<Source, T>(std::make_integer_sequence<int, kMaxXRows>());

}  // namespace
}  // namespace endor
