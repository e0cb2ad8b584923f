// Plain C++. Zeros are multiplied too, so that infinity times a pruned weight is NaN here as everywhere.

#include "matmul.h"

#include <cstring>

#define ENDOR_TARGET

namespace endor {
namespace {

struct Isa {
    struct Columns {
        float values[kWordBits];
    };
    using X = float;
    struct Sums {
        float lanes[4];
    };
    static constexpr int kHalf = 0;
    static constexpr int kSums = 1;

    static Columns expand(uint64_t word, const uint16_t* values) {
        Columns columns{};
        for (; word; word &= word - 1) {
            const uint32_t wide = static_cast<uint32_t>(*values++) << 16;
            std::memcpy(&columns.values[__builtin_ctzll(word)], &wide, sizeof wide);
        }
        return columns;
    }

    static Columns load(const uint16_t* columns) { return expand(~uint64_t{0}, columns); }

    static void add(Sums& sums, const Columns& columns, const float* x) {
        for (int i = 0; i < kWordBits; i += 4) {
            for (int lane = 0; lane < 4; ++lane) sums.lanes[lane] += columns.values[i + lane] * x[i + lane];
        }
    }

    static float total(const Sums& sums) {
        return (sums.lanes[0] + sums.lanes[1]) + (sums.lanes[2] + sums.lanes[3]);
    }
};

}  // namespace
}  // namespace endor

#include "matmul_rows.h"

namespace endor {

const MatmulKernels* scalar_matmul(bool fp32) {
    static constexpr MatmulKernels narrow{
        "scalar", false, 4, {&kLoops<RawSource, uint16_t>, nullptr, nullptr, &kLoops<DecodedSource, uint16_t>}, nullptr};
    static constexpr MatmulKernels wide{
        "scalar", true, 4, {&kLoops<RawSource, float>, nullptr, nullptr, &kLoops<DecodedSource, float>}, nullptr};
    return fp32 ? &wide : &narrow;
}

}  // namespace endor
