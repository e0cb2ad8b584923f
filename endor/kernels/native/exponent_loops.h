// The loops over levels and rows that every instruction set shares. The including file defines ENDOR_TARGET and
// `struct ExponentIsa` with these operations on 64 values; exponents are placed everywhere (exponent.h):
//
//   Vector                                                   64 exponents
//   struct Table; static Table load_table<kPlanes>(named)    what `exponents` needs of the exponents that a level names
//   static Vector exponents<kPlanes>(a, b, table, next)      of values whose plane bits are a and b; `next` moves on
//   static Vector place<kFloat16>(const uint8_t*)            64 exponents as they stand in a record
//   static void store(Vector, uint8_t* out)
//   static int64_t count<kPlanes>(a, b, words)               bits set in both; with one plane they are the same
//   static void join<kFloat16, kStream>(Vector, const uint8_t* sign_mantissa, const uint8_t* low, int shift, uint16_t* out)
//                                                            may read 64 and, at low, 32 bytes
//
// A record is decoded from its last level to its first: what a level sends on is then a run of exponents that already
// lies in memory, to be expanded into the gaps that the level leaves. Nothing branches on bits.

namespace endor {
namespace {

inline uint64_t load_bits(const uint8_t* from) {
    uint64_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

// The last bits of a plane, fewer than 64, without what lies behind them: there is always something (kSlackBytes).
inline uint64_t load_last_bits(const uint8_t* from, int64_t count) {
    return load_bits(from) & ((uint64_t{1} << count) - 1);
}

template <int kPlanes>
ENDOR_TARGET int64_t count_escapes(const Level& level) {
    const uint8_t* const a = level.planes;
    const uint8_t* const b = level.planes + (kPlanes - 1) * level.stride();
    const int64_t whole = level.count / 64 * 64, left = level.count - whole;
    const int64_t found = ExponentIsa::template count<kPlanes>(a, b, whole / 64);
    return found + __builtin_popcountll(load_last_bits(a + whole / 8, left) & load_last_bits(b + whole / 8, left));
}

template <bool kFloat16>
ENDOR_TARGET void place_exponents(const uint8_t* exponents, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; i += 64) {
        ExponentIsa::store(ExponentIsa::template place<kFloat16>(exponents + i), out + i);
    }
}

template <int kPlanes>
ENDOR_TARGET void level_exponents(const Level& level, const uint8_t* next, uint8_t* out) {
    const uint8_t* const a = level.planes;
    const uint8_t* const b = level.planes + (kPlanes - 1) * level.stride();
    const auto table = ExponentIsa::template load_table<kPlanes>(level.named);
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

template <int kPlanes, bool kFloat16, bool kStream>
ENDOR_TARGET void join_values(RecordCursor& record, int64_t count, uint16_t* out) {
    const auto table = ExponentIsa::template load_table<kPlanes>(record.named);
    const uint8_t* const a = record.planes[0] + record.value / 8;
    const uint8_t* const b = record.planes[1] + record.value / 8;
    const uint8_t* const heads = record.sign_mantissa + record.value;
    const uint8_t* const low = kFloat16 ? record.low + record.value / 8 * 3 : nullptr;
    const uint8_t* next = record.next;
    const Ahead ahead(record);
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        ahead.fetch<kFloat16>(record, record.value + i);
        const auto exponents =
            ExponentIsa::template exponents<kPlanes>(load_bits(a + i / 8), load_bits(b + i / 8), table, next);
        ExponentIsa::template join<kFloat16, kStream>(exponents, heads + i, low + i / 8 * 3, record.low_shift, out + i);
    }
    if (const int64_t left = count - i) {
        alignas(64) uint16_t buffer[64];
        const auto exponents = ExponentIsa::template exponents<kPlanes>(load_last_bits(a + i / 8, left),
                                                                        load_last_bits(b + i / 8, left), table, next);
        ExponentIsa::template join<kFloat16, false>(exponents, heads + i, low + i / 8 * 3, record.low_shift, buffer);
        std::memcpy(out + i, buffer, left * sizeof *out);
    }
    record.next = next;
    record.value += count;
}

template <int kPlanes, bool kFloat16>
ENDOR_TARGET void read_values(RecordCursor& record, int64_t count, uint16_t* out, bool streaming) {
    // Non-temporal stores exist for whole aligned vectors only.
    if (streaming && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
        join_values<kPlanes, kFloat16, true>(record, count, out);
    } else {
        join_values<kPlanes, kFloat16, false>(record, count, out);
    }
}

constexpr ExponentKernels make_exponent_kernels() {
    return {{count_escapes<1>, count_escapes<2>},
            {place_exponents<false>, place_exponents<true>},
            {level_exponents<1>, level_exponents<2>},
            {{read_values<1, false>, read_values<1, true>}, {read_values<2, false>, read_values<2, true>}},
            {}};
}

}  // namespace
}  // namespace endor
