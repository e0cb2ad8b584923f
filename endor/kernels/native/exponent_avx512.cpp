// Codec `exponent` with AVX-512 and VBMI2: planes are loaded as masks, what a level sends on is one vpexpandb.

#include "exponent.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#define ENDOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

// Bytes 2i and 2i + 1 of the result are byte i of the first and of the second vector; the second half starts at 32.
struct Interleave {
    alignas(64) uint8_t lanes[2][64];
};

constexpr Interleave make_interleave() {
    Interleave interleave{};
    for (int i = 0; i < 64; ++i) {
        interleave.lanes[0][i] = static_cast<uint8_t>(i / 2 + 64 * (i % 2));
        interleave.lanes[1][i] = static_cast<uint8_t>(32 + i / 2 + 64 * (i % 2));
    }
    return interleave;
}

constexpr Interleave kInterleave = make_interleave();

// Eight fields of three bits are three bytes: where the four bytes that hold them (and a shift) come from.
struct Threes {
    alignas(64) uint8_t lanes[64];
};

constexpr Threes make_threes() {
    Threes threes{};
    for (int i = 0; i < 64; ++i) threes.lanes[i] = static_cast<uint8_t>(i / 8 * 3 + i % 4);
    return threes;
}

constexpr Threes kThrees = make_threes();

struct ExponentIsa {
    using Vector = __m512i;

    struct Table {
        __m512i named[3];
    };

    template <int kPlanes>
    ENDOR_TARGET static inline Table load_table(const uint8_t* table) {
        Table loaded;
        for (int i = 0; i < (kPlanes == 2 ? 3 : 1); ++i) loaded.named[i] = _mm512_set1_epi8(static_cast<char>(table[i]));
        return loaded;
    }

    template <int kPlanes>
    ENDOR_TARGET static inline Vector exponents(uint64_t a, uint64_t b, const Table& table, const uint8_t*& next) {
        __m512i found = table.named[0];
        if constexpr (kPlanes == 2) {
            found = _mm512_mask_mov_epi8(found, a, table.named[1]);
            found = _mm512_mask_mov_epi8(found, b, table.named[2]);
        }
        __m512i passed_on = _mm512_loadu_si512(next);
        __asm__("" : "+v"(passed_on));  // or the compiler would fold the load into the expand
        next += __builtin_popcountll(a & b);
        return _mm512_mask_expand_epi8(found, a & b, passed_on);
    }

    ENDOR_TARGET static inline int64_t count(const uint8_t* a, const uint8_t* b, int64_t words) {
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = 0; i < words; i += 8) {
            const __mmask8 here = static_cast<__mmask8>(words - i < 8 ? (1u << (words - i)) - 1 : 0xFF);
            const __m512i both = _mm512_and_si512(_mm512_maskz_loadu_epi64(here, a + 8 * i),
                                                  _mm512_maskz_loadu_epi64(here, b + 8 * i));
            sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(both));
        }
        alignas(64) int64_t lanes[8];
        _mm512_store_si512(lanes, sums);
        return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
    }

    ENDOR_TARGET static inline void store(Vector exponents, uint8_t* out) { _mm512_storeu_si512(out, exponents); }

    // Bits of `a` where `mask` is set, of `b` elsewhere.
    ENDOR_TARGET static inline __m512i select(__m512i mask, __m512i a, __m512i b) {
        return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
    }

    ENDOR_TARGET static inline __m512i low_bits(const uint8_t* low, int shift) {
        const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
        const __m512i spread = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, _mm512_load_si512(kThrees.lanes), bytes);
        const __m512i shifts = _mm512_add_epi8(_mm512_set1_epi64(0x15120F0C09060300), _mm512_set1_epi8(static_cast<char>(shift)));
        return _mm512_and_si512(_mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, shifts, spread), _mm512_set1_epi8(7));
    }

    template <bool kFloat16, bool kStream>
    ENDOR_TARGET static inline void join(Vector exponents, const uint8_t* sign_mantissa, const uint8_t* low, int shift,
                                         uint16_t* out) {
        const __m512i head = _mm512_loadu_si512(sign_mantissa);
        const __m512i top_bit = _mm512_set1_epi8(static_cast<char>(0x80));
        __m512i high_bytes, low_bytes;
        // Shifts of 16-bit lanes move bits into the neighbouring byte; every select leaves those out.
        if constexpr (kFloat16) {
            const __m512i mantissa = _mm512_and_si512(_mm512_srli_epi16(head, 5), _mm512_set1_epi8(3));
            const __m512i shifted = _mm512_slli_epi16(_mm512_and_si512(exponents, _mm512_set1_epi8(0x1F)), 2);
            high_bytes = select(top_bit, head, _mm512_or_si512(shifted, mantissa));
            low_bytes = select(_mm512_set1_epi8(static_cast<char>(0xF8)), _mm512_slli_epi16(head, 3), low_bits(low, shift));
        } else {
            high_bytes = select(top_bit, head, _mm512_srli_epi16(exponents, 1));
            low_bytes = select(top_bit, _mm512_slli_epi16(exponents, 7), head);
        }
        for (int half = 0; half < 2; ++half) {
            const __m512i lanes = _mm512_load_si512(kInterleave.lanes[half]);
            const __m512i values = _mm512_permutex2var_epi8(low_bytes, lanes, high_bytes);
            if constexpr (kStream) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + 32 * half), values);
            } else {
                _mm512_storeu_si512(out + 32 * half, values);
            }
        }
    }
};

}  // namespace
}  // namespace endor

#include "exponent_loops.h"

namespace endor {

const ExponentKernels* avx512_exponent_kernels() {
    static constexpr ExponentKernels kernels = make_exponent_kernels();
    return avx512_kernels() && __builtin_cpu_supports("avx512vbmi") ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const ExponentKernels* avx512_exponent_kernels() { return nullptr; }

}  // namespace endor

#endif
