// The loops over rows that every instruction set shares. The including file defines ENDOR_TARGET, the function
// attribute that enables its instructions, and `struct Isa` with these operations on one word of 64 elements:
//
//   static const T* expand<T, kStream>(uint64_t word, const T* values, T* out)   may read 64 values
//   static uint64_t test<T>(const T* dense)                                      bit i: element i has bits set
//   static T* compress<T>(uint64_t word, const T* dense, T* values)              may write 64 values
//   static int64_t popcount(const uint8_t* bitmap, int64_t words)
//
// The loops go through a small buffer wherever 64 elements would be more than there are: at the end of a row that is
// not a multiple of 64 wide, and at the end of the values. So no operation needs a tail of its own.

namespace endor {
namespace {

inline uint64_t load_word(const uint8_t* bitmap) {
    uint64_t word;
    std::memcpy(&word, bitmap, sizeof word);
    return word;
}

// Rows without padding lie back to back in bitmap and matrix alike: treat them as one long row.
inline void join_rows(int64_t& rows, int64_t& cols) {
    if (cols % kWordBits == 0) {
        cols *= rows;
        rows = rows ? 1 : 0;
    }
}

ENDOR_TARGET int64_t count_bits(const uint8_t* bitmap, int64_t rows, int64_t cols) {
    const int64_t words = (cols + kWordBits - 1) / kWordBits;
    if (const int64_t used = cols % kWordBits) {
        uint64_t padding = 0;
        for (int64_t row = 0; row < rows; ++row) padding |= load_word(bitmap + ((row + 1) * words - 1) * 8) >> used;
        if (padding) return -1;
    }
    return Isa::popcount(bitmap, rows * words);
}

template <class T, bool kStream>
ENDOR_TARGET inline const T* expand_near_end(uint64_t word, const T* values, const T* values_end, T* out) {
    T buffer[kWordBits];
    const int64_t left = values_end - values;
    std::memcpy(buffer, values, (left < kWordBits ? left : kWordBits) * sizeof(T));
    return values + (Isa::template expand<T, kStream>(word, buffer, out) - buffer);
}

template <class T, bool kStream>
ENDOR_TARGET void decode_words(const uint8_t* bitmap, const T* values, const T* values_end, T* out, int64_t rows,
                               int64_t cols) {
    constexpr int64_t kPrefetchBytes = 1024;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t left = cols;
        for (; left >= kWordBits; left -= kWordBits, bitmap += 8, out += kWordBits) {
            const uint64_t word = load_word(bitmap);
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(values) + kPrefetchBytes);
            if constexpr (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const uint8_t*>(values) + kPrefetchBytes + 64);
            values = values_end - values >= kWordBits
                         ? Isa::template expand<T, kStream>(word, values, out)
                         : expand_near_end<T, kStream>(word, values, values_end, out);
        }
        if (left) {
            alignas(64) T buffer[kWordBits];
            values = expand_near_end<T, false>(load_word(bitmap), values, values_end, buffer);
            std::memcpy(out, buffer, left * sizeof(T));
            bitmap += 8;
            out += left;
        }
    }
}

template <class T>
ENDOR_TARGET void decode_rows(const uint8_t* bitmap, const uint8_t* values, const uint8_t* values_end, uint8_t* out,
                              int64_t rows, int64_t cols, bool streaming) {
    const T* first = reinterpret_cast<const T*>(values);
    const T* end = reinterpret_cast<const T*>(values_end);
    T* to = reinterpret_cast<T*>(out);
    join_rows(rows, cols);
    // Non-temporal stores exist for whole aligned vectors only.
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && (rows == 1 || cols * sizeof(T) % 64 == 0);
    if (streaming && aligned) {
        decode_words<T, true>(bitmap, first, end, to, rows, cols);
    } else {
        decode_words<T, false>(bitmap, first, end, to, rows, cols);
    }
}

template <class T>
ENDOR_TARGET int64_t scan_rows(const uint8_t* dense, uint8_t* bitmap, int64_t rows, int64_t cols) {
    const T* from = reinterpret_cast<const T*>(dense);
    int64_t count = 0;
    join_rows(rows, cols);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t left = cols; left > 0; left -= kWordBits, bitmap += 8) {
            uint64_t word;
            if (left >= kWordBits) {
                word = Isa::template test<T>(from);
                from += kWordBits;
            } else {
                T buffer[kWordBits] = {};
                std::memcpy(buffer, from, left * sizeof(T));
                word = Isa::template test<T>(buffer);
                from += left;
            }
            std::memcpy(bitmap, &word, sizeof word);
            count += __builtin_popcountll(word);
        }
    }
    return count;
}

template <class T>
ENDOR_TARGET uint8_t* compress_rows(const uint8_t* dense, const uint8_t* bitmap, uint8_t* values, uint8_t* values_end,
                                    int64_t rows, int64_t cols) {
    const T* from = reinterpret_cast<const T*>(dense);
    T* to = reinterpret_cast<T*>(values);
    T* end = reinterpret_cast<T*>(values_end);
    join_rows(rows, cols);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t left = cols; left > 0; left -= kWordBits, bitmap += 8) {
            const uint64_t word = load_word(bitmap);
            if (left >= kWordBits && end - to >= kWordBits) {
                to = Isa::template compress<T>(word, from, to);
                from += kWordBits;
                continue;
            }
            const int64_t used = left < kWordBits ? left : kWordBits;
            T source[kWordBits] = {};
            T packed[kWordBits];
            std::memcpy(source, from, used * sizeof(T));
            const int64_t kept = Isa::template compress<T>(word, source, packed) - packed;
            std::memcpy(to, packed, kept * sizeof(T));
            from += used;
            to += kept;
        }
    }
    return reinterpret_cast<uint8_t*>(to);
}

constexpr Kernels make_kernels(const char* name) {
    return {name,
            count_bits,
            {decode_rows<uint8_t>, decode_rows<uint16_t>, decode_rows<uint32_t>},
            {scan_rows<uint8_t>, scan_rows<uint16_t>, scan_rows<uint32_t>},
            {compress_rows<uint8_t>, compress_rows<uint16_t>, compress_rows<uint32_t>}};
}

}  // namespace
}  // namespace endor
