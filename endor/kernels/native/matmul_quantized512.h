// Sources of a matmul for codecs `int8` and `int4`: a word's integers are expanded as bytes, and become bfloat16 there. The
// including file has included matmul_rows.h; its Isa rounds with `narrowed`.

namespace endor {
namespace {

inline float scale_at(const uint16_t* scales, int64_t group) { return widened(scales[group]); }

// Masked loads do not touch what is masked out.
template <bool kNearEnd>
ENDOR_TARGET inline __m512i load_codes(const uint8_t* from, const uint8_t* end) {
    if constexpr (kNearEnd) {
        const int64_t left = end - from;
        if (left < 64) return _mm512_maskz_loadu_epi8(left > 0 ? (uint64_t{1} << left) - 1 : 0, from);
    }
    return _mm512_loadu_si512(from);
}

// Scales are read in the order in which they lie; those of the next rows are fetched by the rows before.
struct Scales {
    const uint16_t* next;

    ENDOR_TARGET static inline Scales begin(const MatmulRow& row, const MatmulValues& values) {
        return {values.scales + row.row * values.groups};
    }
    ENDOR_TARGET inline __m512 take() {
        constexpr uintptr_t kAheadBytes = 1024;
        fetch_ahead(reinterpret_cast<uintptr_t>(next), kAheadBytes);
        return _mm512_set1_ps(widened(*next++));
    }
};

// Where the bytes of 16 floats come from: 128 more than an integer, as the second byte of 2^15, adds 128 more than the integer.
struct FloatBytes {
    alignas(64) uint8_t lanes[4][64];
};

constexpr FloatBytes make_float_bytes() {
    FloatBytes bytes{};
    for (int i = 0; i < 64; ++i) {
        for (int lane = 0; lane < 4; ++lane) {
            uint8_t* const four = &bytes.lanes[i / 16][i % 16 * 4];
            four[lane] = static_cast<uint8_t>(lane == 1 ? i : lane == 3 ? 64 + 3 : 64);
        }
    }
    return bytes;
}

constexpr FloatBytes kFloatBytes = make_float_bytes();

struct Int8Source {
    struct Cursor {
        const uint8_t* at;
        Scales scales;
        __m512 scale;
    };
    static constexpr int64_t kReach = 64;
    static constexpr int column_of(int i) { return i; }

    ENDOR_TARGET static inline Cursor begin(const MatmulRow& row, const MatmulValues& values) {
        return {values.data + row.first, Scales::begin(row, values), _mm512_setzero_ps()};
    }
    ENDOR_TARGET static inline void enter(Cursor& cursor, const MatmulValues&) { cursor.scale = cursor.scales.take(); }
    ENDOR_TARGET static inline uintptr_t address(const Cursor& cursor, const MatmulValues&) {
        return reinterpret_cast<uintptr_t>(cursor.at);
    }

    ENDOR_TARGET static inline __m512 product(__m512i raised, int quarter, __m512 scale) {
        const __m512i bits = _mm512_permutex2var_epi8(raised, _mm512_load_si512(kFloatBytes.lanes[quarter]),
                                                      _mm512_set1_epi32(0x47000000));
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(32768 + 128)), scale);
    }

    template <bool kNearEnd>
    ENDOR_TARGET static inline Columns512 next(Cursor& cursor, uint64_t word, const MatmulValues& values) {
        const __m512i middle = _mm512_set1_epi8(static_cast<char>(0x80));
        const __m512i codes = _mm512_xor_si512(load_codes<kNearEnd>(cursor.at, values.end), middle);
        const __m512i raised = _mm512_mask_expand_epi8(middle, word, codes);
        cursor.at += __builtin_popcountll(word);
        return {Isa::narrowed(product(raised, 0, cursor.scale), product(raised, 1, cursor.scale)),
                Isa::narrowed(product(raised, 2, cursor.scale), product(raised, 3, cursor.scale))};
    }
};

// Eight codes are four bytes, or parts of five: where they come from, and the shifts of each of the eight. The codes are
// bits 4i of the bytes that are shifted to place i, or bits 4i + 4 where the first code is the upper half of a byte.
struct NibbleLanes {
    alignas(64) uint8_t bytes[64];
    alignas(64) uint8_t shifts[2][64];
};

constexpr NibbleLanes make_nibble_lanes() {
    NibbleLanes lanes{};
    for (int i = 0; i < 64; ++i) {
        lanes.bytes[i] = static_cast<uint8_t>(i / 8 * 4 + i % 8);
        for (int odd = 0; odd < 2; ++odd) lanes.shifts[odd][i] = static_cast<uint8_t>(4 * (i % 8 + odd));
    }
    return lanes;
}

constexpr NibbleLanes kNibbleLanes = make_nibble_lanes();

// The 16 products that a group can have are looked up; an index has bit 4 set, and what the mask leaves out is index 0:
// a zero. Looking up takes the lower byte of 16 bits, so that the even columns come first and the odd ones second.
struct Int4Source {
    struct Cursor {
        int64_t value;
        Scales scales;
        __m512i products;
    };
    static constexpr int64_t kReach = 128;
    static constexpr int column_of(int i) { return i < 32 ? 2 * i : 2 * (i - 32) + 1; }

    ENDOR_TARGET static inline Cursor begin(const MatmulRow& row, const MatmulValues& values) {
        return {row.first, Scales::begin(row, values), _mm512_setzero_si512()};
    }
    ENDOR_TARGET static inline void enter(Cursor& cursor, const MatmulValues& values) {
        const __m128i integers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values.codebook));
        const __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(integers));
        cursor.products = Isa::narrowed(_mm512_setzero_ps(), _mm512_mul_ps(floats, cursor.scales.take()));
    }
    ENDOR_TARGET static inline uintptr_t address(const Cursor& cursor, const MatmulValues& values) {
        return reinterpret_cast<uintptr_t>(values.data + cursor.value / 2);
    }

    template <bool kNearEnd>
    ENDOR_TARGET static inline Columns512 next(Cursor& cursor, uint64_t word, const MatmulValues& values) {
        const __m512i bytes = load_codes<kNearEnd>(values.data + cursor.value / 2, values.end);
        const __m512i near = _mm512_permutexvar_epi8(_mm512_load_si512(kNibbleLanes.bytes), bytes);
        const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(kNibbleLanes.shifts[cursor.value & 1]), near);
        cursor.value += __builtin_popcountll(word);
        __m512i zero = _mm512_setzero_si512();
        __asm__("" : "+v"(zero));  // breaks a false dependency: see isa_avx512.cpp
        const __m512i indices = _mm512_mask_expand_epi8(zero, word, _mm512_or_si512(codes, _mm512_set1_epi8(16)));
        return {_mm512_permutexvar_epi16(indices, cursor.products),
                _mm512_permutexvar_epi16(_mm512_srli_epi16(indices, 8), cursor.products)};
    }
};

}  // namespace
}  // namespace endor
