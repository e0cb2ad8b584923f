// Encode codecs `int8` and `int4` with AVX2 and F16C: eight divisions, 16 distances or 32 look-ups at a time.

#include "quantized_encode.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,f16c,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

constexpr int kLanes = 8;

template <FloatType kType>
ENDOR_TARGET inline __m256 load8(const uint8_t* dense) {
    if constexpr (kType == kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(dense));
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(dense));
    if constexpr (kType == kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

ENDOR_TARGET inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

template <FloatType kType>
ENDOR_TARGET uint32_t load(const uint8_t* dense, int64_t count, float* values) {
    constexpr int64_t kBytes = kType == kFloat32 ? 4 : 2;
    uint8_t padded[kGroupColumns * kBytes];
    if (count < kGroupColumns) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, dense, count * kBytes);
        dense = padded;
    }
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < kGroupColumns; i += kLanes) {
        const __m256 part = load8<kType>(dense + i * kBytes);
        _mm256_storeu_ps(values + i, part);
        largest = _mm256_max_epu32(largest, _mm256_castps_si256(magnitude(part)));
    }
    alignas(32) uint32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    uint32_t found = 0;
    for (const uint32_t lane : lanes) found = lane > found ? lane : found;
    return found;
}

ENDOR_TARGET void shares(const float* values, float largest, float* shares) {
    for (int64_t i = 0; i < kGroupColumns; i += kLanes) {
        _mm256_storeu_ps(shares + i, _mm256_div_ps(magnitude(_mm256_loadu_ps(values + i)), _mm256_set1_ps(largest)));
    }
}

// 16 magnitudes in steps. Packing works within halves of the register; the order does not matter.
ENDOR_TARGET inline __m256i ticks16(const float* shares, __m256 reach) {
    return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(shares), reach)),
                              _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(shares + kLanes), reach)));
}

ENDOR_TARGET inline __m256i squares(__m256i ticks, __m256i rounded) {
    const __m256i distance = _mm256_sub_epi16(ticks, rounded);
    return _mm256_madd_epi16(distance, distance);
}

ENDOR_TARGET inline int32_t total(__m256i sums) {
    alignas(32) int32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    int32_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    return sum;
}

ENDOR_TARGET void errors_int8(const float* shares, const float* reaches, int count, const NearestTable&, int32_t* errors) {
    for (int c = 0; c < count; ++c) {
        const __m256 reach = _mm256_set1_ps(reaches[c]);
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = 0; i < kGroupColumns; i += 2 * kLanes) {
            const __m256i ticks = ticks16(shares + i, reach);
            const __m256i up = _mm256_srli_epi16(_mm256_add_epi16(ticks, _mm256_set1_epi16(kInt8Steps / 2)), 7);
            const __m256i rounded = _mm256_slli_epi16(_mm256_min_epi16(up, _mm256_set1_epi16(127)), 7);
            sum = _mm256_add_epi32(sum, squares(ticks, rounded));
        }
        errors[c] = total(sum);
    }
}

// How many midpoints lie below each of 32 bytes.
ENDOR_TARGET inline __m256i nearest(const NearestTable& table, __m256i half) {
    __m256i index = _mm256_setzero_si256();
    for (int i = 0; i < 7; ++i) {
        const __m256i midpoint = _mm256_set1_epi8(static_cast<char>(table.midpoints[i]));
        const __m256i not_above = _mm256_cmpeq_epi8(_mm256_max_epu8(half, midpoint), midpoint);
        index = _mm256_add_epi8(index, _mm256_add_epi8(not_above, _mm256_set1_epi8(1)));
    }
    return index;
}

ENDOR_TARGET inline __m256i half_steps(__m256i ticks) {
    return _mm256_srli_epi16(_mm256_add_epi16(ticks, _mm256_set1_epi16(kInt4Steps / 2 - 1)), 4);
}

ENDOR_TARGET inline __m256i squares_int4(__m256i ticks, __m256i rounded) {
    const __m256i empty = _mm256_cmpeq_epi16(ticks, _mm256_setzero_si256());
    return squares(ticks, _mm256_andnot_si256(empty, _mm256_slli_epi16(rounded, 5)));
}

ENDOR_TARGET void errors_int4(const float* shares, const float* reaches, int count, const NearestTable& table,
                              int32_t* errors) {
    const __m128i magnitudes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table.magnitudes));
    const __m256i entries = _mm256_broadcastsi128_si256(magnitudes), zero = _mm256_setzero_si256();
    for (int c = 0; c < count; ++c) {
        const __m256 reach = _mm256_set1_ps(reaches[c]);
        __m256i sum = zero;
        for (int64_t i = 0; i < kGroupColumns; i += 4 * kLanes) {
            const __m256i low = ticks16(shares + i, reach), high = ticks16(shares + i + 2 * kLanes, reach);
            const __m256i index = nearest(table, _mm256_packus_epi16(half_steps(low), half_steps(high)));
            const __m256i rounded = _mm256_shuffle_epi8(entries, index);
            sum = _mm256_add_epi32(sum, squares_int4(low, _mm256_unpacklo_epi8(rounded, zero)));
            sum = _mm256_add_epi32(sum, squares_int4(high, _mm256_unpackhi_epi8(rounded, zero)));
        }
        errors[c] = total(sum);
    }
}

ENDOR_TARGET void codes_int8(const float* values, float scale, const NearestTable&, uint8_t* codes) {
    for (int64_t i = 0; i < kGroupColumns; i += 2 * kLanes) {
        const __m256 divisor = _mm256_set1_ps(scale);
        const __m256i low = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(values + i), divisor));
        const __m256i high = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(values + i + kLanes), divisor));
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        const __m256i least = _mm256_max_epi16(words, _mm256_set1_epi16(-127));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i),
                         _mm_packs_epi16(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1)));
    }
}

ENDOR_TARGET inline __m256i half_steps8(__m256 values, __m256 scale) {
    const __m256 ratio = _mm256_div_ps(magnitude(values), scale);
    return _mm256_cvtps_epi32(_mm256_ceil_ps(_mm256_mul_ps(ratio, _mm256_set1_ps(2))));
}

ENDOR_TARGET void codes_int4(const float* values, float scale, const NearestTable& table, uint8_t* codes) {
    const __m256 divisor = _mm256_set1_ps(scale);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < kGroupColumns; i += 4 * kLanes) {
        __m256i half[4], negative[4];
        for (int k = 0; k < 4; ++k) {
            const __m256 part = _mm256_loadu_ps(values + i + k * kLanes);
            half[k] = half_steps8(part, divisor);
            negative[k] = _mm256_srai_epi32(_mm256_castps_si256(part), 31);
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(half[0], half[1]), _mm256_packs_epi32(half[2], half[3]));
        const __m256i signs = _mm256_packs_epi16(_mm256_packs_epi32(negative[0], negative[1]),
                                                 _mm256_packs_epi32(negative[2], negative[3]));
        const __m256i found = _mm256_add_epi8(nearest(table, bytes), _mm256_and_si256(signs, _mm256_set1_epi8(8)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(found, order));
    }
}

ENDOR_TARGET int64_t compress(uint64_t word, const uint8_t* codes, uint8_t* packed) {
    uint8_t* const first = packed;
    for (int i = 0; i < 8; ++i) {
        const auto byte = static_cast<uint8_t>(word >> 8 * i);
        const __m128i moved =
            _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)),
                             _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress1[byte])));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), moved);
        packed += __builtin_popcount(byte);
    }
    return packed - first;
}

}  // namespace

const QuantizeKernels* avx2_quantize_kernels() {
    static constexpr QuantizeKernels kernels = {
        {load<kBfloat16>, load<kFloat16>, load<kFloat32>}, shares, {errors_int8, errors_int4}, {codes_int8, codes_int4},
        compress};
    return avx2_quantized_kernels() ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const QuantizeKernels* avx2_quantize_kernels() { return nullptr; }

}  // namespace endor

#endif
