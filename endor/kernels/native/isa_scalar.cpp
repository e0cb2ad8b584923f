// Plain C++: every machine has it. Set bits are visited one by one (5.4 GB/s; a branch per element gives 0.6).

#include <cstring>

#include "bitmap.h"

#define ENDOR_TARGET

namespace endor {
namespace {

struct Isa {
    template <class T, bool kStream>
    static const T* expand(uint64_t word, const T* values, T* out) {
        std::memset(out, 0, kWordBits * sizeof(T));
        for (; word; word &= word - 1) out[__builtin_ctzll(word)] = *values++;
        return values;
    }

    template <class T>
    static uint64_t test(const T* dense) {
        uint64_t word = 0;
        for (int i = 0; i < kWordBits; ++i) word |= static_cast<uint64_t>(dense[i] != 0) << i;
        return word;
    }

    template <class T>
    static T* compress(uint64_t word, const T* dense, T* values) {
        for (; word; word &= word - 1) *values++ = dense[__builtin_ctzll(word)];
        return values;
    }

    static int64_t popcount(const uint8_t* bitmap, int64_t words) {
        int64_t count = 0;
        for (int64_t i = 0; i < words; ++i) {
            uint64_t word;
            std::memcpy(&word, bitmap + i * 8, sizeof word);
            count += __builtin_popcountll(word);
        }
        return count;
    }

    static void stream_line(uint8_t* to, const uint8_t* from) { std::memcpy(to, from, 64); }
};

}  // namespace
}  // namespace endor

#include "rows.h"

namespace endor {

const Kernels* scalar_kernels() {
    static constexpr Kernels kernels = make_kernels("scalar");
    return &kernels;
}

}  // namespace endor
