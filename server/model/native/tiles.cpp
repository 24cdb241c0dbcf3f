// y = x W^T + b over bf16 weights in AMX tiles, with fp32's accuracy: every x is cut into three bf16 pieces whose sum it
// is, bit for bit, so each product is exact and the sums are fp32's. Owns the cutting, the tiles and their blocking.
//
//   weight [N, K]  ->  panels [ceil(N / 32)][ceil(K / 32)][2][16][16][2], zero padded: two tiles of 16 columns per step
//                      of 32 k, in which word (j, c) holds rows 2j and 2j + 1 of k for column c
//   x [M, K]       ->  pieces [ceil(M / 16)][ceil(K / 32)][3][16][32], zero padded, made anew for every product
//
// A tile's rows do not meet: an output element is one chain of sums along k in a fixed order, whatever the number of rows.
// An infinity has no such pieces: it gives NaN, and a row of no finite values either way.
#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "team.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define ADAPTERD_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace adapterd {

#ifdef ADAPTERD_TILES
namespace {

constexpr int SIDE = 16;                         // rows of a tile, and columns of an fp32 one
constexpr int STEP = 2 * SIDE;                   // k of one tile
constexpr index_t TILE = SIDE * STEP;            // bf16 values of one tile: 1 KB
constexpr int PIECES = 3;                        // 8 bits of an fp32's 24 each
constexpr index_t BLOCK_BYTES = 9 << 17;         // of the second-level cache: a block's pieces, and the panels that pass
constexpr index_t FEW = 64;                      // rows up to which a second thread's cutting of the same rows is cheap
constexpr index_t LINE = 64;                     // bytes the cache takes at once
constexpr index_t FIRST_LINES = 256;             // of a thread's first panel, asked for before anything else

using bf16 = std::uint16_t;

struct Call {
    const float *x;
    const bf16 *panels;
    const float *bias;
    float *y;
    index_t m, n, k, steps;

    index_t panel_bytes() const { return steps * 2 * TILE * static_cast<index_t>(sizeof(bf16)); }
    const char *panel(index_t p) const { return reinterpret_cast<const char *>(panels) + p * panel_bytes(); }
};

// Tiles of rows whose pieces stay in the second-level cache beside the two panels that are read and the two that come next.
index_t block_tiles(index_t steps) {
    index_t step_tiles = BLOCK_BYTES / (steps * TILE * static_cast<index_t>(sizeof(bf16)));
    return std::max<index_t>((step_tiles - 4 * PANEL / SIDE) / PIECES, 1);
}

// Of one thread: the pieces of a block, and of few rows.
index_t own_space(index_t steps) { return std::max(block_tiles(steps), FEW / SIDE) * steps * PIECES * TILE; }

const bf16 *piece_at(const Call &c, const bf16 *pieces, index_t row) { return pieces + row / SIDE * c.steps * PIECES * TILE; }

// All eight tile registers as whole tiles. Not made on the stack: compilers know of its first bytes only that they are read.
constexpr struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
} WHOLE_TILES;

void configure() { _tile_loadconfig(&WHOLE_TILES); }

// The upper halves of a's 16 words and then of b's.
__m512i upper_halves(__m512i a, __m512i b) {
    static constexpr struct alignas(64) Odd {
        std::uint16_t at[STEP];
        constexpr Odd() : at() {
            for (int i = 0; i < STEP; i++) at[i] = static_cast<std::uint16_t>(2 * i + 1);
        }
    } ODD;
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(&ODD), b);
}

// The three pieces of 32 values: the upper half of the value, of what that leaves, and of what that leaves.
void cut(__m512 a, __m512 b, bf16 *to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int piece = 0; piece < PIECES; piece++) {
        __m512i of_a = _mm512_castps_si512(a), of_b = _mm512_castps_si512(b);
        _mm512_store_si512(to + piece * TILE, upper_halves(of_a, of_b));
        a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(of_a, upper)));
        b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(of_b, upper)));
    }
}

// The first `count` of a vector's values.
__mmask16 first(index_t count) { return static_cast<__mmask16>((1u << std::clamp<index_t>(count, 0, SIDE)) - 1); }

// Rows from `row` and k from `step * STEP` on. Rows behind the last are left as they are: no sum that is kept meets them.
void cut_tile(const Call &c, index_t row, index_t step, bf16 *to) {
    index_t rows = std::min<index_t>(c.m - row, SIDE), from = step * STEP;
    __mmask16 low = first(c.k - from), high = first(c.k - from - SIDE);
    const float *x = c.x + row * c.k + from;
    for (index_t r = 0; r < rows; r++, x += c.k, to += STEP)
        cut(_mm512_maskz_loadu_ps(low, x), _mm512_maskz_loadu_ps(high, x + SIDE), to);
}

// Tile registers: 0 to 3 sums of up to four columns of tiles, 4 the weights, 5 to 7 the pieces; the smallest go in first.
#define ADAPTERD_COLUMN(sums, weights)       \
    do {                                     \
        _tile_loadd(4, weights, 64);         \
        _tile_dpbf16ps(sums, 7, 4);          \
        _tile_dpbf16ps(sums, 6, 4);          \
        _tile_dpbf16ps(sums, 5, 4);          \
    } while (0)

// Memory wanted next, `lines` cache lines of it per step: tiles are read too fast for the processor to foresee.
struct Coming {
    const char *at;
    index_t lines;
};

// 16 rows times one panel, or two that lie side by side, into out [16][32 or 64], which is asked for meanwhile.
template <int PANELS>
ADAPTERD_INLINE void multiply(const bf16 *pieces, const bf16 *panel, index_t steps, float *out, index_t ldo, Coming coming) {
    const bf16 *next = panel + 2 * TILE * steps;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (PANELS == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (index_t s = 0; s < steps; s++) {
        for (index_t line = 0; line < coming.lines; line++, coming.at += LINE) __builtin_prefetch(coming.at, 0, 2);
        if (s < SIDE)
            for (int column = 0; column < PANELS * PANEL; column += SIDE) __builtin_prefetch(out + s * ldo + column, 1, 2);
        _tile_loadd(5, pieces, 64);
        _tile_loadd(6, pieces + TILE, 64);
        _tile_loadd(7, pieces + 2 * TILE, 64);
        ADAPTERD_COLUMN(0, panel);
        ADAPTERD_COLUMN(1, panel + TILE);
        if constexpr (PANELS == 2) {
            ADAPTERD_COLUMN(2, next);
            ADAPTERD_COLUMN(3, next + TILE);
        }
        pieces += PIECES * TILE;
        panel += 2 * TILE;
        next += 2 * TILE;
    }
    _tile_stored(0, out, ldo * sizeof(float));
    _tile_stored(1, out + SIDE, ldo * sizeof(float));
    if constexpr (PANELS == 2) {
        _tile_stored(2, out + 2 * SIDE, ldo * sizeof(float));
        _tile_stored(3, out + 3 * SIDE, ldo * sizeof(float));
    }
}

#undef ADAPTERD_COLUMN

void add_bias(const float *bias, float *out, index_t ldo, index_t rows, index_t width) {
    for (index_t r = 0; r < rows; r++)
        for (index_t j = 0; j < width; j++) out[r * ldo + j] += bias[j];
}

// One row of tiles times PANELS panels from panel `p` on; what hangs over the edges of y goes through a buffer.
template <int PANELS>
void block_product(const Call &c, const bf16 *pieces, index_t row, index_t p, Coming coming) {
    constexpr index_t wide = PANELS * PANEL;
    const bf16 *panel = reinterpret_cast<const bf16 *>(c.panel(p));
    index_t column = p * PANEL, rows = c.m - row < SIDE ? c.m - row : SIDE, width = c.n - column < wide ? c.n - column : wide;
    float *out = c.y + row * c.n + column;
    if (rows == SIDE && width == wide) {
        multiply<PANELS>(pieces, panel, c.steps, out, c.n, coming);
    } else {
        alignas(64) float buffer[SIDE * wide];
        multiply<PANELS>(pieces, panel, c.steps, buffer, wide, coming);
        for (index_t r = 0; r < rows; r++) std::memcpy(out + r * c.n, buffer + r * wide, width * sizeof(float));
    }
    if (c.bias) add_bias(c.bias + column, out, c.n, rows, width);
}

// The rows times PANELS panels from `p` on, fetching `ahead` bytes behind them meanwhile. `pieces` begin at the first row.
template <int PANELS>
void strip(const Call &c, const bf16 *pieces, Range rows, index_t p, index_t ahead) {
    index_t tiles = (rows.to - rows.from + SIDE - 1) / SIDE, lines = ahead / LINE;
    Coming coming{c.panel(p + PANELS), (lines + c.steps * tiles - 1) / (c.steps * tiles)};
    for (index_t row = rows.from; row < rows.to; row += SIDE) {
        block_product<PANELS>(c, piece_at(c, pieces, row - rows.from), row, p, coming);
        coming.at += coming.lines * c.steps * LINE;
    }
}

// Two panels at a time.
void product(const Call &c, const bf16 *pieces, Range rows, Range panels) {
    index_t p = panels.from;
    for (; p + 2 <= panels.to; p += 2) strip<2>(c, pieces, rows, p, std::min<index_t>(panels.to - p - 2, 2) * c.panel_bytes());
    if (p < panels.to) strip<1>(c, pieces, rows, p, 0);
}

void cut_rows(const Call &c, Range rows, bf16 *pieces) {
    for (index_t row = rows.from; row < rows.to; row += SIDE)
        for (index_t s = 0; s < c.steps; s++, pieces += PIECES * TILE) cut_tile(c, row, s, pieces);
}

// Few rows: each thread has its panels, and cuts every row for itself, which is sooner done than waited for.
void by_panels(const Call &c, bf16 *pieces) {
    Range mine = member.share((c.n + PANEL - 1) / PANEL);
    for (index_t line = 0; mine.from < mine.to && line < FIRST_LINES; line++)
        __builtin_prefetch(c.panel(mine.from) + line * LINE, 0, 2);
    cut_rows(c, {0, c.m}, pieces);
    product(c, pieces, {0, c.m}, mine);
}

// Many rows: each thread has its own, and cuts as many at a time as stay in the cache while all panels pass.
void by_rows(const Call &c, bf16 *pieces) {
    Range mine = member.share((c.m + SIDE - 1) / SIDE);
    index_t tiles = mine.to - mine.from, most = block_tiles(c.steps), blocks = (tiles + most - 1) / most;
    for (index_t b = 0; b < blocks; b++) {
        index_t from = mine.from + tiles * b / blocks, to = mine.from + tiles * (b + 1) / blocks;
        Range rows{from * SIDE, std::min(to * SIDE, c.m)};
        cut_rows(c, rows, pieces);
        product(c, pieces, rows, {0, (c.n + PANEL - 1) / PANEL});
    }
}

}  // namespace

bool tiles_usable() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

index_t tiles_space(index_t k) { return threads * own_space((k + STEP - 1) / STEP); }

bool few_for_tiles(index_t rows) { return rows <= FEW; }

void team_both(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k,
               index_t prompt, std::uint16_t *space) {
    Call call{x + prompt * k, static_cast<const bf16 *>(panels), bias, y + prompt * n, m - prompt, n, k, (k + STEP - 1) / STEP};
    bf16 *pieces = space + member.place * own_space(call.steps);
    Range mine = member.share((n + PANEL - 1) / PANEL);
    configure();
    cut_rows(call, {0, call.m}, pieces);
    for (index_t p = mine.from; p < mine.to; p++) {
        tiled_panel(x, panels, bias, y, prompt, n, k, p);
        strip<1>(call, pieces, {0, call.m}, p, 0);
    }
    _tile_release();
    member.meet();
}

void team_tiles(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k,
                std::uint16_t *space) {
    Call call{x, static_cast<const bf16 *>(panels), bias, y, m, n, k, (k + STEP - 1) / STEP};
    bf16 *pieces = space + member.place * own_space(call.steps);
    configure();
    if (m <= FEW)
        by_panels(call, pieces);
    else
        by_rows(call, pieces);
    _tile_release();
    member.meet();
}

#else

bool tiles_usable() { return false; }
index_t tiles_space(index_t) { return 0; }
void team_tiles(const float *, const void *, const float *, float *, index_t, index_t, index_t, std::uint16_t *) {}
bool few_for_tiles(index_t) { return false; }
void team_both(const float *, const void *, const float *, float *, index_t, index_t, index_t, index_t, std::uint16_t *) {}

#endif

}  // namespace adapterd

// 1 where this processor has AMX tiles and the kernel lets this process use them.
ADAPTERD_EXPORT int adapterd_tiles() { return adapterd::tiles_usable() ? 1 : 0; }
