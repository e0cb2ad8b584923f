// Shuffle tables for instruction sets without expand and compress: for every byte of a bitmap, where the lanes of
// eight elements come from. 0x80 asks the byte shuffles of x86 and Arm for a zero.

#pragma once

#include <cstdint>

namespace endor {
namespace {

// Element i of eight <- packed element; `kCompress` the other way round.
template <int kSize>
struct Lut {
    alignas(64) uint8_t lanes[256][8 * kSize];

    const uint8_t* operator[](uint8_t byte) const { return lanes[byte]; }
};

template <int kSize, bool kCompressing>
constexpr Lut<kSize> make_lut() {
    Lut<kSize> lut{};
    for (int byte = 0; byte < 256; ++byte) {
        for (int b = 0; b < 8 * kSize; ++b) lut.lanes[byte][b] = 0x80;
        int kept = 0;
        for (int i = 0; i < 8; ++i) {
            if (!(byte >> i & 1)) continue;
            const int to = kCompressing ? kept : i, from = kCompressing ? i : kept;
            for (int b = 0; b < kSize; ++b) {
                lut.lanes[byte][to * kSize + b] = static_cast<uint8_t>(from * kSize + b);
            }
            ++kept;
        }
    }
    return lut;
}

constexpr Lut<1> kExpand1 = make_lut<1, false>();
constexpr Lut<2> kExpand2 = make_lut<2, false>();
constexpr Lut<1> kCompress1 = make_lut<1, true>();
constexpr Lut<2> kCompress2 = make_lut<2, true>();

}  // namespace
}  // namespace endor
