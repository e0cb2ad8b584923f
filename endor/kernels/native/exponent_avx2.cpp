// Codec `exponent` with AVX2 and BMI2: planes become byte masks, what a level sends on goes through a shuffle table.

#include "exponent.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

struct ExponentIsa {
    struct Vector {
        __m256i half[2];
    };

    struct Table {
        __m256i named[3];
    };

    template <int kPlanes>
    ENDOR_TARGET static inline Table load_table(const uint8_t* named) {
        Table loaded;
        for (int i = 0; i < 3; ++i) loaded.named[i] = _mm256_set1_epi8(static_cast<char>(named[kPlanes == 2 ? i : 0]));
        return loaded;
    }

    // Byte i is 0xFF where bit i is set.
    ENDOR_TARGET static inline __m256i byte_mask(uint32_t bits) {
        const __m256i lanes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    }

    ENDOR_TARGET static inline __m128i expand8(uint8_t byte, const uint8_t* next) {
        return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(next)),
                                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand1[byte])));
    }

    ENDOR_TARGET static inline __m256i expand32(uint32_t bits, const uint8_t*& next) {
        __m128i part[4];
        for (int i = 0; i < 4; ++i) {
            const uint8_t byte = static_cast<uint8_t>(bits >> 8 * i);
            part[i] = expand8(byte, next);
            next += __builtin_popcount(byte);
        }
        return _mm256_set_m128i(_mm_unpacklo_epi64(part[2], part[3]), _mm_unpacklo_epi64(part[0], part[1]));
    }

    template <int kPlanes>
    ENDOR_TARGET static inline Vector exponents(uint64_t a, uint64_t b, const Table& table, const uint8_t*& next) {
        Vector found;
        for (int i = 0; i < 2; ++i) {
            const uint32_t bits_a = static_cast<uint32_t>(a >> 32 * i), bits_b = static_cast<uint32_t>(b >> 32 * i);
            const __m256i mask_a = byte_mask(bits_a);
            __m256i named = table.named[0], passed_on = mask_a;
            if constexpr (kPlanes == 2) {
                const __m256i mask_b = byte_mask(bits_b);
                named = _mm256_blendv_epi8(named, table.named[1], mask_a);
                named = _mm256_blendv_epi8(named, table.named[2], mask_b);
                passed_on = _mm256_and_si256(mask_a, mask_b);
            }
            found.half[i] = _mm256_or_si256(_mm256_andnot_si256(passed_on, named), expand32(bits_a & bits_b, next));
        }
        return found;
    }

    template <bool kFloat16>
    ENDOR_TARGET static inline Vector place(const uint8_t* from) {
        Vector placed_ones;
        for (int i = 0; i < 2; ++i) {
            const __m256i exponents = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i));
            placed_ones.half[i] =
                kFloat16 ? _mm256_and_si256(_mm256_slli_epi16(exponents, 2), _mm256_set1_epi8(0x7C))
                         : select(_mm256_set1_epi8(static_cast<char>(0x80)), _mm256_slli_epi16(exponents, 7),
                                  _mm256_srli_epi16(exponents, 1));
        }
        return placed_ones;
    }

    template <int kPlanes>
    ENDOR_TARGET static inline int64_t count(const uint8_t* a, const uint8_t* b, int64_t words) {
        int64_t found = 0;
        for (int64_t i = 0; i < words; ++i) {
            uint64_t bits[2];
            std::memcpy(bits, a + 8 * i, 8);
            std::memcpy(bits + 1, kPlanes == 2 ? b + 8 * i : a + 8 * i, 8);
            found += __builtin_popcountll(bits[0] & bits[1]);
        }
        return found;
    }

    ENDOR_TARGET static inline void store(const Vector& exponents, uint8_t* out) {
        for (int i = 0; i < 2; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), exponents.half[i]);
    }

    // Bits of `a` where `mask` is set, of `b` elsewhere.
    ENDOR_TARGET static inline __m256i select(__m256i mask, __m256i a, __m256i b) {
        return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
    }

    ENDOR_TARGET static inline __m256i low_bits(const uint8_t* low, int shift) {
        int64_t spread[4];
        for (int i = 0; i < 4; ++i) {
            uint32_t bits;
            std::memcpy(&bits, low + 3 * i, sizeof bits);
            spread[i] = static_cast<int64_t>(_pdep_u64(bits >> shift, 0x0707070707070707));
        }
        return _mm256_setr_epi64x(spread[0], spread[1], spread[2], spread[3]);
    }

    template <bool kStream>
    ENDOR_TARGET static inline void put(uint16_t* out, __m256i values) {
        if constexpr (kStream) {
            _mm256_stream_si256(reinterpret_cast<__m256i*>(out), values);
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), values);
        }
    }

    template <bool kFloat16, bool kStream>
    ENDOR_TARGET static inline void join(const Vector& exponents, const uint8_t* sign_mantissa, const uint8_t* low,
                                         int shift, uint16_t* out) {
        const __m256i top_bit = _mm256_set1_epi8(static_cast<char>(0x80));
        for (int i = 0; i < 2; ++i) {
            const __m256i head = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sign_mantissa + 32 * i));
            const __m256i exponent = exponents.half[i];
            __m256i high_bytes, low_bytes;
            // Shifts of 16-bit lanes move bits into the neighbouring byte; every select leaves those out.
            if constexpr (kFloat16) {
                const __m256i mantissa = _mm256_and_si256(_mm256_srli_epi16(head, 5), _mm256_set1_epi8(3));
                high_bytes = select(top_bit, head, _mm256_or_si256(exponent, mantissa));
                low_bytes = select(_mm256_set1_epi8(static_cast<char>(0xF8)), _mm256_slli_epi16(head, 3),
                                   low_bits(low + 12 * i, shift));
            } else {
                high_bytes = select(top_bit, head, exponent);
                low_bytes = select(top_bit, exponent, head);
            }
            // Unpacking works within halves of the register: values 0-7 and 16-23, then 8-15 and 24-31.
            const __m256i even = _mm256_unpacklo_epi8(low_bytes, high_bytes);
            const __m256i odd = _mm256_unpackhi_epi8(low_bytes, high_bytes);
            put<kStream>(out + 32 * i, _mm256_permute2x128_si256(even, odd, 0x20));
            put<kStream>(out + 32 * i + 16, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    }
};

}  // namespace
}  // namespace endor

#include "exponent_loops.h"

namespace endor {

const ExponentKernels* avx2_exponent_kernels() {
    static constexpr ExponentKernels kernels = make_exponent_kernels();
    return avx2_kernels() ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const ExponentKernels* avx2_exponent_kernels() { return nullptr; }

}  // namespace endor

#endif
