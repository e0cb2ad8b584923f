// Codec `exponent` in plain C++: every machine has it.

#include <cstring>

#include "exponent.h"

#define ENDOR_TARGET

namespace endor {
namespace {

struct ExponentIsa {
    struct Vector {
        uint8_t lanes[64];
    };

    struct Table {
        uint8_t named[3];
    };

    template <int kPlanes>
    static Table load_table(const uint8_t* named) {
        return kPlanes == 2 ? Table{{named[0], named[1], named[2]}} : Table{{named[0], 0, 0}};
    }

    template <int kPlanes>
    static Vector exponents(uint64_t a, uint64_t b, const Table& table, const uint8_t*& next) {
        Vector found;
        for (int i = 0; i < 64; ++i) {
            const int code = static_cast<int>(a >> i & 1) | (kPlanes == 2 ? static_cast<int>(b >> i & 1) << 1 : 0);
            const uint8_t choices[4] = {table.named[0], kPlanes == 2 ? table.named[1] : *next, table.named[2], *next};
            found.lanes[i] = choices[code];
            next += code == (1 << kPlanes) - 1;
        }
        return found;
    }

    template <bool kFloat16>
    static Vector place(const uint8_t* from) {
        Vector placed_ones;
        for (int i = 0; i < 64; ++i) placed_ones.lanes[i] = placed(from[i], kFloat16);
        return placed_ones;
    }

    template <int kPlanes>
    static int64_t count(const uint8_t* a, const uint8_t* b, int64_t words) {
        int64_t found = 0;
        for (int64_t i = 0; i < words; ++i) {
            uint64_t bits[2];
            std::memcpy(bits, a + 8 * i, 8);
            std::memcpy(bits + 1, kPlanes == 2 ? b + 8 * i : a + 8 * i, 8);
            found += __builtin_popcountll(bits[0] & bits[1]);
        }
        return found;
    }

    static void store(const Vector& exponents, uint8_t* out) { std::memcpy(out, exponents.lanes, 64); }

    template <bool kFloat16, bool kStream>
    static void join(const Vector& exponents, const uint8_t* sign_mantissa, const uint8_t* low, int shift,
                     uint16_t* out) {
        for (int i = 0; i < 64; ++i) {
            const int exponent = exponents.lanes[i], head = sign_mantissa[i];
            const int sign = (head & 0x80) << 8, mantissa = head & 0x7F;
            if constexpr (kFloat16) {
                const int bit = 3 * i + shift;
                const int bits = (low[bit / 8] | low[bit / 8 + 1] << 8) >> bit % 8 & 7;
                out[i] = static_cast<uint16_t>(sign | exponent << 8 | mantissa << 3 | bits);
            } else {
                out[i] = static_cast<uint16_t>(sign | (exponent & 0x7F) << 8 | (exponent & 0x80) | mantissa);
            }
        }
    }
};

}  // namespace
}  // namespace endor

#include "exponent_loops.h"

namespace endor {

const ExponentKernels* scalar_exponent_kernels() {
    static constexpr ExponentKernels kernels = make_exponent_kernels();
    return &kernels;
}

}  // namespace endor
