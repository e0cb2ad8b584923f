// Codecs `int8` and `int4` in plain C++: every machine has it.

#include <cstring>

#include "quantized.h"

#define ENDOR_TARGET

namespace endor {
namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// To nearest even, overflow to infinity, subnormals included.
inline uint16_t to_float16(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
    const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 127 + 15;
    const uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
    if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7C00);
    if (exponent < -10) return static_cast<uint16_t>(sign);
    const int dropped = exponent > 0 ? 13 : 14 - exponent;
    const uint32_t half = uint32_t{1} << (dropped - 1), kept = mantissa >> dropped;
    const uint32_t rest = mantissa & (2 * half - 1);
    // A carry out of the mantissa goes to the exponent, where it belongs; the implicit one is part of it.
    const uint32_t base = exponent > 0 ? static_cast<uint32_t>(exponent - 1) << 10 : 0;
    return static_cast<uint16_t>(sign | (base + kept + (rest > half || (rest == half && (kept & 1)))));
}

struct QuantizedIsa {
    using Packed = const uint8_t*;
    using Codebook = const int8_t*;

    static Codebook load_codebook(const int8_t* codebook) { return codebook; }

    static Packed load8(const uint8_t* codes, int, int64_t, uint8_t*) { return codes; }

    template <FloatType kType>
    static Packed load4(const uint8_t* codes, int64_t odd, int count, int64_t, Codebook codebook, uint8_t* buffer) {
        for (int i = 0; i < count; ++i) {
            const int64_t nibble = i + odd;
            buffer[i] = static_cast<uint8_t>(codebook[codes[nibble / 2] >> 4 * (nibble % 2) & 15]);
        }
        return buffer;
    }

    template <bool kInt4, FloatType kType>
    static inline float factor(Codebook, float scale) {
        return scale;
    }

    template <bool kInt4, FloatType kType, bool kStream, class Bits>
    static void put(uint64_t word, Packed packed, float scale, Bits* out) {
        std::memset(out, 0, kWordBits * sizeof(Bits));
        for (; word; word &= word - 1) {
            const float product = static_cast<float>(static_cast<int8_t>(*packed++)) * scale;
            Bits& element = out[__builtin_ctzll(word)];
            if constexpr (kType == kBfloat16) element = to_bfloat16(product);
            if constexpr (kType == kFloat16) element = to_float16(product);
            if constexpr (kType == kFloat32) element = bits_of(product);
        }
    }
};

}  // namespace
}  // namespace endor

#include "quantized_loops.h"

namespace endor {

const QuantizedKernels* scalar_quantized_kernels() {
    static constexpr QuantizedKernels kernels = make_quantized_kernels();
    return &kernels;
}

}  // namespace endor
