// Shuffle tables for instruction sets without expand and compress: for every byte of a bitmap, where the lanes of
// eight elements come from. 0x80 asks the byte shuffles of x86 and Arm for a zero.

#pragma once

#include <cstdint>

namespace endor {
namespace {

struct Luts {
    alignas(64) uint8_t expand1[256][8];     // element i <- packed element
    alignas(64) uint8_t compress1[256][8];   // packed element <- element
    alignas(64) uint8_t expand2[256][16];    // the same for elements of two bytes
    alignas(64) uint8_t compress2[256][16];
};

constexpr Luts make_luts() {
    Luts luts{};
    for (int byte = 0; byte < 256; ++byte) {
        int kept = 0;
        for (int i = 0; i < 8; ++i) {
            luts.expand1[byte][i] = 0x80;
            luts.compress1[byte][i] = 0x80;
        }
        for (int i = 0; i < 8; ++i) {
            if (byte >> i & 1) {
                luts.expand1[byte][i] = static_cast<uint8_t>(kept);
                luts.compress1[byte][kept++] = static_cast<uint8_t>(i);
            }
        }
        for (int i = 0; i < 8; ++i) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t e = luts.expand1[byte][i], c = luts.compress1[byte][i];
                luts.expand2[byte][2 * i + half] = static_cast<uint8_t>(e & 0x80 ? 0x80 : 2 * e + half);
                luts.compress2[byte][2 * i + half] = static_cast<uint8_t>(c & 0x80 ? 0x80 : 2 * c + half);
            }
        }
    }
    return luts;
}

constexpr Luts kLuts = make_luts();

}  // namespace
}  // namespace endor
