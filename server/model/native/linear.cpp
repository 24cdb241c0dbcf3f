// y = x W^T + b over a weight packed in panels of 32 columns, stored as fp32 or bf16, multiplied in fp32.
// Owns the blocking and the packed layout's arithmetic; the layout itself is made in Python (`linear.py`).
//
//   weight [N, K]  ->  panels [ceil(N / 32)][K][32], zero padded; a panel is read front to back, once per block of rows
//
// Few rows: bound by reading the panels, so they are streamed and prefetched. Many rows: bound by arithmetic, so a
// block of rows stays in the second-level cache and a bf16 panel is widened once per block.
#include "simd.h"

namespace adapterd {

int threads = 1;

namespace {

constexpr index_t BLOCK_BYTES = 1 << 20;  // rows of x that stay in the second-level cache while panels pass
constexpr index_t WIDEN_TILES = 3;        // from this many row tiles on, widening a bf16 panel once pays

struct Call {
    const float *x;
    const void *panels;
    const float *bias;
    float *y;
    index_t m, n, k;
};

struct Block {
    index_t from, to;  // rows
};

void write_tail(const Call &c, index_t row, int rows, index_t column, const float *buffer) {
    for (int r = 0; r < rows; r++)
        std::memcpy(c.y + (row + r) * c.n + column, buffer + r * PANEL, (c.n - column) * sizeof(float));
}

void add_bias(const Call &c, Block block, index_t column) {
    index_t width = c.n - column < PANEL ? c.n - column : PANEL;
    for (index_t r = block.from; r < block.to; r++)
        for (index_t j = 0; j < width; j++) c.y[r * c.n + column + j] += c.bias[column + j];
}

template <typename W>
void panel_product(const Call &c, Block block, index_t column, W w, Ahead ahead) {
    index_t rows = block.to - block.from, tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    bool whole = column + PANEL <= c.n;
    float buffer[MAX_ROWS * PANEL];
    for (index_t t = 0; t < tiles; t++) {
        index_t row = block.from + rows * t / tiles;
        int height = static_cast<int>(block.from + rows * (t + 1) / tiles - row);
        float *out = whole ? c.y + row * c.n + column : buffer;
        tile_of<MAX_ROWS, VECTORS>(height, c.x + row * c.k, c.k, w, c.k, out, whole ? c.n : PANEL, false, ahead);
        ahead.p += ahead.step * c.k;
        if (!whole) write_tail(c, row, height, column, buffer);
    }
    if (c.bias) add_bias(c, block, column);
}

// The next panel is fetched evenly over this panel's tiles; a lone tile is a stream already, so it only looks ahead.
Ahead next_panel(const char *panel, index_t row_bytes, index_t k, index_t rows) {
    index_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;

    return {panel + row_bytes * k, row_bytes / tiles};
}

void panel_f32(const Call &c, Block block, index_t p) {
    const float *panel = static_cast<const float *>(c.panels) + p * c.k * PANEL;
    Ahead ahead = next_panel(reinterpret_cast<const char *>(panel), PANEL * 4, c.k, block.to - block.from);
    panel_product(c, block, p * PANEL, Rows<float>{panel, PANEL}, ahead);
}

void panel_bf16(const Call &c, Block block, index_t p) {
    static thread_local Scratch scratch;
    PairedPanel panel{static_cast<const std::uint32_t *>(c.panels) + p * c.k * (PANEL / 2)};
    index_t rows = block.to - block.from;
    Ahead ahead = next_panel(reinterpret_cast<const char *>(panel.p), PANEL * 2, c.k, rows);
    if (rows < WIDEN_TILES * MAX_ROWS) return panel_product(c, block, p * PANEL, panel, ahead);
    float *wide = scratch.floats(c.k * PANEL);
    for (index_t k = 0; k < c.k; k++) {
        vf row[VECTORS];
        panel.row(k, row);
        for (int v = 0; v < VECTORS; v++) store(wide + k * PANEL + v * LANES, row[v]);
    }
    panel_product(c, block, p * PANEL, Rows<float>{wide, PANEL}, ahead);
}

}  // namespace
}  // namespace adapterd

ADAPTERD_EXPORT void adapterd_set_threads(int count) { adapterd::threads = count < 1 ? 1 : count; }

// x [m, k], panels as above (bf16 != 0: paired bf16), bias [n] or null, y [m, n].
ADAPTERD_EXPORT void adapterd_linear(int bf16, const float *x, const void *panels, const float *bias, float *y,
                                     std::int64_t m, std::int64_t n, std::int64_t k) {
    using namespace adapterd;
    Call call{x, panels, bias, y, m, n, k};
    index_t fitting = BLOCK_BYTES / (4 * (k > 0 ? k : 1)) / MAX_ROWS * MAX_ROWS;
    index_t height = fitting > 4 * MAX_ROWS ? fitting : 4 * MAX_ROWS;
    index_t blocks = (m + height - 1) / height, count = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads) if (m * n * k > PARALLEL_WORK)
    for (index_t task = 0; task < blocks * count; task++) {
        index_t b = task / count;
        Block block{m * b / blocks, m * (b + 1) / blocks};
        bf16 ? panel_bf16(call, block, task % count) : panel_f32(call, block, task % count);
    }
}
