// LoRA of prompts in AMX tiles: low = A x from the pieces that the base's own product has cut, and B low added to its sums
// before they leave the tile registers. Owns how A and B become tiles, which rows of a tile are whose, and the same sums for
// an output that is in memory already.
//
// Rows of one tile may be of several tenants. Each adapter's sums begin with the base's as they are, and only its own rows of
// them are kept: a broken adapter reaches nobody else, and nobody's bits depend on who shares a tile.
#include "tiles.h"

#include "team.h"

namespace adapterd {

#ifdef ADAPTERD_TILES
namespace {

// 16 words of 16 rows -> their transpose.
void transpose(__m512i (&v)[SIDE]) {
    __m512i t[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Rows [rank, rank + 16) of A as weights of 16 columns: [steps_of(in)] tiles, zero where A ends.
void lay_a(const AdaptedRows &run, index_t rank, index_t in, bf16 *to) {
    for (index_t k = 0; k < in; k += STEP, to += TILE) {
        __mmask32 held = in - k >= STEP ? ~0u : (1u << (in - k)) - 1;
        __m512i words[SIDE];
        for (int j = 0; j < SIDE; j++)
            words[j] = rank + j < run.rank ? _mm512_maskz_loadu_epi16(held, run.a + (rank + j) * in + k) : _mm512_setzero_si512();
        transpose(words);
        for (int j = 0; j < SIDE; j++) _mm512_store_si512(to + j * STEP, words[j]);
    }
    written();
}

// low [16][stride] of one row of tiles, 16 ranks of it.
void multiply_a(const bf16 *pieces, const bf16 *a, index_t steps, float *low, index_t stride) {
    zero_sums<1>();
    for (; steps > 0; steps--, pieces += PIECES * TILE, a += TILE) {
        load_pieces(pieces);
        ADAPTERD_COLUMN(0, a);
    }
    store_sums<1>(low, stride);
}

}  // namespace

template <int TILES>
void lay_b(const AdaptedRows &run, index_t out, index_t column, bf16 *to) {
    for (index_t step = 0; step < steps_of(run.rank); step++)
        for (index_t from = column; from < column + TILES * SIDE; from += SIDE) {
            __mmask16 held = first(out - from);
            for (index_t j = step * STEP; j < (step + 1) * STEP; j += 2, to += STEP) {
                const bf16 *row = run.b + j * out + from;
                __m512i words = _mm512_setzero_si512();
                if (j < run.rank) words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(held, row));
                if (j + 1 < run.rank)
                    words = _mm512_or_si512(
                        words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(held, row + out)), 16));
                _mm512_store_si512(to, words);
            }
        }
    written();
}

template void lay_b<2>(const AdaptedRows &, index_t, index_t, bf16 *);
template void lay_b<4>(const AdaptedRows &, index_t, index_t, bf16 *);

void LowRank::begin(const std::vector<AdaptedRows> *runs, index_t origin, index_t from, index_t to, const bf16 *pieces,
                    index_t in) {
    segments_.clear();
    if (!runs || runs->empty()) return;
    index_t steps = steps_of(in), size = 0;
    for (const AdaptedRows &run : *runs)
        for (index_t row = std::max(run.from - origin, from); row < std::min(run.to - origin, to);) {
            index_t tile = from + (row - from) / SIDE * SIDE, end = std::min(std::min(tile + SIDE, run.to - origin), to);
            segments_.push_back({tile, row, end, &run, nullptr});
            size += steps_of(run.rank) * PIECES * TILE;
            row = end;
        }
    bf16 *low = low_.of<bf16>(static_cast<std::size_t>(size)), *a = nullptr;
    const AdaptedRows *laid = nullptr;
    for (Segment &segment : segments_) {
        const AdaptedRows &run = *segment.run;
        index_t columns = steps_of(run.rank) * STEP;
        if (&run != laid) {
            a = turned_.of<bf16>(static_cast<std::size_t>(columns / SIDE * steps * TILE));
            for (index_t rank = 0; rank < run.rank; rank += SIDE) lay_a(run, rank, in, a + rank / SIDE * steps * TILE);
            laid = &run;
        }
        alignas(64) float products[SIDE * STEP];
        segment.low = low;
        for (index_t rank = 0; rank < run.rank; rank += STEP, low += PIECES * TILE) {
            const bf16 *own = pieces + (segment.tile - from) / SIDE * steps * PIECES * TILE;
            for (index_t half = 0; half < STEP && rank + half < run.rank; half += SIDE)
                multiply_a(own, a + (rank + half) / SIDE * steps * TILE, steps, products + half, STEP);
            cut_rows_of_tile(products, STEP, SIDE, std::min<index_t>(run.rank - rank, STEP), low);
        }
    }
}

namespace {

constexpr index_t BLOCK = 16;       // tiles of rows that are cut before their products
constexpr index_t WIDE = 4 * SIDE;  // columns added to at a time

// All of B in tiles, WIDE columns after WIDE columns.
const bf16 *all_of_b(const AdaptedRows &run, index_t out, Scratch &space) {
    index_t size = steps_of(run.rank) * 4 * TILE;
    bf16 *b = space.of<bf16>(static_cast<std::size_t>((out + WIDE - 1) / WIDE * size));
    for (index_t column = 0; column < out; column += WIDE) lay_b<4>(run, out, column, b + column / WIDE * size);
    return b;
}

// y += B low on a segment's rows; `b` holds all of B.
void add_segment(const Segment &segment, const bf16 *b, float *y, index_t out) {
    index_t steps = steps_of(segment.run->rank);
    alignas(64) float sums[SIDE * WIDE];
    for (index_t column = 0; column < out; column += WIDE, b += steps * 4 * TILE) {
        index_t width = std::min(out - column, WIDE);
        for (index_t r = segment.from; r < segment.to; r++)
            std::memcpy(sums + (r - segment.tile) * WIDE, y + r * out + column, width * sizeof(float));
        written();
        load_sums<4>(sums, WIDE);
        add_low<4>(segment, b);
        store_sums<4>(sums, WIDE);
        for (index_t r = segment.from; r < segment.to; r++)
            std::memcpy(y + r * out + column, sums + (r - segment.tile) * WIDE, width * sizeof(float));
    }
}

}  // namespace

void team_lora_tiles(const std::vector<AdaptedRows> &runs, const float *x, float *y, index_t in, index_t out) {
    static thread_local Scratch pieces, columns;
    static thread_local LowRank low;
    index_t steps = steps_of(in);
    configure();
    for (const AdaptedRows &run : runs) {
        Range tiles = member.share((run.to - run.from + SIDE - 1) / SIDE);
        if (tiles.from == tiles.to) continue;
        const bf16 *b = all_of_b(run, out, columns);
        bf16 *own = pieces.of<bf16>(static_cast<std::size_t>(std::min(tiles.to - tiles.from, BLOCK) * steps * PIECES * TILE));
        const std::vector<AdaptedRows> alone{run};
        for (index_t tile = tiles.from; tile < tiles.to; tile += BLOCK) {
            index_t from = run.from + tile * SIDE, to = std::min(from + std::min(BLOCK, tiles.to - tile) * SIDE, run.to);
            for (index_t row = from; row < to; row += SIDE)
                cut_rows_of_tile(x + row * in, in, std::min<index_t>(SIDE, to - row), in,
                                 own + (row - from) / SIDE * steps * PIECES * TILE);
            low.begin(&alone, 0, from, to, own, in);
            for (const Segment &segment : low.segments()) add_segment(segment, b, y, out);
        }
    }
    _tile_release();
    member.meet();
}

#else

void team_lora_tiles(const std::vector<AdaptedRows> &, const float *, float *, index_t, index_t) {}

#endif

}  // namespace adapterd
