// Codecs `int8` and `int4` with AVX-512: expand the integers, convert, scale and round 16 at a time.

#include "quantized.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers of its own intrinsics for a mistake of ours (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstring>

#define ENDOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

struct Lanes {
    alignas(64) uint8_t twice[2][64];  // byte i / 2, of codes whose first nibble is skipped byte (i + 1) / 2
    alignas(64) uint16_t high[32];     // the upper half of each of 2 x 16 words
};

constexpr Lanes make_lanes() {
    Lanes lanes{};
    for (int i = 0; i < 64; ++i) {
        lanes.twice[0][i] = static_cast<uint8_t>(i / 2);
        lanes.twice[1][i] = static_cast<uint8_t>((i + 1) / 2);
    }
    for (int i = 0; i < 32; ++i) lanes.high[i] = static_cast<uint16_t>(2 * i + 1);
    return lanes;
}

constexpr Lanes kLanes = make_lanes();

struct QuantizedIsa {
    using Packed = __m512i;
    using Codebook = __m512i;

    // Masked loads do not touch what is masked out.
    ENDOR_TARGET static inline __m512i load_first(const uint8_t* from, int bytes) {
        return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, static_cast<unsigned>(bytes)), from);
    }

    ENDOR_TARGET static inline Codebook load_codebook(const int8_t* codebook) {
        if (!codebook) return _mm512_setzero_si512();
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
    }

    ENDOR_TARGET static inline Packed load8(const uint8_t* codes, int count, int64_t, uint8_t*) {
        return load_first(codes, count);
    }

    // Indices where the products are looked up, integers for float32.
    template <FloatType kType>
    ENDOR_TARGET static inline Packed load4(const uint8_t* codes, int64_t odd, int count, int64_t, Codebook codebook,
                                            uint8_t*) {
        const __m512i bytes = load_first(codes, (count + static_cast<int>(odd) + 1) / 2);
        const __m512i pairs =
            _mm512_maskz_permutexvar_epi8(~__mmask64{0}, _mm512_load_si512(kLanes.twice[odd]), bytes);
        const __mmask64 upper = odd ? 0x5555555555555555 : 0xAAAAAAAAAAAAAAAA;
        const __m512i nibbles = _mm512_mask_mov_epi8(pairs, upper, _mm512_srli_epi16(pairs, 4));
        const __m512i indices = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
        return kType == kFloat32 ? _mm512_shuffle_epi8(codebook, indices) : indices;
    }

    template <bool kStream>
    ENDOR_TARGET static inline void store(void* out, __m512i vector) {
        if constexpr (kStream) {
            _mm512_stream_si512(static_cast<__m512i*>(out), vector);
        } else {
            _mm512_storeu_si512(out, vector);
        }
    }

    // float32 whose upper half is the nearest bfloat16.
    ENDOR_TARGET static inline __m512i rounded(__m512 x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    }

    // Two times 16 products, rounded to 16 bits.
    template <FloatType kType>
    ENDOR_TARGET static inline __m512i to_16_bits(__m512 low, __m512 high) {
        if constexpr (kType == kFloat16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, kNearest)),
                                      _mm512_cvtps_ph(high, kNearest), 1);
        } else {
            return _mm512_permutex2var_epi16(rounded(low), _mm512_load_si512(kLanes.high), rounded(high));
        }
    }

    ENDOR_TARGET static inline __m512 product(__m128i integers, __m512 factor) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(integers)), factor);
    }

    // The scale in all lanes; for int4 in 16 bits all products there can be, twice.
    template <bool kInt4, FloatType kType>
    ENDOR_TARGET static inline __m512i factor(Codebook codebook, float scale) {
        const __m512 factor = _mm512_set1_ps(scale);
        if constexpr (!kInt4 || kType == kFloat32) return _mm512_castps_si512(factor);
        const __m512 products = product(_mm512_castsi512_si128(codebook), factor);
        return to_16_bits<kType>(products, products);
    }

    template <bool kInt4, FloatType kType, bool kStream, class Bits>
    ENDOR_TARGET static inline void put(uint64_t word, Packed packed, __m512i factor, Bits* out) {
        __m512i zero = _mm512_setzero_si512();
        __asm__("" : "+v"(zero));  // breaks a false dependency: see isa_avx512.cpp
        const __m512i integers = _mm512_mask_expand_epi8(zero, word, packed);
        if constexpr (kInt4 && kType != kFloat32) {
            const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(integers));
            const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(integers, 1));
            store<kStream>(out, _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(word), low, factor));
            store<kStream>(out + 32, _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(word >> 32), high, factor));
        } else {
            const __m512 scale = _mm512_castsi512_ps(factor);
            const __m512 products[4] = {product(_mm512_castsi512_si128(integers), scale),
                                        product(_mm512_extracti32x4_epi32(integers, 1), scale),
                                        product(_mm512_extracti32x4_epi32(integers, 2), scale),
                                        product(_mm512_extracti32x4_epi32(integers, 3), scale)};
            for (int i = 0; i < 4; i += 2) {
                if constexpr (kType == kFloat32) {
                    store<kStream>(out + 16 * i, _mm512_castps_si512(products[i]));
                    store<kStream>(out + 16 * i + 16, _mm512_castps_si512(products[i + 1]));
                } else {
                    store<kStream>(out + 16 * i, to_16_bits<kType>(products[i], products[i + 1]));
                }
            }
        }
    }
};

}  // namespace
}  // namespace endor

#include "quantized_loops.h"

namespace endor {

const QuantizedKernels* avx512_quantized_kernels() {
    static constexpr QuantizedKernels kernels = make_quantized_kernels();
    const bool supported = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512dq");
    return avx512_kernels() && supported ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const QuantizedKernels* avx512_quantized_kernels() { return nullptr; }

}  // namespace endor

#endif
