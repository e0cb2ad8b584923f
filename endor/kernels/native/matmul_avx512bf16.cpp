// AVX-512 with bfloat16 instructions (AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, and later).
//
// vdpbf16ps multiplies pairs of bfloat16 and adds both products to a float, rounding to nearest each time. It takes
// subnormal numbers, in and out, for zeros: products below 2^-126 are lost, which torch's own bfloat16 matmul on such a
// machine, made of the same instruction, loses too. Single precision x takes the kernels of matmul_avx512.cpp.

#include "matmul.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers of its own intrinsics for a mistake of ours (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define ENDOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt,lzcnt")))

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

    ENDOR_TARGET static inline Columns load(const uint16_t* columns) {
        return {_mm512_loadu_si512(columns), _mm512_loadu_si512(columns + 32)};
    }

    ENDOR_TARGET static inline void add(Sums& sums, const Columns& columns, const uint16_t* x) {
        add_half(sums, columns.low, x);
        add_half(sums, columns.high, x + 32);
    }

    ENDOR_TARGET static inline void add_half(Sums& sums, __m512i columns, const uint16_t* x) {
        sums.lanes = _mm512_dpbf16_ps(sums.lanes, (__m512bh)columns, (__m512bh)_mm512_loadu_si512(x));
    }

    // 32 bfloat16: those of `first`, then those of `second`. Subnormal ones become zeros, for which they count anyway.
    ENDOR_TARGET static inline __m512i narrowed(__m512 first, __m512 second) {
        return (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }

    ENDOR_TARGET static inline float total(const Sums& sums) { return total512(sums.lanes); }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"
#include "matmul_exponent512.h"
#include "matmul_quantized512.h"

namespace endor {

const MatmulKernels* avx512bf16_matmul(bool fp32) {
    static constexpr MatmulKernels kernels{"avx512bf16",
                                           false,
                                           2,
                                           {&kLoops<RawSource, uint16_t>, &kLoops<Int8Source, uint16_t>,
                                            &kLoops<Int4Source, uint16_t>, &kLoops<DecodedSource, uint16_t>},
                                           &kRecordLoops<uint16_t>};
    if (!avx512_matmul(false) || !__builtin_cpu_supports("avx512bf16")) return nullptr;
    return fp32 ? avx512_matmul(true) : &kernels;
}

}  // namespace endor

#else

namespace endor {

const MatmulKernels* avx512bf16_matmul(bool) { return nullptr; }

}  // namespace endor

#endif
