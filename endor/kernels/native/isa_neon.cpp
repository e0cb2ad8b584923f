// NEON on aarch64: the shuffle tables of the AVX2 path through vqtbl1, which also gives zero beyond its table.

#include "bitmap.h"

#if defined(__aarch64__) && defined(__LITTLE_ENDIAN__) || defined(__aarch64__) && defined(__ARM_NEON)

#include <arm_neon.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET

namespace endor {
namespace {

struct Isa {
    // Byte shuffles of four elements of four bytes, from the table of eight elements of one byte.
    static inline uint8x16_t widen(const uint8_t* lanes) {
        uint32_t four;
        std::memcpy(&four, lanes, sizeof four);
        const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
        static const uint8_t spread[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
        static const uint8_t within[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        const uint8x16_t lane = vqtbl1q_u8(vcombine_u8(bytes, bytes), vld1q_u8(spread));
        // A zero lane is 0x80: saturating arithmetic keeps it out of the table's range.
        return vqaddq_u8(vqshlq_n_u8(lane, 2), vld1q_u8(within));
    }

    static inline void shuffle8(const uint8_t* lanes, const uint8_t* from, uint8_t* to) {
        vst1_u8(to, vtbl1_u8(vld1_u8(from), vld1_u8(lanes)));
    }
    static inline void shuffle8(const uint8_t* lanes, const uint16_t* from, uint16_t* to) {
        const uint8x16_t packed = vld1q_u8(reinterpret_cast<const uint8_t*>(from));
        vst1q_u8(reinterpret_cast<uint8_t*>(to), vqtbl1q_u8(packed, vld1q_u8(lanes)));
    }

    static inline const uint8_t* expand8(uint8_t byte, const uint8_t* values, uint8_t* out) {
        shuffle8(kExpand1[byte], values, out);
        return values + __builtin_popcount(byte);
    }
    static inline const uint16_t* expand8(uint8_t byte, const uint16_t* values, uint16_t* out) {
        shuffle8(kExpand2[byte], values, out);
        return values + __builtin_popcount(byte);
    }
    static inline const uint32_t* expand8(uint8_t byte, const uint32_t* values, uint32_t* out) {
        for (int half = 0; half < 8; half += 4) {
            const uint8_t nibble = byte >> half & 15;
            const uint8x16_t packed = vreinterpretq_u8_u32(vld1q_u32(values));
            vst1q_u32(out + half, vreinterpretq_u32_u8(vqtbl1q_u8(packed, widen(kExpand1[nibble]))));
            values += __builtin_popcount(nibble);
        }
        return values;
    }

    template <class T, bool kStream>
    static inline const T* expand(uint64_t word, const T* values, T* out) {
        for (int i = 0; i < 8; ++i) values = expand8(static_cast<uint8_t>(word >> 8 * i), values, out + 8 * i);
        return values;
    }

    template <class T>
    static inline uint64_t test(const T* dense) {
        uint64_t word = 0;
        for (int i = 0; i < kWordBits; ++i) word |= static_cast<uint64_t>(dense[i] != 0) << i;
        return word;
    }

    static inline uint8_t* compress8(uint8_t byte, const uint8_t* dense, uint8_t* values) {
        shuffle8(kCompress1[byte], dense, values);
        return values + __builtin_popcount(byte);
    }
    static inline uint16_t* compress8(uint8_t byte, const uint16_t* dense, uint16_t* values) {
        shuffle8(kCompress2[byte], dense, values);
        return values + __builtin_popcount(byte);
    }
    static inline uint32_t* compress8(uint8_t byte, const uint32_t* dense, uint32_t* values) {
        for (int half = 0; half < 8; half += 4) {
            const uint8_t nibble = byte >> half & 15;
            const uint8x16_t source = vreinterpretq_u8_u32(vld1q_u32(dense + half));
            vst1q_u32(values, vreinterpretq_u32_u8(vqtbl1q_u8(source, widen(kCompress1[nibble]))));
            values += __builtin_popcount(nibble);
        }
        return values;
    }

    template <class T>
    static inline T* compress(uint64_t word, const T* dense, T* values) {
        for (int i = 0; i < 8; ++i) values = compress8(static_cast<uint8_t>(word >> 8 * i), dense + 8 * i, values);
        return values;
    }

    static inline int64_t popcount(const uint8_t* bitmap, int64_t words) {
        int64_t count = 0;
        for (int64_t i = 0; i < words; ++i) {
            count += vaddlvq_u8(vcombine_u8(vcnt_u8(vld1_u8(bitmap + i * 8)), vdup_n_u8(0)));
        }
        return count;
    }

    static inline void stream_line(uint8_t* to, const uint8_t* from) { std::memcpy(to, from, 64); }
};

}  // namespace
}  // namespace endor

#include "rows.h"

namespace endor {

const Kernels* neon_kernels() {
    static constexpr Kernels kernels = make_kernels("neon");
    return &kernels;
}

}  // namespace endor

#else

namespace endor {

const Kernels* neon_kernels() { return nullptr; }

}  // namespace endor

#endif
