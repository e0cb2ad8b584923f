// AVX-512 without bfloat16 instructions: a bfloat16 is the upper half of a float, so a shift makes floats of the even
// columns and a mask of the odd ones, and x is put in the same order once.

#include "matmul.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers of its own intrinsics for a mistake of ours (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ENDOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt,lzcnt")))

#include "matmul_expand512.h"

namespace endor {
namespace {

struct UpperHalves {
    alignas(64) uint16_t lanes[32];
};

constexpr UpperHalves make_upper_halves() {
    UpperHalves halves{};
    for (int i = 0; i < 32; ++i) halves.lanes[i] = static_cast<uint16_t>(2 * i + 1);
    return halves;
}

constexpr UpperHalves kUpperHalves = make_upper_halves();

struct Isa {
    using Columns = Columns512;
    using X = float;
    struct Sums {
        __m512 lanes;
    };
    static constexpr int kHalf = 16;
    static constexpr int kSums = 16;

    ENDOR_TARGET static inline Columns expand(uint64_t word, const uint16_t* values) {
        return expand_columns512(word, values);
    }

    ENDOR_TARGET static inline Columns load(const uint16_t* columns) {
        return {_mm512_loadu_si512(columns), _mm512_loadu_si512(columns + 32)};
    }

    ENDOR_TARGET static inline void add(Sums& sums, const Columns& columns, const float* x) {
        add_half(sums, columns.low, x);
        add_half(sums, columns.high, x + 32);
    }

    ENDOR_TARGET static inline void add_half(Sums& sums, __m512i columns, const float* x) {
        using Floats = uint32_t __attribute__((vector_size(64)));
        const __m512 even = reinterpret_cast<__m512>(reinterpret_cast<Floats>(columns) << 16);
        const __m512 odd = reinterpret_cast<__m512>(reinterpret_cast<Floats>(columns) & 0xffff0000u);
        sums.lanes = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sums.lanes);
        sums.lanes = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sums.lanes);
    }

    // 32 bfloat16: those of `first`, then those of `second`.
    ENDOR_TARGET static inline __m512i narrowed(__m512 first, __m512 second) {
        return _mm512_permutex2var_epi16(rounded(first), _mm512_load_si512(kUpperHalves.lanes), rounded(second));
    }

    // The upper half of each float is the nearest bfloat16, ties to even.
    ENDOR_TARGET static inline __m512i rounded(__m512 floats) {
        using Bits = uint32_t __attribute__((vector_size(64)));
        const Bits bits = reinterpret_cast<Bits>(floats);
        return reinterpret_cast<__m512i>(bits + (bits >> 16 & 1) + 0x7FFF);
    }

    ENDOR_TARGET static inline float total(const Sums& sums) { return total512(sums.lanes); }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"
#include "matmul_exponent512.h"
#include "matmul_quantized512.h"

namespace endor {

const MatmulKernels* avx512_matmul(bool fp32) {
    static constexpr MatmulKernels narrow{"avx512",
                                          false,
                                          4,
                                          {&kLoops<RawSource, uint16_t>, &kLoops<Int8Source, uint16_t>,
                                           &kLoops<Int4Source, uint16_t>, &kLoops<DecodedSource, uint16_t>},
                                          &kRecordLoops<uint16_t>};
    static constexpr MatmulKernels wide{"avx512",
                                        true,
                                        4,
                                        {&kLoops<RawSource, float>, &kLoops<Int8Source, float>,
                                         &kLoops<Int4Source, float>, &kLoops<DecodedSource, float>},
                                        &kRecordLoops<float>};
    if (!avx512_kernels() || !__builtin_cpu_supports("avx512vbmi")) return nullptr;
    return fp32 ? &wide : &narrow;
}

}  // namespace endor

#else

namespace endor {

const MatmulKernels* avx512_matmul(bool) { return nullptr; }

}  // namespace endor

#endif
