// y = x W^T + b over a weight packed in panels of 32 columns, stored as fp32, bf16 or int8, multiplied in fp32.
// Owns the blocking and the packed layout's arithmetic; the layout itself is made in Python (`layouts.py`).
//
//   weight [N, K]  ->  panels [ceil(N / 32)][K][32], zero padded; a panel is read front to back, once per block of rows
//   int8: each panel begins with the fp32 scales of its 32 columns, by which the finished sums are multiplied
//   tiles: bf16 as `tiles.cpp` lays it out, read here for the rows that are not a prompt's
//
// Few rows: bound by reading the panels. Many rows: bound by arithmetic, so a block of rows stays in the second-level
// cache while the panels pass. bf16 and int8 are widened in registers at any number of rows: that costs less than a
// second copy in memory.
#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {

int threads = 1;

namespace {

constexpr index_t BLOCK_BYTES = 1 << 20;  // rows of x that stay in the second-level cache while panels pass

struct Call {
    const float *x;
    const void *panels;
    const float *bias;
    float *y;
    index_t m, n, k;
};

void write_tail(const Call &c, index_t row, int rows, index_t column, const float *buffer) {
    for (int r = 0; r < rows; r++)
        std::memcpy(c.y + (row + r) * c.n + column, buffer + r * PANEL, (c.n - column) * sizeof(float));
}

void scale(const Call &c, Range block, index_t column, const float *scales) {
    index_t width = c.n - column < PANEL ? c.n - column : PANEL;
    for (index_t r = block.from; r < block.to; r++)
        for (index_t j = 0; j < width; j++) c.y[r * c.n + column + j] *= scales[j];
}

void add_bias(const Call &c, Range block, index_t column) {
    index_t width = c.n - column < PANEL ? c.n - column : PANEL;
    for (index_t r = block.from; r < block.to; r++)
        for (index_t j = 0; j < width; j++) c.y[r * c.n + column + j] += c.bias[column + j];
}

template <typename W>
void panel_product(const Call &c, Range block, index_t column, W w, Ahead ahead) {
    index_t rows = block.to - block.from, tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    bool whole = column + PANEL <= c.n;
    float buffer[MAX_ROWS * PANEL];
    for (index_t t = 0; t < tiles; t++) {
        index_t row = block.from + rows * t / tiles;
        int height = static_cast<int>(block.from + rows * (t + 1) / tiles - row);
        float *out = whole ? c.y + row * c.n + column : buffer;
        tile_of<MAX_ROWS, VECTORS>(height, c.x + row * c.k, c.k, w, c.k, out, whole ? c.n : PANEL, false, ahead);
        ahead.p = static_cast<const char *>(ahead.p) + ahead.step * c.k;
        if (!whole) write_tail(c, row, height, column, buffer);
    }
}

// The next panel is fetched evenly over this panel's tiles: the first tile would otherwise wait for memory alone.
Ahead next_panel(const void *panel, index_t row_bytes, index_t k, Range block) {
    index_t tiles = (block.to - block.from + MAX_ROWS - 1) / MAX_ROWS;
    return {static_cast<const char *>(panel) + row_bytes * k, row_bytes / tiles};
}

void one_panel(const Call &c, Range block, index_t p, int form) {
    index_t row_bytes = PANEL * (form == INT8 ? 1 : form == FP32 ? 4 : 2), depth = form == TILES ? (c.k + 31) / 32 * 32 : c.k;
    index_t header = form == INT8 ? PANEL * sizeof(float) : 0, column = p * PANEL;
    const char *scales = static_cast<const char *>(c.panels) + p * (header + depth * row_bytes), *panel = scales + header;
    Ahead ahead = next_panel(panel, row_bytes, depth, block);
    if (form == INT8)
        panel_product(c, block, column, Rows<std::int8_t>{reinterpret_cast<const std::int8_t *>(panel), PANEL}, ahead);
    else if (form == TILES)
        panel_product(c, block, column, TiledPanel{reinterpret_cast<const std::uint32_t *>(panel)}, ahead);
    else if (form == BF16)
        panel_product(c, block, column, PairedPanel{reinterpret_cast<const std::uint32_t *>(panel)}, ahead);
    else
        panel_product(c, block, column, Rows<float>{reinterpret_cast<const float *>(panel), PANEL}, ahead);
    if (form == INT8) scale(c, block, column, reinterpret_cast<const float *>(scales));
    if (c.bias) add_bias(c, block, column);
}

void team_panels(const Call &call, int form) {
    index_t fitting = BLOCK_BYTES / (4 * (call.k > 0 ? call.k : 1)) / MAX_ROWS * MAX_ROWS;
    index_t height = fitting > 4 * MAX_ROWS ? fitting : 4 * MAX_ROWS;
    index_t blocks = (call.m + height - 1) / height, count = (call.n + PANEL - 1) / PANEL;
    each(blocks * count, [&](index_t task) {
        index_t b = task / count;
        one_panel(call, {call.m * b / blocks, call.m * (b + 1) / blocks}, task % count, form);
    });
}

}  // namespace

void tiled_panel(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k, index_t p) {
    one_panel({x, panels, bias, y, m, n, k}, {0, m}, p, TILES);
}

void team_linear(int form, const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n,
                 index_t k, index_t prompt, std::uint16_t *space, const std::vector<AdaptedRows> *adapted) {
    index_t before = form == TILES && prompt < m ? prompt : m;
    if (before && before < m && few_for_tiles(m - before)) return team_both(x, panels, bias, y, m, n, k, before, space, adapted);
    if (before) team_panels({x, panels, bias, y, before, n, k}, form);
    if (before < m) team_tiles(x, panels, bias, y, m, n, k, before, space, adapted);
}

}  // namespace adapterd

ADAPTERD_EXPORT void adapterd_set_threads(int count) { adapterd::threads = count < 1 ? 1 : count; }

// x [m, k], panels as above (form: 0 fp32, 1 paired bf16, 2 int8, 3 tiles), bias [n] or null, y [m, n]; of tiles, rows from
// `prompt` on go through the matrix unit.
ADAPTERD_EXPORT void adapterd_linear(int form, const float *x, const void *panels, const float *bias, float *y,
                                     std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t prompt) {
    using namespace adapterd;
    static thread_local Scratch scratch;
    auto *space = form == TILES && prompt < m ? scratch.of<std::uint16_t>(tiles_space(k)) : nullptr;
    in_team(m * n * k > PARALLEL_WORK, [&] { team_linear(form, x, panels, bias, y, m, n, k, prompt, space); });
}
