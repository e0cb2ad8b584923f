// 64 columns of bfloat16 in two AVX-512 registers; see isa_avx512.cpp for why it merges and does not fold the load.

#include <immintrin.h>

namespace endor {
namespace {

struct Columns512 {
    __m512i low, high;
};

ENDOR_TARGET inline __m512i expand512(uint32_t mask, const uint16_t* values) {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    __m512i packed = _mm512_loadu_si512(values);
    __asm__("" : "+v"(packed));
    return _mm512_mask_expand_epi16(zero, mask, packed);
}

ENDOR_TARGET inline Columns512 expand_columns512(uint64_t word, const uint16_t* values) {
    const uint32_t low = static_cast<uint32_t>(word);
    return {expand512(low, values),
            expand512(static_cast<uint32_t>(word >> 32), values + __builtin_popcount(low))};
}

// Not _mm512_reduce_add_ps: its order is the compiler's choice.
ENDOR_TARGET inline float total512(__m512 lanes) {
    alignas(64) float parts[16];
    _mm512_store_ps(parts, lanes);
    const __m256 eight = _mm256_add_ps(_mm256_load_ps(parts), _mm256_load_ps(parts + 8));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace endor
