// Codec `exponent` with AVX-512 and VBMI2: planes are loaded as masks, what a level sends on is one vpexpandb.

#include "exponent.h"

#if defined(__x86_64__)

#define ENDOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt,lzcnt")))

#include "exponent_expand512.h"

namespace endor {
namespace {

struct ExponentIsa {
    using Vector = __m512i;

    struct Table {
        __m512i named[3];
    };

    template <int kPlanes>
    ENDOR_TARGET static inline Table load_table(const uint8_t* named) {
        Table loaded;
        for (int i = 0; i < (kPlanes == 2 ? 3 : 1); ++i) {
            loaded.named[i] = _mm512_set1_epi8(static_cast<char>(named[i]));
        }
        return loaded;
    }

    template <int kPlanes>
    ENDOR_TARGET static inline Vector exponents(uint64_t a, uint64_t b, const Table& table, const uint8_t*& next) {
        __m512i found = table.named[0];
        if constexpr (kPlanes == 2) {
            found = _mm512_mask_mov_epi8(found, a, table.named[1]);
            found = _mm512_mask_mov_epi8(found, b, table.named[2]);
        }
        found = expand_bytes512(found, a & b, next);
        next += __builtin_popcountll(a & b);
        return found;
    }

    template <bool kFloat16>
    ENDOR_TARGET static inline Vector place(const uint8_t* from) {
        const __m512i exponents = _mm512_loadu_si512(from);
        if constexpr (kFloat16) return _mm512_and_si512(_mm512_slli_epi16(exponents, 2), _mm512_set1_epi8(0x7C));
        return select512(0x80, _mm512_slli_epi16(exponents, 7), _mm512_srli_epi16(exponents, 1));
    }

    template <int kPlanes>
    ENDOR_TARGET static inline int64_t count(const uint8_t* a, const uint8_t* b, int64_t words) {
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = 0; i < words; i += 8) {
            const __mmask8 here = static_cast<__mmask8>(words - i < 8 ? (1u << (words - i)) - 1 : 0xFF);
            __m512i bits = _mm512_maskz_loadu_epi64(here, a + 8 * i);
            if constexpr (kPlanes == 2) bits = _mm512_and_si512(bits, _mm512_maskz_loadu_epi64(here, b + 8 * i));
            sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(bits));
        }
        alignas(64) int64_t lanes[8];  // gcc 12 warns of its own _mm512_reduce_add_epi64
        _mm512_store_si512(lanes, sums);
        return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
    }

    ENDOR_TARGET static inline void store(Vector exponents, uint8_t* out) { _mm512_storeu_si512(out, exponents); }

    template <bool kStream>
    ENDOR_TARGET static inline void put(const Weights512& weights, uint16_t* out) {
        if constexpr (kStream) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out), weights.first);
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out + 32), weights.second);
        } else {
            _mm512_storeu_si512(out, weights.first);
            _mm512_storeu_si512(out + 32, weights.second);
        }
    }

    template <bool kFloat16, bool kStream>
    ENDOR_TARGET static inline void join(Vector exponents, const uint8_t* sign_mantissa, const uint8_t* low, int shift,
                                         uint16_t* out) {
        const __m512i low_bits = kFloat16 ? low_bits512(low, shift) : __m512i{};
        put<kStream>(interleave512(join512<kFloat16>(exponents, _mm512_loadu_si512(sign_mantissa), low_bits)), out);
    }
};

}  // namespace
}  // namespace endor

#include "exponent_loops.h"

namespace endor {
namespace {

template <int kPlanes, bool kFloat16, bool kStream>
ENDOR_TARGET void expand_words(RecordCursor& record, const uint8_t* bitmap, uint16_t* out, int64_t rows, int64_t cols) {
    const auto block_bytes = static_cast<uintptr_t>(rows * ((cols + kWordBits - 1) / kWordBits) * 8);
    const Ahead ahead(record);
    Cursor512<kPlanes, kFloat16> cursor(record);
    for (int64_t row = 0; row < rows; ++row) {
        int64_t left = cols;
        for (; left >= kWordBits; left -= kWordBits, bitmap += 8, out += kWordBits) {
            Ahead::fetch_line(reinterpret_cast<uintptr_t>(bitmap) + block_bytes);
            ahead.fetch<kFloat16>(cursor.record(), cursor.record().value);
            ExponentIsa::put<kStream>(cursor.next(load_bits(bitmap)), out);
        }
        if (left) {
            alignas(64) uint16_t buffer[kWordBits];
            ExponentIsa::put<false>(cursor.next(load_bits(bitmap)), buffer);
            std::memcpy(out, buffer, static_cast<size_t>(left) * sizeof *out);
            bitmap += 8;
            out += left;
        }
    }
    record = cursor.record();
}

template <int kPlanes, bool kFloat16>
ENDOR_TARGET void expand_rows(RecordCursor& record, const uint8_t* bitmap, uint8_t* out, int64_t rows, int64_t cols,
                              bool streaming) {
    uint16_t* const to = reinterpret_cast<uint16_t*>(out);
    if (cols % kWordBits == 0) {  // rows without padding are one long row
        cols *= rows;
        rows = rows ? 1 : 0;
    }
    // Non-temporal stores exist for whole aligned vectors only.
    if (streaming && reinterpret_cast<uintptr_t>(out) % 64 == 0 && (rows == 1 || cols % 32 == 0)) {
        expand_words<kPlanes, kFloat16, true>(record, bitmap, to, rows, cols);
    } else {
        expand_words<kPlanes, kFloat16, false>(record, bitmap, to, rows, cols);
    }
}

constexpr ExponentKernels make_kernels() {
    ExponentKernels kernels = make_exponent_kernels();
    kernels.rows[0][0] = expand_rows<1, false>;
    kernels.rows[0][1] = expand_rows<1, true>;
    kernels.rows[1][0] = expand_rows<2, false>;
    kernels.rows[1][1] = expand_rows<2, true>;
    return kernels;
}

}  // namespace

const ExponentKernels* avx512_exponent_kernels() {
    static constexpr ExponentKernels kernels = make_kernels();
    return avx512_kernels() && __builtin_cpu_supports("avx512vbmi") ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const ExponentKernels* avx512_exponent_kernels() { return nullptr; }

}  // namespace endor

#endif
