// AVX-512 with VBMI2 (Intel Ice Lake, AMD Zen 4 and later): vpexpand and vpcompress do a whole vector at once.
//
// Always from register to register. vpcompressw to memory is microcoded on Zen 4, ten times slower than a compress and
// a store; vpexpandw from memory costs 5 to 10 % against a load and an expand on Zen 5.

#include "bitmap.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#define ENDOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq,bmi,bmi2,popcnt,lzcnt")))

namespace endor {
namespace {

struct Isa {
    // Zen 4 and 5 let vpexpand and vpcompress wait for the register they overwrite, even when they zero it. Merging
    // into a register that has just been zeroed costs nothing and breaks the chain.
    ENDOR_TARGET static inline __m512i fresh_zero() {
        __m512i zero = _mm512_setzero_si512();
        __asm__("" : "+v"(zero));  // or the compiler would turn the merge back into zeroing
        return zero;
    }

    template <class T>
    ENDOR_TARGET static inline __m512i expand_vector(uint64_t mask, const T* values) {
        __m512i packed = _mm512_loadu_si512(values);
        __asm__("" : "+v"(packed));  // or the compiler would fold the load into the expand
        if constexpr (sizeof(T) == 1) return _mm512_mask_expand_epi8(fresh_zero(), mask, packed);
        if constexpr (sizeof(T) == 2) return _mm512_mask_expand_epi16(fresh_zero(), static_cast<__mmask32>(mask), packed);
        if constexpr (sizeof(T) == 4) return _mm512_mask_expand_epi32(fresh_zero(), static_cast<__mmask16>(mask), packed);
    }

    template <class T, bool kStream>
    ENDOR_TARGET static inline const T* expand(uint64_t word, const T* values, T* out) {
        constexpr int kLanes = 64 / sizeof(T);
        constexpr uint64_t kAll = ~0ull >> (64 - kLanes);
        for (int lane = 0; lane < kWordBits; lane += kLanes) {
            const uint64_t mask = word >> lane & kAll;
            const __m512i vector = expand_vector(mask, values);
            if constexpr (kStream) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + lane), vector);
            } else {
                _mm512_storeu_si512(out + lane, vector);
            }
            values += __builtin_popcountll(mask);
        }
        return values;
    }

    template <class T>
    ENDOR_TARGET static inline uint64_t test(const T* dense) {
        constexpr int kLanes = 64 / sizeof(T);
        uint64_t word = 0;
        for (int lane = 0; lane < kWordBits; lane += kLanes) {
            const __m512i v = _mm512_loadu_si512(dense + lane);
            uint64_t mask;
            if constexpr (sizeof(T) == 1) mask = _mm512_test_epi8_mask(v, v);
            if constexpr (sizeof(T) == 2) mask = _mm512_test_epi16_mask(v, v);
            if constexpr (sizeof(T) == 4) mask = _mm512_test_epi32_mask(v, v);
            word |= mask << lane;
        }
        return word;
    }

    template <class T>
    ENDOR_TARGET static inline T* compress(uint64_t word, const T* dense, T* values) {
        constexpr int kLanes = 64 / sizeof(T);
        constexpr uint64_t kAll = ~0ull >> (64 - kLanes);
        for (int lane = 0; lane < kWordBits; lane += kLanes) {
            const uint64_t mask = word >> lane & kAll;
            const __m512i v = _mm512_loadu_si512(dense + lane);
            __m512i packed;
            if constexpr (sizeof(T) == 1) packed = _mm512_mask_compress_epi8(fresh_zero(), mask, v);
            if constexpr (sizeof(T) == 2) packed = _mm512_mask_compress_epi16(fresh_zero(), static_cast<__mmask32>(mask), v);
            if constexpr (sizeof(T) == 4) packed = _mm512_mask_compress_epi32(fresh_zero(), static_cast<__mmask16>(mask), v);
            __asm__("" : "+v"(packed));  // or the compiler could fold the store into the compress
            _mm512_storeu_si512(values, packed);
            values += __builtin_popcountll(mask);
        }
        return values;
    }

    ENDOR_TARGET static inline int64_t popcount(const uint8_t* bitmap, int64_t words) {
        __m512i sums = _mm512_setzero_si512();
        int64_t i = 0;
        for (; i + 8 <= words; i += 8) {
            sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_loadu_si512(bitmap + i * 8)));
        }
        const __mmask8 rest = static_cast<__mmask8>((1u << (words - i)) - 1);
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_maskz_loadu_epi64(rest, bitmap + i * 8)));
        alignas(64) int64_t lanes[8];
        _mm512_store_si512(lanes, sums);
        return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
    }

    ENDOR_TARGET static inline void stream_line(uint8_t* to, const uint8_t* from) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(from));
    }
};

}  // namespace
}  // namespace endor

#include "rows.h"

namespace endor {

const Kernels* avx512_kernels() {
    static constexpr Kernels kernels = make_kernels("avx512");
    const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
                           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("bmi2");
    return supported ? &kernels : nullptr;
}

}  // namespace endor

#else

namespace endor {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace endor

#endif
