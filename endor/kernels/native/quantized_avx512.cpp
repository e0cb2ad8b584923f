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

#include "quantized_expand512.h"

namespace endor {
namespace {

struct QuantizedIsa {
    using Packed = __m512i;
    using Codebook = __m512i;

    ENDOR_TARGET static inline Codebook load_codebook(const int8_t* codebook) {
        return codebook ? codebook_512(codebook) : _mm512_setzero_si512();
    }

    ENDOR_TARGET static inline Packed load8(const uint8_t* codes, int count, int64_t, uint8_t*) {
        return load_first_512(codes, count);
    }

    // Indices where the products are looked up, integers for float32.
    template <FloatType kType>
    ENDOR_TARGET static inline Packed load4(const uint8_t* codes, int64_t odd, int count, int64_t, Codebook codebook,
                                            uint8_t*) {
        const __m512i indices = load_nibbles_512(codes, odd, count);
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

    // Two times 16 products, rounded to 16 bits.
    template <FloatType kType>
    ENDOR_TARGET static inline __m512i to_16_bits(__m512 low, __m512 high) {
        if constexpr (kType == kFloat16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low, kNearest)),
                                      _mm512_cvtps_ph(high, kNearest), 1);
        } else {
            return to_bfloat16_512(low, high);
        }
    }

    // The scale in all lanes; for int4 in 16 bits all products there can be, twice.
    template <bool kInt4, FloatType kType>
    ENDOR_TARGET static inline __m512i factor(Codebook codebook, float scale) {
        const __m512 factor = _mm512_set1_ps(scale);
        if constexpr (!kInt4 || kType == kFloat32) return _mm512_castps_si512(factor);
        const __m512 products = product_512<0>(codebook, factor);
        return to_16_bits<kType>(products, products);
    }

    template <bool kInt4, FloatType kType, bool kStream, class Bits>
    ENDOR_TARGET static inline void put(uint64_t word, Packed packed, __m512i factor, Bits* out) {
        const __m512i integers = expand_bytes_512(word, packed);
        if constexpr (kInt4 && kType != kFloat32) {
            const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(integers));
            const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(integers, 1));
            store<kStream>(out, _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(word), low, factor));
            store<kStream>(out + 32, _mm512_maskz_permutexvar_epi16(static_cast<__mmask32>(word >> 32), high, factor));
        } else {
            const __m512 scale = _mm512_castsi512_ps(factor);
            const __m512 products[4] = {product_512<0>(integers, scale), product_512<1>(integers, scale),
                                        product_512<2>(integers, scale), product_512<3>(integers, scale)};
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
