// The loops over levels that every instruction set shares. The including file defines ENDOR_TARGET and
// `struct ExponentIsa` with these operations on 64 values:
//
//   Vector                                                   64 exponents
//   struct Table; static Table load_table<kPlanes>(table)    what `exponents` needs of the table
//   static Vector exponents<kPlanes>(a, b, table, next)      of values whose plane bits are a and b; `next` moves on
//   static void store(Vector, uint8_t* out)
//   static int64_t count(a, b, words)                        bits set in both
//   static void join<kFloat16, kStream>(Vector, const uint8_t* sign_mantissa, const uint8_t* low, int shift, uint16_t* out)
//                                                            may read 64 and, at low, 32 bytes
//
// A record is decoded from its last level to its first: what a level sends on is then a run of exponents that already
// lies in memory, to be expanded into the gaps that the level leaves. No level branches on its bits.

namespace endor {
namespace {

inline uint64_t load_bits(const uint8_t* from) {
    uint64_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

// The last bits of a plane, fewer than 64 and without what lies behind them.
inline uint64_t load_last_bits(const uint8_t* from, int64_t count) {
    uint64_t bits = 0;
    std::memcpy(&bits, from, (count + 7) / 8);
    return bits & ((uint64_t{1} << count) - 1);
}

template <int kPlanes>
ENDOR_TARGET int64_t count_escapes(const Level& level) {
    const uint8_t* const a = level.planes;
    const uint8_t* const b = level.planes + (kPlanes - 1) * level.stride();
    int64_t i = level.count / 64 * 64;
    int64_t found = ExponentIsa::count(a, b, i / 64);
    if (const int64_t left = level.count - i) {
        found += __builtin_popcountll(load_last_bits(a + i / 8, left) & load_last_bits(b + i / 8, left));
    }
    return found;
}

template <int kPlanes>
ENDOR_TARGET void level_exponents(const Level& level, const uint8_t* next, uint8_t* out) {
    const uint8_t* const a = level.planes;
    const uint8_t* const b = level.planes + (kPlanes - 1) * level.stride();
    const auto table = ExponentIsa::template load_table<kPlanes>(level.table);
    int64_t i = 0;
    for (; i + 64 <= level.count; i += 64) {
        ExponentIsa::store(
            ExponentIsa::template exponents<kPlanes>(load_bits(a + i / 8), load_bits(b + i / 8), table, next), out + i);
    }
    if (const int64_t left = level.count - i) {
        ExponentIsa::store(ExponentIsa::template exponents<kPlanes>(load_last_bits(a + i / 8, left),
                                                                    load_last_bits(b + i / 8, left), table, next),
                           out + i);
    }
}

constexpr int64_t kLowReach = 32;

// 64 values' low bits where a vector would reach over the end of their section.
ENDOR_TARGET inline void copy_low(const uint8_t* low, const uint8_t* end, uint8_t* out) {
    const int64_t there = end - low;
    std::memset(out, 0, kLowReach);
    if (there > 0) std::memcpy(out, low, there < kLowReach ? there : kLowReach);
}

template <bool kFloat16, bool kStream, class V>
ENDOR_TARGET inline void join_full(V exponents, const Heads& heads, int64_t i, uint16_t* out) {
    if constexpr (kFloat16) {
        const uint8_t* const low = heads.low + i / 64 * 24;
        if (heads.low_end - low >= kLowReach) {
            ExponentIsa::template join<true, kStream>(exponents, heads.sign_mantissa + i, low, heads.low_shift, out);
        } else {
            uint8_t copy[kLowReach];
            copy_low(low, heads.low_end, copy);
            ExponentIsa::template join<true, kStream>(exponents, heads.sign_mantissa + i, copy, heads.low_shift, out);
        }
    } else {
        ExponentIsa::template join<false, kStream>(exponents, heads.sign_mantissa + i, nullptr, 0, out);
    }
}

template <bool kFloat16, class V>
ENDOR_TARGET __attribute__((noinline)) void join_last(V exponents, const Heads& heads, int64_t i, int64_t left,
                                                      uint16_t* out) {
    alignas(64) uint8_t heads_copy[64] = {}, low_copy[kLowReach] = {};
    alignas(64) uint16_t values[64];
    std::memcpy(heads_copy, heads.sign_mantissa + i, left);
    if constexpr (kFloat16) copy_low(heads.low + i / 64 * 24, heads.low_end, low_copy);
    ExponentIsa::template join<kFloat16, false>(exponents, heads_copy, low_copy, heads.low_shift, values);
    std::memcpy(out, values, left * 2);
}

template <int kPlanes, bool kFloat16, bool kStream>
ENDOR_TARGET const uint8_t* join_range(const Level& level, const uint8_t* next, const Heads& heads, int64_t first,
                                       int64_t stop, uint16_t* out) {
    constexpr uintptr_t kPrefetchBytes = 2048;
    const uint8_t* const a = level.planes;
    const uint8_t* const b = level.planes + (kPlanes - 1) * level.stride();
    const auto table = ExponentIsa::template load_table<kPlanes>(level.table);
    int64_t i = first;
    for (; i + 64 <= stop; i += 64, out += 64) {
        __builtin_prefetch(
            reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(heads.sign_mantissa) + i + kPrefetchBytes));
        const auto exponents =
            ExponentIsa::template exponents<kPlanes>(load_bits(a + i / 8), load_bits(b + i / 8), table, next);
        join_full<kFloat16, kStream>(exponents, heads, i, out);
    }
    if (const int64_t left = stop - i) {
        const auto exponents = ExponentIsa::template exponents<kPlanes>(load_last_bits(a + i / 8, left),
                                                                        load_last_bits(b + i / 8, left), table, next);
        join_last<kFloat16>(exponents, heads, i, left, out);
    }
    return next;
}

template <int kPlanes, bool kFloat16>
ENDOR_TARGET const uint8_t* join_values(const Level& level, const uint8_t* next, const Heads& heads, int64_t first,
                                        int64_t stop, uint16_t* out, bool streaming) {
    return streaming ? join_range<kPlanes, kFloat16, true>(level, next, heads, first, stop, out)
                     : join_range<kPlanes, kFloat16, false>(level, next, heads, first, stop, out);
}

constexpr ExponentKernels make_exponent_kernels() {
    return {{count_escapes<1>, count_escapes<2>},
            {level_exponents<1>, level_exponents<2>},
            {{join_values<1, false>, join_values<1, true>}, {join_values<2, false>, join_values<2, true>}}};
}

}  // namespace
}  // namespace endor
