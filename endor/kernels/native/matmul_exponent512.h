// The loops of a matmul for codec `exponent`: records of row blocks are walked side by side, one row of each at a time. The
// including file has included matmul_rows.h; its Isa has `add_half`, which `add` does twice.

#include "exponent_expand512.h"

namespace endor {
namespace {

// Expanding a word takes no longer than two additions that wait for each other: so the halves of a word have sums of
// their own.
template <int kPlanes, int kXRows, int... kBlock>
ENDOR_TARGET inline void dot_records(std::integer_sequence<int, kBlock...>, RecordCursor* records,
                                     const uint8_t* const* bitmaps, int64_t words, PreparedX x, float* sums) {
    using X = typename Isa::X;
    constexpr int kBlocks = sizeof...(kBlock);
    const Ahead ahead[kBlocks] = {Ahead(records[kBlock])...};
    typename Isa::Sums first[kBlocks][kXRows] = {}, second[kBlocks][kXRows] = {};
    Cursor512<kPlanes, false> cursors[kBlocks] = {Cursor512<kPlanes, false>(records[kBlock])...};
    const uint8_t* columns_of_x = x.data;
    for (int64_t i = 0; i < words; ++i, columns_of_x += kWordBits * sizeof(X)) {
        for (int b = 0; b < kBlocks; ++b) {
            const RecordCursor& at = cursors[b].record();
            ahead[b].template fetch<false>(at, at.value);
            Ahead::fetch_line(reinterpret_cast<uintptr_t>(bitmaps[b]) + static_cast<uintptr_t>(i + words * kBlocks) * 8);
            const Weights512 weights = cursors[b].next(matmul_word(bitmaps[b] + i * 8));
            for (int m = 0; m < kXRows; ++m) {
                const X* from = reinterpret_cast<const X*>(columns_of_x + m * x.stride_bytes);
                Isa::add_half(first[b][m], weights.first, from);
                Isa::add_half(second[b][m], weights.second, from + kWordBits / 2);
            }
        }
    }
    for (int b = 0; b < kBlocks; ++b) {
        records[b] = cursors[b].record();
        for (int m = 0; m < kXRows; ++m) {
            sums[b * kXRows + m] = Isa::total({_mm512_add_ps(first[b][m].lanes, second[b][m].lanes)});
        }
    }
}

template <int kPlanes, int kBlocks, int kXRows>
ENDOR_TARGET void dot_blocks(RecordCursor* records, const uint8_t* const* bitmaps, int64_t words, PreparedX x,
                             float* sums) {
    dot_records<kPlanes, kXRows>(std::make_integer_sequence<int, kBlocks>(), records, bitmaps, words, x, sums);
}

constexpr int group_blocks_for(int x_rows) { return x_rows <= 0 ? kMaxGroupBlocks : 1; }

template <class T, int... kIndex>
constexpr MatmulRecordLoops make_record_loops(std::integer_sequence<int, kIndex...>) {
    return {prepare_rows<RawSource, T>,
            {group_blocks_for(kIndex + 1)...},
            {{dot_blocks<1, group_blocks_for(kIndex + 1), kIndex + 1>...},
             {dot_blocks<2, group_blocks_for(kIndex + 1), kIndex + 1>...}},
            {{dot_blocks<1, 1, kIndex + 1>...}, {dot_blocks<2, 1, kIndex + 1>...}}};
}

template <class T>
constexpr MatmulRecordLoops kRecordLoops = make_record_loops<T>(std::make_integer_sequence<int, kMaxXRows>());

}  // namespace
}  // namespace endor
