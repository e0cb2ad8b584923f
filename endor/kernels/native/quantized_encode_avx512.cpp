// Encode codecs `int8` and `int4` with AVX-512: 16 divisions, 32 distances or 64 look-ups at a time.

#include "quantized_encode.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers of its own intrinsics for a mistake of ours (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#define ENDOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

constexpr int kLanes = 16;

template <FloatType kType>
ENDOR_TARGET inline __m512 load16(const uint8_t* dense, __mmask16 mask) {
    if constexpr (kType == kFloat32) return _mm512_maskz_loadu_ps(mask, dense);
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, dense);
    if constexpr (kType == kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <FloatType kType>
ENDOR_TARGET uint32_t load(const uint8_t* dense, int64_t count, float* values) {
    constexpr int64_t kBytes = kType == kFloat32 ? 4 : 2;
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < kGroupColumns; i += kLanes) {
        const int64_t left = count > i ? count - i : 0;
        const auto mask = static_cast<__mmask16>(_bzhi_u32(0xFFFF, static_cast<unsigned>(left < kLanes ? left : kLanes)));
        const __m512 part = mask ? load16<kType>(dense + i * kBytes, mask) : _mm512_setzero_ps();
        _mm512_storeu_ps(values + i, part);
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(part)));
    }
    return _mm512_reduce_max_epu32(largest);
}

ENDOR_TARGET void shares(const float* values, float largest, float* shares) {
    for (int64_t i = 0; i < kGroupColumns; i += kLanes) {
        const __m512 part = _mm512_abs_ps(_mm512_loadu_ps(values + i));
        _mm512_storeu_ps(shares + i, _mm512_div_ps(part, _mm512_set1_ps(largest)));
    }
}

// 32 magnitudes in steps. Packing works within quarters of the register; the order does not matter.
ENDOR_TARGET inline __m512i ticks32(const float* shares, __m512 reach) {
    return _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(shares), reach)),
                              _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(shares + kLanes), reach)));
}

ENDOR_TARGET inline __m512i squares(__m512i ticks, __m512i rounded) {
    const __m512i distance = _mm512_sub_epi16(ticks, rounded);
    return _mm512_madd_epi16(distance, distance);
}

ENDOR_TARGET void errors_int8(const float* shares, const float* reaches, int count, const NearestTable&, int32_t* errors) {
    for (int c = 0; c < count; ++c) {
        const __m512 reach = _mm512_set1_ps(reaches[c]);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < kGroupColumns; i += 2 * kLanes) {
            const __m512i ticks = ticks32(shares + i, reach);
            const __m512i up = _mm512_srli_epi16(_mm512_add_epi16(ticks, _mm512_set1_epi16(kInt8Steps / 2)), 7);
            const __m512i rounded = _mm512_slli_epi16(_mm512_min_epi16(up, _mm512_set1_epi16(127)), 7);
            sum = _mm512_add_epi32(sum, squares(ticks, rounded));
        }
        errors[c] = _mm512_reduce_add_epi32(sum);
    }
}

struct Table512 {
    __m512i part[4];
};

ENDOR_TARGET inline Table512 load_table(const uint8_t* table) {
    return {{_mm512_load_si512(table), _mm512_load_si512(table + 64), _mm512_load_si512(table + 128),
             _mm512_load_si512(table + 192)}};
}

// 64 bytes of a table of 256.
ENDOR_TARGET inline __m512i look_up(const Table512& table, __m512i indices) {
    const __m512i low = _mm512_permutex2var_epi8(table.part[0], indices, table.part[1]);
    const __m512i high = _mm512_permutex2var_epi8(table.part[2], indices, table.part[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(indices), high);
}

ENDOR_TARGET inline __m512i half_steps(__m512i ticks) {
    return _mm512_srli_epi16(_mm512_add_epi16(ticks, _mm512_set1_epi16(kInt4Steps / 2 - 1)), 4);
}

ENDOR_TARGET inline __m512i squares_int4(__m512i ticks, __m512i rounded) {
    return squares(ticks, _mm512_maskz_slli_epi16(_mm512_test_epi16_mask(ticks, ticks), rounded, 5));
}

ENDOR_TARGET void errors_int4(const float* shares, const float* reaches, int count, const NearestTable& table,
                              int32_t* errors) {
    const Table512 magnitudes = load_table(table.magnitude);
    const __m512i zero = _mm512_setzero_si512();
    for (int c = 0; c < count; ++c) {
        const __m512 reach = _mm512_set1_ps(reaches[c]);
        __m512i sum = zero;
        for (int64_t i = 0; i < kGroupColumns; i += 4 * kLanes) {
            const __m512i low = ticks32(shares + i, reach), high = ticks32(shares + i + 2 * kLanes, reach);
            const __m512i rounded = look_up(magnitudes, _mm512_packus_epi16(half_steps(low), half_steps(high)));
            sum = _mm512_add_epi32(sum, squares_int4(low, _mm512_unpacklo_epi8(rounded, zero)));
            sum = _mm512_add_epi32(sum, squares_int4(high, _mm512_unpackhi_epi8(rounded, zero)));
        }
        errors[c] = _mm512_reduce_add_epi32(sum);
    }
}

ENDOR_TARGET void codes_int8(const float* values, float scale, const NearestTable&, uint8_t* codes) {
    for (int64_t i = 0; i < kGroupColumns; i += kLanes) {
        const __m512i integers = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(values + i), _mm512_set1_ps(scale)));
        const __m128i narrow = _mm512_cvtsepi32_epi8(_mm512_max_epi32(integers, _mm512_set1_epi32(-127)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), narrow);
    }
}

ENDOR_TARGET void codes_int4(const float* values, float scale, const NearestTable& table, uint8_t* codes) {
    constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    const Table512 indices = load_table(table.index);
    for (int64_t first = 0; first < kGroupColumns; first += 64) {
        uint64_t negative = 0;
        for (int64_t i = 0; i < 64; i += kLanes) {
            const __m512 part = _mm512_loadu_ps(values + first + i);
            const __m512 ratio = _mm512_div_ps(_mm512_abs_ps(part), _mm512_set1_ps(scale));
            const __m512i half = _mm512_cvt_roundps_epi32(_mm512_mul_ps(ratio, _mm512_set1_ps(2)), kUp);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + first + i), _mm512_cvtusepi32_epi8(half));
            negative |= static_cast<uint64_t>(_mm512_movepi32_mask(_mm512_castps_si512(part))) << i;
        }
        const __m512i found = look_up(indices, _mm512_loadu_si512(codes + first));
        _mm512_storeu_si512(codes + first, _mm512_mask_add_epi8(found, negative, found, _mm512_set1_epi8(8)));
    }
}

ENDOR_TARGET int64_t compress(uint64_t word, const uint8_t* codes, uint8_t* packed) {
    _mm512_storeu_si512(packed, _mm512_maskz_compress_epi8(word, _mm512_loadu_si512(codes)));
    return __builtin_popcountll(word);
}

}  // namespace

const QuantizeKernels* avx512_quantize_kernels() {
    static constexpr QuantizeKernels kernels = {
        {load<kBfloat16>, load<kFloat16>, load<kFloat32>}, shares, {errors_int8, errors_int4}, {codes_int8, codes_int4},
        compress};
    return avx512_quantized_kernels() ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const QuantizeKernels* avx512_quantize_kernels() { return nullptr; }

}  // namespace endor

#endif
