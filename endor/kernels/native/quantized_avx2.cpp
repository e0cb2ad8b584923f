// Codecs `int8` and `int4` with AVX2 and F16C: a table of byte shuffles expands eight integers at a time.

#include "quantized.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

// For every byte of a bitmap, the lower half of each byte that is kept.
struct NibbleMasks {
    uint64_t masks[256];

    uint64_t operator[](uint8_t byte) const { return masks[byte]; }
};

constexpr NibbleMasks make_nibble_masks() {
    NibbleMasks made{};
    for (int byte = 0; byte < 256; ++byte) {
        for (int i = 0; i < 8; ++i) made.masks[byte] |= byte >> i & 1 ? uint64_t{15} << 8 * i : 0;
    }
    return made;
}

constexpr NibbleMasks kNibbleMasks = make_nibble_masks();

struct QuantizedIsa {
    struct Packed {
        const uint8_t* codes;
        int64_t odd;  // int4 in 16 bits: the first nibble is skipped
    };
    using Codebook = __m128i;

    ENDOR_TARGET static inline Codebook load_codebook(const int8_t* codebook) {
        return codebook ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)) : _mm_setzero_si128();
    }

    ENDOR_TARGET static inline Packed load8(const uint8_t* codes, int count, int64_t left, uint8_t* buffer) {
        if (left >= kWordBits) return {codes, 0};
        std::memcpy(buffer, codes, count);
        return {buffer, 0};
    }

    template <FloatType kType>
    ENDOR_TARGET static inline Packed load4(const uint8_t* codes, int64_t odd, int count, int64_t left,
                                            Codebook codebook, uint8_t* buffer) {
        constexpr int64_t kReach = 48;
        if constexpr (kType != kFloat32) {
            // Nibbles are taken from where they are.
            if (left < kReach) {
                std::memcpy(buffer, codes, (count + odd + 1) / 2);
                codes = buffer;
            }
            return {codes, odd};
        }
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
        return {buffer + odd, 0};
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

    // Eight indices in their columns, negative where there is none: pdep deals nibbles out to the bytes that the mask has.
    ENDOR_TARGET static inline uint64_t expand8(uint8_t byte, const uint8_t* codes, int64_t nibble) {
        constexpr uint64_t kNibbles = 0x0F0F0F0F0F0F0F0F;
        uint64_t pairs;
        std::memcpy(&pairs, codes + nibble / 2, sizeof pairs);
        const uint64_t kept = kNibbleMasks[byte];
        return _pdep_u64(pairs >> 4 * (nibble & 1), kept) | (kept ^ kNibbles) << 4;
    }

    template <bool kStream>
    ENDOR_TARGET static inline void put_products(uint64_t word, Packed packed, const Factor& factor, uint16_t* out) {
        int64_t nibble = packed.odd;
        for (int i = 0; i < 4; i += 2) {
            uint64_t parts[4];
            for (int k = 0; k < 4; ++k) {
                const auto byte = static_cast<uint8_t>(word >> (16 * i + 8 * k));
                parts[k] = expand8(byte, packed.codes, nibble);
                nibble += __builtin_popcount(byte);
            }
            const __m256i indices = _mm256_set_epi64x(static_cast<int64_t>(parts[3]), static_cast<int64_t>(parts[2]),
                                                      static_cast<int64_t>(parts[1]), static_cast<int64_t>(parts[0]));
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
        const uint8_t* codes = packed.codes;
        for (int i = 0; i < 8; i += 2) {
            const uint8_t bytes[2] = {static_cast<uint8_t>(word >> 8 * i), static_cast<uint8_t>(word >> 8 * (i + 1))};
            const __m256 low = product8(bytes[0], codes, factor);
            codes += __builtin_popcount(bytes[0]);
            const __m256 high = product8(bytes[1], codes, factor);
            codes += __builtin_popcount(bytes[1]);
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
