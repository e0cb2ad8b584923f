// AVX2: a table of byte shuffles, one entry per byte of the bitmap, moves eight elements at a time.

#include "bitmap.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

ENDOR_TARGET inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ENDOR_TARGET inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
ENDOR_TARGET inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Isa {
    // Eight elements expanded from `values` into the low bytes of a vector.
    ENDOR_TARGET static inline __m128i expand8(uint8_t byte, const uint8_t* values) {
        return _mm_shuffle_epi8(load8(values), load8(kExpand1[byte]));
    }
    ENDOR_TARGET static inline __m128i expand8(uint8_t byte, const uint16_t* values) {
        return _mm_shuffle_epi8(load16(values), load16(kExpand2[byte]));
    }
    ENDOR_TARGET static inline __m256i expand8(uint8_t byte, const uint32_t* values) {
        const __m256i lanes = _mm256_cvtepi8_epi32(load8(kExpand1[byte]));
        const __m256i moved = _mm256_permutevar8x32_epi32(load32(values), lanes);
        return _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), moved);
    }

    template <bool kStream>
    ENDOR_TARGET static inline void store(void* out, __m256i vector) {
        if constexpr (kStream) {
            _mm256_stream_si256(static_cast<__m256i*>(out), vector);
        } else {
            _mm256_storeu_si256(static_cast<__m256i*>(out), vector);
        }
    }

    template <class T, bool kStream>
    ENDOR_TARGET static inline const T* expand(uint64_t word, const T* values, T* out) {
        constexpr int kBytes = 4 / sizeof(T) ? 4 / sizeof(T) : 1;  // bitmap bytes per 32-byte vector
        for (int i = 0; i < 8; i += kBytes) {
            if constexpr (sizeof(T) == 4) {
                const uint8_t byte = static_cast<uint8_t>(word >> 8 * i);
                store<kStream>(out + 8 * i, expand8(byte, values));
                values += __builtin_popcount(byte);
            } else {
                __m128i part[kBytes];
                for (int k = 0; k < kBytes; ++k) {
                    const uint8_t byte = static_cast<uint8_t>(word >> 8 * (i + k));
                    part[k] = expand8(byte, values);
                    values += __builtin_popcount(byte);
                }
                store<kStream>(out + 8 * i, join(part));
            }
        }
        return values;
    }

    ENDOR_TARGET static inline __m256i join(const __m128i (&part)[2]) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
    }
    ENDOR_TARGET static inline __m256i join(const __m128i (&part)[4]) {
        const __m128i halves[2] = {_mm_unpacklo_epi64(part[0], part[1]), _mm_unpacklo_epi64(part[2], part[3])};
        return join(halves);
    }

    template <class T>
    ENDOR_TARGET static inline uint64_t test(const T* dense) {
        const __m256i zero = _mm256_setzero_si256();
        uint64_t empty = 0;
        for (int i = 0; i < kWordBits; i += 32) {
            uint32_t bits = 0;
            if constexpr (sizeof(T) == 1) {
                bits = _mm256_movemask_epi8(_mm256_cmpeq_epi8(load32(dense + i), zero));
            } else if constexpr (sizeof(T) == 2) {
                const __m256i a = _mm256_cmpeq_epi16(load32(dense + i), zero);
                const __m256i b = _mm256_cmpeq_epi16(load32(dense + i + 16), zero);
                // Packing works within halves of the register: put the quarters back in order.
                bits = _mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8));
            } else {
                for (int k = 0; k < 32; k += 8) {
                    const __m256i v = _mm256_cmpeq_epi32(load32(dense + i + k), zero);
                    bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v))) << k;
                }
            }
            empty |= static_cast<uint64_t>(bits) << i;
        }
        return ~empty;
    }

    ENDOR_TARGET static inline void compress8(uint8_t byte, const uint8_t* dense, uint8_t* values) {
        const __m128i packed = _mm_shuffle_epi8(load8(dense), load8(kCompress1[byte]));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(values), packed);
    }
    ENDOR_TARGET static inline void compress8(uint8_t byte, const uint16_t* dense, uint16_t* values) {
        const __m128i packed = _mm_shuffle_epi8(load16(dense), load16(kCompress2[byte]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), packed);
    }
    ENDOR_TARGET static inline void compress8(uint8_t byte, const uint32_t* dense, uint32_t* values) {
        const __m256i lanes = _mm256_cvtepu8_epi32(load8(kCompress1[byte]));
        const __m256i packed = _mm256_permutevar8x32_epi32(load32(dense), lanes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), packed);
    }

    template <class T>
    ENDOR_TARGET static inline T* compress(uint64_t word, const T* dense, T* values) {
        for (int i = 0; i < 8; ++i) {
            const uint8_t byte = static_cast<uint8_t>(word >> 8 * i);
            compress8(byte, dense + 8 * i, values);
            values += __builtin_popcount(byte);
        }
        return values;
    }

    ENDOR_TARGET static inline int64_t popcount(const uint8_t* bitmap, int64_t words) {
        int64_t count = 0;
        for (int64_t i = 0; i < words; ++i) {
            uint64_t word;
            std::memcpy(&word, bitmap + i * 8, sizeof word);
            count += __builtin_popcountll(word);
        }
        return count;
    }

    ENDOR_TARGET static inline void stream_line(uint8_t* to, const uint8_t* from) {
        store<true>(to, load32(from));
        store<true>(to + 32, load32(from + 32));
    }
};

}  // namespace
}  // namespace endor

#include "rows.h"

namespace endor {

const Kernels* avx2_kernels() {
    static constexpr Kernels kernels = make_kernels("avx2");
    const bool supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    return supported ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace endor

#endif
