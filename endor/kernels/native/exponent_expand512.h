// 64 columns of a row of codec `exponent` in two AVX-512 registers, in one step from the sections to 16-bit weights.
//
// The bits of a record's first level are spread over the columns that the mask keeps (pdep), so that they say column by
// column whose exponent is another one; a byte expand each then brings sign and mantissa, and the exponents that the
// record's further levels yield, to their columns. No value is written before it stands where it belongs, and nothing
// branches on bits. The including file defines ENDOR_TARGET, which has avx512vbmi and avx512vbmi2.
//
// How to walk a record: `open_record` (exponent.h) checks it and makes a RecordCursor; Cursor512 takes that, and each
// call yields the columns of the next mask word. What a call may read beyond the last value is memory that exists.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "exponent.h"

namespace endor {
namespace {

// The lower and the higher bytes of 64 weights.
struct Bytes512 {
    __m512i low, high;
};

// 64 weights; the second register has columns 32 to 63.
struct Weights512 {
    __m512i first, second;
};

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

ENDOR_TARGET inline Weights512 interleave512(const Bytes512& bytes) {
    return {_mm512_permutex2var_epi8(bytes.low, _mm512_load_si512(kInterleave.lanes[0]), bytes.high),
            _mm512_permutex2var_epi8(bytes.low, _mm512_load_si512(kInterleave.lanes[1]), bytes.high)};
}

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

// 64 fields of three bits, a byte each with rubbish above them; the first one starts at bit `shift` (0 to 7).
ENDOR_TARGET inline __m512i low_bits512(const uint8_t* low, int shift) {
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i spread = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, _mm512_load_si512(kThrees.lanes), bytes);
    const __m512i shifts =
        _mm512_add_epi8(_mm512_set1_epi64(0x15120F0C09060300), _mm512_set1_epi8(static_cast<char>(shift)));
    return _mm512_maskz_multishift_epi64_epi8(~__mmask64{0}, shifts, spread);
}

// Load and expand, never the form with a memory operand, and into a register that has just been written: isa_avx512.cpp
// says why.
ENDOR_TARGET inline __m512i expand_bytes512(__m512i into, uint64_t mask, const uint8_t* from) {
    __m512i packed = _mm512_loadu_si512(from);
    __asm__("" : "+v"(packed));
    return _mm512_mask_expand_epi8(into, mask, packed);
}

ENDOR_TARGET inline __m512i fresh_zero512() {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

// Bits of `a` where `mask` is set, of `b` elsewhere.
ENDOR_TARGET inline __m512i select512(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xCA);
}

// Placed exponents (exponent.h), sign and mantissa, and for float16 the three low bits with rubbish above: as weights.
// Shifts of 16-bit lanes move bits into the neighbouring byte; every select leaves those out.
template <bool kFloat16>
ENDOR_TARGET inline Bytes512 join512(__m512i exponents, __m512i heads, __m512i low) {
    if constexpr (kFloat16) {
        const __m512i mantissa = _mm512_srli_epi16(heads, 5);
        const __m512i high = _mm512_ternarylogic_epi32(exponents, mantissa, _mm512_set1_epi8(3), 0xF8);
        return {select512(0xF8, _mm512_slli_epi16(heads, 3), low), select512(0x80, heads, high)};
    } else {
        return {select512(0x80, exponents, heads), select512(0x80, heads, exponents)};
    }
}

template <int kPlanes, bool kFloat16>
class Cursor512 {
   public:
    ENDOR_TARGET explicit Cursor512(const RecordCursor& record) : record_(record) {
        for (int i = 0; i < kNamed; ++i) named_[i] = _mm512_set1_epi8(static_cast<char>(record.named[i]));
    }

    // The next 64 columns, of which `word` says which are kept; all others are zero.
    ENDOR_TARGET __attribute__((always_inline)) inline Weights512 next(uint64_t word) { return interleave512(next_bytes(word)); }

    // The same before bytes are put beside each other: for whoever can do with another order of columns.
    ENDOR_TARGET __attribute__((always_inline)) inline Bytes512 next_bytes(uint64_t word) {
        const uint64_t a = _pdep_u64(bits_from_here(record_.planes[0]), word);
        const uint64_t b = kPlanes == 2 ? _pdep_u64(bits_from_here(record_.planes[1]), word) : a;
        __m512i exponents = _mm512_maskz_mov_epi8(word, named_[0]);
        if constexpr (kPlanes == 2) {
            exponents = _mm512_mask_mov_epi8(exponents, a, named_[1]);
            exponents = _mm512_mask_mov_epi8(exponents, b, named_[2]);
        }
        exponents = expand_bytes512(exponents, a & b, record_.next);
        const __m512i heads = expand_bytes512(fresh_zero512(), word, record_.sign_mantissa + record_.value);
        const __m512i low = kFloat16 ? low_bits(word) : __m512i{};
        record_.next += __builtin_popcountll(a & b);
        record_.value += __builtin_popcountll(word);
        return join512<kFloat16>(exponents, heads, low);
    }

    // Where it stands, to be taken up by another cursor.
    const RecordCursor& record() const { return record_; }

   private:
    static constexpr int kNamed = kPlanes == 2 ? 3 : 1;

    // 64 bits of a plane, from that of the next value on. Of those behind the last value pdep makes no use.
    ENDOR_TARGET inline uint64_t bits_from_here(const uint8_t* plane) const {
        uint64_t words[2];
        std::memcpy(words, plane + (record_.value >> 6) * 8, sizeof words);
        const int shift = static_cast<int>(record_.value & 63);
        return words[0] >> shift | words[1] << 1 << (63 - shift);
    }

    ENDOR_TARGET inline __m512i low_bits(uint64_t word) const {
        const int64_t bit = 3 * record_.value + record_.low_shift;
        return _mm512_mask_expand_epi8(fresh_zero512(), word,
                                       low_bits512(record_.low + (bit >> 3), static_cast<int>(bit & 7)));
    }

    RecordCursor record_;
    __m512i named_[kNamed];
};

}  // namespace
}  // namespace endor
