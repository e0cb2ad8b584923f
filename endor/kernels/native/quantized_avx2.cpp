// Codecs `int8` and `int4` with AVX2 and F16C: a table of byte shuffles expands eight integers at a time.

#include "quantized.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

struct QuantizedIsa {
    using Packed = const uint8_t*;
    using Codebook = __m128i;

    ENDOR_TARGET static inline Codebook load_codebook(const int8_t* codebook) {
        return codebook ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)) : _mm_setzero_si128();
    }

    ENDOR_TARGET static inline Packed load8(const uint8_t* codes, int count, int64_t left, uint8_t* buffer) {
        if (left >= kWordBits) return codes;
        std::memcpy(buffer, codes, count);
        return buffer;
    }

    template <FloatType kType>
    ENDOR_TARGET static inline Packed load4(const uint8_t* codes, int64_t odd, int count, int64_t left,
                                            Codebook codebook, uint8_t* buffer) {
        constexpr int64_t kReach = 48;
        uint8_t copy[kReach];
        if (left < kReach) {
            std::memcpy(copy, codes, (count + odd + 1) / 2);
            codes = copy;
        }
        const __m128i low_nibble = _mm_set1_epi8(15);
        for (int i = 0; i < kReach; i += 16) {
            const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
            // Indices where the products are looked up, integers for float32.
            __m128i even = _mm_and_si128(pairs, low_nibble), uneven = _mm_and_si128(_mm_srli_epi16(pairs, 4), low_nibble);
            if constexpr (kType == kFloat32) {
                even = _mm_shuffle_epi8(codebook, even);
                uneven = _mm_shuffle_epi8(codebook, uneven);
            }
            _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer + 2 * i), _mm_unpacklo_epi8(even, uneven));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer + 2 * i + 16), _mm_unpackhi_epi8(even, uneven));
        }
        return buffer + odd;
    }

    template <bool kStream>
    ENDOR_TARGET static inline void store(void* out, __m256i vector) {
        if constexpr (kStream) {
            _mm256_stream_si256(static_cast<__m256i*>(out), vector);
        } else {
            _mm256_storeu_si256(static_cast<__m256i*>(out), vector);
        }
    }

    ENDOR_TARGET static inline __m256 product8(uint8_t byte, const uint8_t* packed, __m256 factor) {
        const __m128i integers = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)),
                                                  _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand1[byte])));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(integers)), factor);
    }

    // The nearest bfloat16 in the lower half of each lane.
    ENDOR_TARGET static inline __m256i rounded(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    }

    // For int4 in 16 bits the lower and the upper bytes of all products there can be, each twice.
    struct Factor {
        float scale;
        __m256i low, high;
    };

    template <bool kInt4, FloatType kType>
    ENDOR_TARGET static inline Factor factor(Codebook codebook, float scale) {
        Factor factor{scale, _mm256_setzero_si256(), _mm256_setzero_si256()};
        if constexpr (kInt4 && kType != kFloat32) {
            const __m256 wide = _mm256_set1_ps(scale);
            const __m256 first = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codebook)), wide);
            const __m256 last =
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codebook, 8))), wide);
            const __m256i products = to_16_bits<kType>(first, last);
            const __m256i bytes = _mm256_shuffle_epi8(
                products, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
            factor.low = _mm256_permute4x64_epi64(bytes, 0x88);
            factor.high = _mm256_permute4x64_epi64(bytes, 0xDD);
        }
        return factor;
    }

    // Two times eight products, rounded to 16 bits.
    template <FloatType kType>
    ENDOR_TARGET static inline __m256i to_16_bits(__m256 low, __m256 high) {
        if constexpr (kType == kFloat16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            return _mm256_set_m128i(_mm256_cvtps_ph(high, kNearest), _mm256_cvtps_ph(low, kNearest));
        }
        // Packing works within halves of the register: put the quarters back in order.
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xD8);
    }

    // Where 16 columns come from among the bytes at `low` and those at `high`; bytes of pruned columns are negative.
    ENDOR_TARGET static inline __m128i lanes16(uint8_t low, uint8_t high) {
        const __m128i lower = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand1[low]));
        const __m128i upper = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand1[high]));
        return _mm_or_si128(_mm_unpacklo_epi64(lower, upper), _mm_setr_epi32(0, 0, 0x08080808, 0x08080808));
    }

    // 16 indices in their columns, negative where there is none.
    ENDOR_TARGET static inline __m128i expand16(uint64_t word, int i, const uint8_t* packed) {
        const auto low = static_cast<uint8_t>(word >> 16 * i), high = static_cast<uint8_t>(word >> (16 * i + 8));
        const int before = __builtin_popcountll(word & ((uint64_t{1} << 16 * i) - 1));
        const uint8_t* const first = packed + before;
        const __m128i values =
            _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)),
                               _mm_loadl_epi64(reinterpret_cast<const __m128i*>(first + __builtin_popcount(low))));
        const __m128i lanes = lanes16(low, high);
        return _mm_or_si128(_mm_shuffle_epi8(values, lanes), _mm_and_si128(lanes, _mm_set1_epi8(-128)));
    }

    template <bool kStream>
    ENDOR_TARGET static inline void put_products(uint64_t word, Packed packed, const Factor& factor, uint16_t* out) {
        for (int i = 0; i < 4; i += 2) {
            const __m256i indices = _mm256_set_m128i(expand16(word, i + 1, packed), expand16(word, i, packed));
            const __m256i low = _mm256_shuffle_epi8(factor.low, indices), high = _mm256_shuffle_epi8(factor.high, indices);
            const __m256i even = _mm256_unpacklo_epi8(low, high), uneven = _mm256_unpackhi_epi8(low, high);
            store<kStream>(out + 16 * i, _mm256_permute2x128_si256(even, uneven, 0x20));
            store<kStream>(out + 16 * i + 16, _mm256_permute2x128_si256(even, uneven, 0x31));
        }
    }

    template <bool kInt4, FloatType kType, bool kStream, class Bits>
    ENDOR_TARGET static inline void put(uint64_t word, Packed packed, const Factor& given, Bits* out) {
        if constexpr (kInt4 && kType != kFloat32) return put_products<kStream>(word, packed, given, out);
        const __m256 factor = _mm256_set1_ps(given.scale);
        for (int i = 0; i < 8; i += 2) {
            const uint8_t bytes[2] = {static_cast<uint8_t>(word >> 8 * i), static_cast<uint8_t>(word >> 8 * (i + 1))};
            const __m256 low = product8(bytes[0], packed, factor);
            packed += __builtin_popcount(bytes[0]);
            const __m256 high = product8(bytes[1], packed, factor);
            packed += __builtin_popcount(bytes[1]);
            if constexpr (kType == kFloat32) {
                store<kStream>(out + 8 * i, _mm256_castps_si256(low));
                store<kStream>(out + 8 * i + 8, _mm256_castps_si256(high));
            } else {
                store<kStream>(out + 8 * i, to_16_bits<kType>(low, high));
            }
        }
    }
};

}  // namespace
}  // namespace endor

#include "quantized_loops.h"

namespace endor {

const QuantizedKernels* avx2_quantized_kernels() {
    static constexpr QuantizedKernels kernels = make_quantized_kernels();
    return avx2_kernels() && __builtin_cpu_supports("f16c") ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const QuantizedKernels* avx2_quantized_kernels() { return nullptr; }

}  // namespace endor

#endif
