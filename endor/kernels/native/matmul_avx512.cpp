// AVX-512 without bfloat16 instructions: a bfloat16 is the upper half of a float, so a shift makes floats of the even
// columns and a mask of the odd ones, and x is put in the same order once.

#include "matmul.h"

#if defined(__x86_64__)

#define ENDOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,popcnt,lzcnt")))

#include "matmul_expand512.h"

namespace endor {
namespace {

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

    ENDOR_TARGET static inline void add(Sums& sums, const Columns& columns, const float* x) {
        add32(sums, columns.low, x);
        add32(sums, columns.high, x + 32);
    }

    ENDOR_TARGET static inline void add32(Sums& sums, __m512i columns, const float* x) {
        using Floats = uint32_t __attribute__((vector_size(64)));
        const __m512 even = reinterpret_cast<__m512>(reinterpret_cast<Floats>(columns) << 16);
        const __m512 odd = reinterpret_cast<__m512>(reinterpret_cast<Floats>(columns) & 0xffff0000u);
        sums.lanes = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sums.lanes);
        sums.lanes = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sums.lanes);
    }

    ENDOR_TARGET static inline float total(const Sums& sums) { return total512(sums.lanes); }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"

namespace endor {

const MatmulKernels* avx512_matmul(bool fp32) {
    static constexpr MatmulKernels narrow = make_matmul<uint16_t>("avx512"), wide = make_matmul<float>("avx512");
    if (!avx512_kernels()) return nullptr;
    return fp32 ? &wide : &narrow;
}

}  // namespace endor

#else

namespace endor {

const MatmulKernels* avx512_matmul(bool) { return nullptr; }

}  // namespace endor

#endif
