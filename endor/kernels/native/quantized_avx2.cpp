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
            const __m128i even = _mm_shuffle_epi8(codebook, _mm_and_si128(pairs, low_nibble));
            const __m128i uneven = _mm_shuffle_epi8(codebook, _mm_and_si128(_mm_srli_epi16(pairs, 4), low_nibble));
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

    template <bool kInt4, FloatType kType>
    ENDOR_TARGET static inline float factor(Codebook, float scale) {
        return scale;
    }

    template <bool kInt4, FloatType kType, bool kStream, class Bits>
    ENDOR_TARGET static inline void put(uint64_t word, Packed packed, float scale, Bits* out) {
        const __m256 factor = _mm256_set1_ps(scale);
        for (int i = 0; i < 8; i += 2) {
            const uint8_t bytes[2] = {static_cast<uint8_t>(word >> 8 * i), static_cast<uint8_t>(word >> 8 * (i + 1))};
            const __m256 low = product8(bytes[0], packed, factor);
            packed += __builtin_popcount(bytes[0]);
            const __m256 high = product8(bytes[1], packed, factor);
            packed += __builtin_popcount(bytes[1]);
            if constexpr (kType == kFloat32) {
                store<kStream>(out + 8 * i, _mm256_castps_si256(low));
                store<kStream>(out + 8 * i + 8, _mm256_castps_si256(high));
            } else if constexpr (kType == kFloat16) {
                constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
                store<kStream>(out + 8 * i, _mm256_set_m128i(_mm256_cvtps_ph(high, kNearest), _mm256_cvtps_ph(low, kNearest)));
            } else {
                // Packing works within halves of the register: put the quarters back in order.
                const __m256i packed16 = _mm256_packus_epi32(rounded(low), rounded(high));
                store<kStream>(out + 8 * i, _mm256_permute4x64_epi64(packed16, 0xD8));
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
