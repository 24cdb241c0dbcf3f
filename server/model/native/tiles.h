// What products in AMX tiles are made of: x cut into three bf16 pieces whose sum it is, bit for bit, and tiles of fp32 sums
// that grow along k. Every product is exact and the sums are fp32's, one chain in a fixed order whatever the number of rows.
//
//   pieces [ceil(M / 16)][ceil(K / 32)][3][16][32], zero padded; weights in tiles of 32 k by 16 columns, in which word (j, c)
//   holds k = 2j (low half) and 2j + 1 of column c
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define ADAPTERD_TILES 1
#include <immintrin.h>
#endif

namespace adapterd {

using bf16 = std::uint16_t;

// Neighbouring rows of prompts that go through one adapter of a pool: A [rank, in], B [rank, out] in bf16.
struct AdaptedRows {
    index_t from, to;
    const bf16 *a, *b;
    index_t rank;
};

// y += B (A x) on these rows, x [.., in], y [.., out]: the same bits as if it had been part of the product that y came from.
void team_lora_tiles(const std::vector<AdaptedRows> &runs, const float *x, float *y, index_t in, index_t out);

#ifdef ADAPTERD_TILES

constexpr int SIDE = 16;               // rows of a tile, and columns of an fp32 one
constexpr int STEP = 2 * SIDE;         // k of one tile
constexpr index_t TILE = SIDE * STEP;  // bf16 values of one tile: 1 KB
constexpr int PIECES = 3;              // 8 bits of an fp32's 24 each

inline index_t steps_of(index_t k) { return (k + STEP - 1) / STEP; }

// All eight tile registers as whole tiles. Not made on the stack: compilers know of its first bytes only that they are read.
inline constexpr struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
} WHOLE_TILES;

ADAPTERD_INLINE void configure() { _tile_loadconfig(&WHOLE_TILES); }

// Says that what was written is about to be read as tiles: compilers do not know that loads of tiles read memory.
ADAPTERD_INLINE void written() { asm volatile("" ::: "memory"); }

// The upper halves of a's 16 words and then of b's.
ADAPTERD_INLINE __m512i upper_halves(__m512i a, __m512i b) {
    static constexpr struct alignas(64) Odd {
        std::uint16_t at[STEP];
        constexpr Odd() : at() {
            for (int i = 0; i < STEP; i++) at[i] = static_cast<std::uint16_t>(2 * i + 1);
        }
    } ODD;
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(&ODD), b);
}

// The three pieces of 32 values: the upper half of the value, of what that leaves, and of what that leaves.
ADAPTERD_INLINE void cut(__m512 a, __m512 b, bf16 *to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int piece = 0; piece < PIECES; piece++) {
        __m512i of_a = _mm512_castps_si512(a), of_b = _mm512_castps_si512(b);
        _mm512_store_si512(to + piece * TILE, upper_halves(of_a, of_b));
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(of_a, upper)));
        b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(of_b, upper)));
    }
}

// The first `count` of a vector's values.
ADAPTERD_INLINE __mmask16 first(index_t count) {
    return static_cast<__mmask16>((1u << std::clamp<index_t>(count, 0, SIDE)) - 1);
}

// `rows` rows of `k` values, each `stride` behind the one before, into one row of tiles. Rows behind the last are left as they
// are: no sum that is kept meets them.
ADAPTERD_INLINE void cut_rows_of_tile(const float *x, index_t stride, index_t rows, index_t k, bf16 *to) {
    for (index_t from = 0; from < k; from += STEP, to += PIECES * TILE) {
        __mmask16 low = first(k - from), high = first(k - from - SIDE);
        for (index_t r = 0; r < rows; r++) {
            const float *values = x + r * stride + from;
            cut(_mm512_maskz_loadu_ps(low, values), _mm512_maskz_loadu_ps(high, values + SIDE), to + r * STEP);
        }
    }
    written();
}

// Tile registers: 0 to 3 sums of TILES columns of tiles, 4 the weights, 5 to 7 the pieces; the smallest go in first.
#define ADAPTERD_COLUMN(sums, weights)       \
    do {                                     \
        _tile_loadd(4, weights, 64);         \
        _tile_dpbf16ps(sums, 7, 4);          \
        _tile_dpbf16ps(sums, 6, 4);          \
        _tile_dpbf16ps(sums, 5, 4);          \
    } while (0)

ADAPTERD_INLINE void load_pieces(const bf16 *pieces) {
    _tile_loadd(5, pieces, 64);
    _tile_loadd(6, pieces + TILE, 64);
    _tile_loadd(7, pieces + 2 * TILE, 64);
}

template <int TILES>
ADAPTERD_INLINE void zero_sums() {
    _tile_zero(0);
    if constexpr (TILES > 1) _tile_zero(1);
    if constexpr (TILES > 2) _tile_zero(2);
    if constexpr (TILES > 3) _tile_zero(3);
}

template <int TILES>
ADAPTERD_INLINE void load_sums(const float *from, index_t stride) {
    const index_t bytes = stride * static_cast<index_t>(sizeof(float));
    _tile_loadd(0, from, bytes);
    if constexpr (TILES > 1) _tile_loadd(1, from + SIDE, bytes);
    if constexpr (TILES > 2) _tile_loadd(2, from + 2 * SIDE, bytes);
    if constexpr (TILES > 3) _tile_loadd(3, from + 3 * SIDE, bytes);
}

template <int TILES>
ADAPTERD_INLINE void store_sums(float *to, index_t stride) {
    const index_t bytes = stride * static_cast<index_t>(sizeof(float));
    _tile_stored(0, to, bytes);
    if constexpr (TILES > 1) _tile_stored(1, to + SIDE, bytes);
    if constexpr (TILES > 2) _tile_stored(2, to + 2 * SIDE, bytes);
    if constexpr (TILES > 3) _tile_stored(3, to + 3 * SIDE, bytes);
}

// What adapters add to the product of some rows, as far as it does not depend on the columns: `low` = A x, cut into pieces.
struct Segment {
    index_t tile, from, to;  // of a row of tiles, the rows that go through the adapter; rows of x
    const AdaptedRows *run;
    const bf16 *low;  // [steps_of(rank)][3][16][32]
};

// The low-rank half of a product: made by each thread for the rows it has pieces of.
class LowRank {
  public:
    // Rows {from, to} of x, whose pieces begin at `pieces`; `runs` count rows from `origin` on, in order.
    void begin(const std::vector<AdaptedRows> *runs, index_t origin, index_t from, index_t to, const bf16 *pieces, index_t in);
    const std::vector<Segment> &segments() const { return segments_; }

  private:
    std::vector<Segment> segments_;
    Scratch low_, turned_;
};

// Columns [column, column + 16 TILES) of B in tiles [steps_of(rank)][TILES].
template <int TILES>
void lay_b(const AdaptedRows &run, index_t out, index_t column, bf16 *to);

// sums += B low, with `b` as `lay_b` leaves it.
template <int TILES>
ADAPTERD_INLINE void add_low(const Segment &segment, const bf16 *b) {
    const bf16 *low = segment.low;
    for (index_t s = steps_of(segment.run->rank); s > 0; s--, low += PIECES * TILE, b += TILES * TILE) {
        load_pieces(low);
        ADAPTERD_COLUMN(0, b);
        if constexpr (TILES > 1) ADAPTERD_COLUMN(1, b + TILE);
        if constexpr (TILES > 2) ADAPTERD_COLUMN(2, b + 2 * TILE);
        if constexpr (TILES > 3) ADAPTERD_COLUMN(3, b + 3 * TILE);
    }
}

#endif

}  // namespace adapterd
