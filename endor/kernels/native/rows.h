// The loops over rows that every instruction set shares. The including file defines ENDOR_TARGET, the function
// attribute that enables its instructions, and `struct Isa` with these operations on one word of 64 elements:
//
//   static const T* expand<T, kStream>(uint64_t word, const T* values, T* out)   may read 64 values
//   static uint64_t test<T>(const T* dense)                                      bit i: element i has bits set
//   static T* compress<T>(uint64_t word, const T* dense, T* values)              may write 64 values
//   static int64_t popcount(const uint8_t* bitmap, int64_t words)
//   static void stream_line(uint8_t* to, const uint8_t* from)                    64 aligned bytes, past the caches
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

// Fetching a line that does not exist is harmless, so nobody checks: but the address must not be made with pointers.
inline void prefetch(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address)); }

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
ENDOR_TARGET __attribute__((noinline)) const T* expand_near_end(uint64_t word, const T* values, const T* values_end, T* out) {
    T buffer[kWordBits];
    const int64_t left = values_end - values;
    std::memcpy(buffer, values, (left < kWordBits ? left : kWordBits) * sizeof(T));
    return values + (Isa::template expand<T, kStream>(word, buffer, out) - buffer);
}

template <class T, bool kStream>
ENDOR_TARGET void decode_words(const uint8_t* bitmap, const T* values, const T* values_end, T* out, int64_t rows,
                               int64_t cols) {
    constexpr uintptr_t kPrefetchBytes = 4096;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t left = cols;
        for (; left >= kWordBits; left -= kWordBits, bitmap += 8, out += kWordBits) {
            const uint64_t word = load_word(bitmap);
            prefetch(reinterpret_cast<uintptr_t>(values) + kPrefetchBytes);
            if constexpr (sizeof(T) == 4) prefetch(reinterpret_cast<uintptr_t>(values) + kPrefetchBytes + 64);
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

// Collects values in the first-level cache and sends them on in whole cache lines, past the caches: an ordinary store
// would first read the line it is about to overwrite, a third of all memory traffic of encoding.
//
// The caller owns the position it writes to, in a register: as a member it would be stored and loaded around every
// vector store, which might overwrite it for all the compiler knows.
template <class T>
class Writer {
   public:
    explicit Writer(uint8_t* values) : skipped_(reinterpret_cast<uintptr_t>(values) % kLine), line_(values - skipped_) {}

    T* begin() { return reinterpret_cast<T*>(buffer_ + skipped_); }

    // Call `next = flush(next)` as soon as `next` reaches this; 64 values further are still in bounds.
    T* limit() { return reinterpret_cast<T*>(buffer_ + kBuffer); }

    ENDOR_TARGET __attribute__((noinline)) T* flush(T* next) {
        int64_t done = 0;
        if (skipped_) {
            std::memcpy(line_ + skipped_, buffer_ + skipped_, kLine - skipped_);
            done = kLine;
            skipped_ = 0;
        }
        for (; done < kBuffer; done += kLine) Isa::stream_line(line_ + done, buffer_ + done);
        line_ += kBuffer;
        std::memcpy(buffer_, buffer_ + kBuffer, kWordBits * sizeof(T));
        return next - kBuffer / sizeof(T);
    }

    void finish(const T* next) {
        const int64_t used = reinterpret_cast<const uint8_t*>(next) - buffer_;
        if (used > skipped_) std::memcpy(line_ + skipped_, buffer_ + skipped_, used - skipped_);
    }

   private:
    static constexpr int64_t kLine = 64;
    static constexpr int64_t kBuffer = 4096;

    alignas(64) uint8_t buffer_[kBuffer + kWordBits * sizeof(T)];
    int64_t skipped_;  // bytes of the first line that are not ours
    uint8_t* line_;    // where buffer_[0] belongs
};

template <class T>
ENDOR_TARGET void compress_rows(const uint8_t* dense, const uint8_t* bitmap, uint8_t* values, int64_t rows,
                                int64_t cols, int64_t prefetch_bytes) {
    const T* from = reinterpret_cast<const T*>(dense);
    Writer<T> writer(values);
    T* next = writer.begin();
    T* const limit = writer.limit();
    join_rows(rows, cols);
    for (int64_t row = 0; row < rows; ++row) {
        int64_t left = cols;
        for (; left >= kWordBits; left -= kWordBits, bitmap += 8, from += kWordBits) {
            for (uintptr_t i = 0; i < sizeof(T); ++i) prefetch(reinterpret_cast<uintptr_t>(from) + prefetch_bytes + i * 64);
            next = Isa::template compress<T>(load_word(bitmap), from, next);
            if (next >= limit) next = writer.flush(next);
        }
        if (left) {
            T buffer[kWordBits] = {};
            std::memcpy(buffer, from, left * sizeof(T));
            next = Isa::template compress<T>(load_word(bitmap), buffer, next);
            if (next >= limit) next = writer.flush(next);
            bitmap += 8;
            from += left;
        }
    }
    writer.finish(next);
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
