// AVX-512 with bfloat16 instructions (AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, and later).
//
// vdpbf16ps multiplies pairs of bfloat16 and adds both products to a float, rounding to nearest each time. It takes
// subnormal numbers, in and out, for zeros: products below 2^-126 are lost, which torch's own bfloat16 matmul on such a
// machine, made of the same instruction, loses too. Single precision x takes the kernels of matmul_avx512.cpp.

#include "matmul.h"

#if defined(__x86_64__)

#define ENDOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt,lzcnt")))

#include "matmul_expand512.h"

namespace endor {
namespace {

struct Isa {
    using Columns = Columns512;
    using X = uint16_t;
    struct Sums {
        __m512 lanes;
    };
    static constexpr int kHalf = 0;
    static constexpr int kSums = 16;

    ENDOR_TARGET static inline Columns expand(uint64_t word, const uint16_t* values) {
        return expand_columns512(word, values);
    }

    ENDOR_TARGET static inline void add(Sums& sums, const Columns& columns, const uint16_t* x) {
        sums.lanes = _mm512_dpbf16_ps(sums.lanes, (__m512bh)columns.low, (__m512bh)_mm512_loadu_si512(x));
        sums.lanes = _mm512_dpbf16_ps(sums.lanes, (__m512bh)columns.high, (__m512bh)_mm512_loadu_si512(x + 32));
    }

    ENDOR_TARGET static inline float total(const Sums& sums) { return total512(sums.lanes); }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"

namespace endor {

const MatmulKernels* avx512bf16_matmul(bool fp32) {
    static constexpr MatmulKernels kernels = make_matmul<uint16_t>("avx512bf16");
    if (!avx512_kernels() || !__builtin_cpu_supports("avx512bf16")) return nullptr;
    return fp32 ? avx512_matmul(true) : &kernels;
}

}  // namespace endor

#else

namespace endor {

const MatmulKernels* avx512bf16_matmul(bool) { return nullptr; }

}  // namespace endor

#endif
