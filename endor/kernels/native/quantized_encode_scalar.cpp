// Encode codecs `int8` and `int4` in plain C++: every machine has it.

#include <cmath>
#include <cstring>

#include "quantized_encode.h"

namespace endor {
namespace {

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float float16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

template <FloatType kType>
uint32_t load(const uint8_t* dense, int64_t count, float* values) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < kGroupColumns; ++i) {
        float value = 0;
        if (i < count && kType == kFloat32) std::memcpy(&value, dense + 4 * i, sizeof value);
        if (i < count && kType != kFloat32) {
            uint16_t bits;
            std::memcpy(&bits, dense + 2 * i, sizeof bits);
            value = kType == kBfloat16 ? bfloat16_scale(bits) : float16_to_float(bits);
        }
        values[i] = value;
        uint32_t magnitude;
        std::memcpy(&magnitude, &value, sizeof magnitude);
        magnitude &= 0x7FFFFFFF;
        if (magnitude > largest) largest = magnitude;
    }
    return largest;
}

void shares(const float* values, float largest, float* shares) {
    for (int64_t i = 0; i < kGroupColumns; ++i) shares[i] = std::fabs(values[i]) / largest;
}

template <bool kInt4>
void errors(const float* shares, const float* reaches, int count, const NearestTable& table, int32_t* errors) {
    for (int c = 0; c < count; ++c) {
        int32_t sum = 0;
        for (int64_t i = 0; i < kGroupColumns; ++i) {
            const int32_t ticks = static_cast<int32_t>(std::nearbyint(shares[i] * reaches[c]));
            int32_t rounded;
            if constexpr (kInt4) {
                const int32_t half = (ticks + kInt4Steps / 2 - 1) / (kInt4Steps / 2);
                rounded = ticks ? table.magnitude[half < 255 ? half : 255] * kInt4Steps : 0;
            } else {
                const int32_t integer = (ticks + kInt8Steps / 2) / kInt8Steps;
                rounded = (integer < 127 ? integer : 127) * kInt8Steps;
            }
            sum += (ticks - rounded) * (ticks - rounded);
        }
        errors[c] = sum;
    }
}

template <bool kInt4>
void codes(const float* values, float scale, const NearestTable& table, uint8_t* codes) {
    for (int64_t i = 0; i < kGroupColumns; ++i) {
        if constexpr (kInt4) {
            const float half = std::ceil(std::fabs(values[i]) / scale * 2);
            const uint8_t negative = std::signbit(values[i]) ? 8 : 0;
            codes[i] = static_cast<uint8_t>(table.index[half < 255 ? static_cast<int>(half) : 255] + negative);
        } else {
            const float integer = std::nearbyint(values[i] / scale);
            codes[i] = static_cast<uint8_t>(static_cast<int8_t>(integer < -127 ? -127 : integer > 127 ? 127 : integer));
        }
    }
}

int64_t compress(uint64_t word, const uint8_t* codes, uint8_t* packed) {
    int64_t count = 0;
    for (; word; word &= word - 1) packed[count++] = codes[__builtin_ctzll(word)];
    return count;
}

}  // namespace

const QuantizeKernels* scalar_quantize_kernels() {
    static constexpr QuantizeKernels kernels = {{load<kBfloat16>, load<kFloat16>, load<kFloat32>},
                                                shares,
                                                {errors<false>, errors<true>},
                                                {codes<false>, codes<true>},
                                                compress};
    return &kernels;
}

}  // namespace endor
