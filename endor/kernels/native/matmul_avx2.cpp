// AVX2: eight elements per byte of the bitmap by table, widened as in matmul_avx512.cpp.

#include "matmul.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "luts.h"

#define ENDOR_TARGET __attribute__((target("avx2,fma,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

struct Isa {
    struct Columns {
        __m256i runs[4];
    };
    using X = float;
    struct Sums {
        __m256 lanes;
    };
    static constexpr int kHalf = 8;
    static constexpr int kSums = 8;

    ENDOR_TARGET static inline __m128i expand8(uint8_t byte, const uint16_t* values) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand2[byte])));
    }

    ENDOR_TARGET static inline Columns expand(uint64_t word, const uint16_t* values) {
        Columns columns;
        for (int i = 0; i < 4; ++i) {
            const uint8_t low = static_cast<uint8_t>(word >> 16 * i), high = static_cast<uint8_t>(word >> (16 * i + 8));
            const __m128i first = expand8(low, values);
            values += __builtin_popcount(low);
            columns.runs[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(first), expand8(high, values), 1);
            values += __builtin_popcount(high);
        }
        return columns;
    }

    ENDOR_TARGET static inline Columns load(const uint16_t* columns) {
        Columns loaded;
        for (int i = 0; i < 4; ++i) loaded.runs[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + 16 * i));
        return loaded;
    }

    ENDOR_TARGET static inline void add(Sums& sums, const Columns& columns, const float* x) {
        for (int i = 0; i < 4; ++i) {
            const __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(columns.runs[i], 16));
            const __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(columns.runs[i], _mm256_set1_epi32(-0x10000)));
            sums.lanes = _mm256_fmadd_ps(even, _mm256_loadu_ps(x + 16 * i), sums.lanes);
            sums.lanes = _mm256_fmadd_ps(odd, _mm256_loadu_ps(x + 16 * i + 8), sums.lanes);
        }
    }

    ENDOR_TARGET static inline float total(const Sums& sums) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums.lanes), _mm256_extractf128_ps(sums.lanes, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"

namespace endor {

const MatmulKernels* avx2_matmul(bool fp32) {
    static constexpr MatmulKernels narrow{
        "avx2", false, 4, {&kLoops<RawSource, uint16_t>, nullptr, nullptr, &kLoops<DecodedSource, uint16_t>}, nullptr};
    static constexpr MatmulKernels wide{
        "avx2", true, 4, {&kLoops<RawSource, float>, nullptr, nullptr, &kLoops<DecodedSource, float>}, nullptr};
    if (!avx2_kernels() || !__builtin_cpu_supports("fma")) return nullptr;
    return fp32 ? &wide : &narrow;
}

}  // namespace endor

#else

namespace endor {

const MatmulKernels* avx2_matmul(bool) { return nullptr; }

}  // namespace endor

#endif
