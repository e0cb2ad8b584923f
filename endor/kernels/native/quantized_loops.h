// The loop over a row of quantised values that every instruction set shares. The including file defines ENDOR_TARGET and
// `struct QuantizedIsa` with these operations on one word of 64 elements:
//
//   Packed                                                          the integers of a word's values
//   static Packed load8(const uint8_t* codes, int count, left)      `left` bytes may be read, and 64 are more than enough
//   static Packed load4<kType>(const uint8_t* codes, int odd, int count, left, Codebook, buffer)
//                                                                   the first nibble is skipped if odd
//   static Codebook load_codebook(const int8_t*)
//   static Factor<kInt4, kType> factor(Codebook, float scale)       what `put` multiplies with, or looks up in
//   static void put<kInt4, kType, kStream>(word, const Packed&, const Factor&, Bits<kType>* out)

namespace endor {
namespace {

template <FloatType kType>
struct BitsOf {
    using Type = uint16_t;
};
template <>
struct BitsOf<kFloat32> {
    using Type = uint32_t;
};

constexpr int64_t kNibbleBuffer = 96;

template <bool kInt4, FloatType kType, bool kStream>
ENDOR_TARGET int64_t decode_words(const QuantizedRow& row) {
    using Bits = typename BitsOf<kType>::Type;
    constexpr uintptr_t kPrefetchBytes = 2048;
    alignas(64) uint8_t buffer[kNibbleBuffer];
    const auto codebook = QuantizedIsa::load_codebook(row.codebook);
    Bits* out = reinterpret_cast<Bits*>(row.out);
    int64_t value = row.first;
    for (int64_t first = 0, group = 0; first < row.cols; first += row.group_words * kWordBits, ++group) {
        const auto factor = QuantizedIsa::template factor<kInt4, kType>(codebook, bfloat16_scale(row.scales[group]));
        const int64_t group_stop = first + row.group_words * kWordBits;
        const int64_t stop = group_stop < row.cols ? group_stop : row.cols;
        for (int64_t col = first; col < stop; col += kWordBits) {
            uint64_t word = ~uint64_t{0};
            if (row.bitmap) {
                std::memcpy(&word, row.bitmap + col / 8, sizeof word);
            } else if (row.cols - col < kWordBits) {
                word >>= kWordBits - (row.cols - col);
            }
            const int count = __builtin_popcountll(word);
            const uint8_t* const codes = row.codes + (kInt4 ? value / 2 : value);
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(codes) + kPrefetchBytes));
            typename QuantizedIsa::Packed packed;
            if constexpr (kInt4) {
                packed = QuantizedIsa::template load4<kType>(codes, value & 1, count, row.codes_end - codes, codebook, buffer);
            } else {
                packed = QuantizedIsa::load8(codes, count, row.codes_end - codes, buffer);
            }
            value += count;
            if (row.cols - col >= kWordBits) {
                QuantizedIsa::template put<kInt4, kType, kStream>(word, packed, factor, out + col);
            } else {
                alignas(64) Bits last[kWordBits];
                QuantizedIsa::template put<kInt4, kType, false>(word, packed, factor, last);
                std::memcpy(out + col, last, (row.cols - col) * sizeof(Bits));
            }
        }
    }
    return value - row.first;
}

template <bool kInt4, FloatType kType>
ENDOR_TARGET int64_t decode_row(const QuantizedRow& row) {
    return row.streaming ? decode_words<kInt4, kType, true>(row) : decode_words<kInt4, kType, false>(row);
}

constexpr QuantizedKernels make_quantized_kernels() {
    return {{{decode_row<false, kBfloat16>, decode_row<false, kFloat16>, decode_row<false, kFloat32>},
             {decode_row<true, kBfloat16>, decode_row<true, kFloat16>, decode_row<true, kFloat32>}}};
}

}  // namespace
}  // namespace endor
