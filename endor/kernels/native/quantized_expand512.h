// 64 columns of quantised values in AVX-512 registers. The including file defines ENDOR_TARGET.
//
//   __m512i integers = expand_int8_512(word, codes);                                  codes += popcount(word);
//   __m512i integers = expand_int4_512(word, codes, first, codebook_512(codebook));   first += popcount(word);
//   QuantizedColumns512 columns = scaled_bfloat16_512(integers, _mm512_set1_ps(bfloat16_scale(scales[group])));
//
// Pruned columns are zeros. No byte is read that does not hold one of the word's codes. A group of columns is a multiple
// of 64 wide, so a word has one scale. `scaled_bfloat16_512` gives exactly the bits that decoding gives.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "quantized.h"

namespace endor {
namespace {

struct QuantizedColumns512 {
    __m512i low, high;  // columns 0 to 31, 32 to 63
};

struct QuantizedLanes {
    alignas(64) uint8_t twice[2][64];  // byte i / 2, of codes whose first nibble is skipped byte (i + 1) / 2
    alignas(64) uint16_t high[32];     // the upper half of each of 2 x 16 words
};

constexpr QuantizedLanes make_quantized_lanes() {
    QuantizedLanes lanes{};
    for (int i = 0; i < 64; ++i) {
        lanes.twice[0][i] = static_cast<uint8_t>(i / 2);
        lanes.twice[1][i] = static_cast<uint8_t>((i + 1) / 2);
    }
    for (int i = 0; i < 32; ++i) lanes.high[i] = static_cast<uint16_t>(2 * i + 1);
    return lanes;
}

constexpr QuantizedLanes kQuantizedLanes = make_quantized_lanes();

// Masked loads do not touch what is masked out.
ENDOR_TARGET inline __m512i load_first_512(const uint8_t* from, int64_t bytes) {
    return _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, static_cast<unsigned>(bytes)), from);
}

ENDOR_TARGET inline __m512i expand_bytes_512(uint64_t word, __m512i packed) {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));  // breaks a false dependency: see isa_avx512.cpp
    return _mm512_mask_expand_epi8(zero, word, packed);
}

// Sixteen integers, four times, as `expand_int4_512` wants them.
ENDOR_TARGET inline __m512i codebook_512(const int8_t* codebook) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
}

// The first `count` nibbles from byte `codes` on, or from its second nibble on if `odd`.
ENDOR_TARGET inline __m512i load_nibbles_512(const uint8_t* codes, int64_t odd, int count) {
    const __m512i bytes = load_first_512(codes, (count + odd + 1) / 2);
    const __m512i pairs =
        _mm512_maskz_permutexvar_epi8(~__mmask64{0}, _mm512_load_si512(kQuantizedLanes.twice[odd]), bytes);
    const __mmask64 upper = odd ? 0x5555555555555555 : 0xAAAAAAAAAAAAAAAA;
    const __m512i nibbles = _mm512_mask_mov_epi8(pairs, upper, _mm512_srli_epi16(pairs, 4));
    return _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
}

// int8 [64].
ENDOR_TARGET inline __m512i expand_int8_512(uint64_t word, const uint8_t* codes) {
    return expand_bytes_512(word, load_first_512(codes, __builtin_popcountll(word)));
}

// int8 [64]; `codes` of the whole tensor, `first` the number of the word's first value.
ENDOR_TARGET inline __m512i expand_int4_512(uint64_t word, const uint8_t* codes, int64_t first, __m512i codebook) {
    const __m512i indices = load_nibbles_512(codes + first / 2, first & 1, __builtin_popcountll(word));
    return expand_bytes_512(word, _mm512_shuffle_epi8(codebook, indices));
}

// float32 whose upper half is the nearest bfloat16.
ENDOR_TARGET inline __m512i rounded_512(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}

ENDOR_TARGET inline __m512i to_bfloat16_512(__m512 low, __m512 high) {
    return _mm512_permutex2var_epi16(rounded_512(low), _mm512_load_si512(kQuantizedLanes.high), rounded_512(high));
}

// Sixteen of the 64 integers times the scale, exact.
template <int kQuarter>
ENDOR_TARGET inline __m512 product_512(__m512i integers, __m512 scale) {
    const __m128i quarter =
        kQuarter ? _mm512_extracti32x4_epi32(integers, kQuarter) : _mm512_castsi512_si128(integers);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter)), scale);
}

ENDOR_TARGET inline QuantizedColumns512 scaled_bfloat16_512(__m512i integers, __m512 scale) {
    return {to_bfloat16_512(product_512<0>(integers, scale), product_512<1>(integers, scale)),
            to_bfloat16_512(product_512<2>(integers, scale), product_512<3>(integers, scale))};
}

}  // namespace
}  // namespace endor
