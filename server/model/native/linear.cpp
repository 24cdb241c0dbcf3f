// y = x W^T + b over a weight packed in panels of 32 columns, stored as fp32 or bf16, multiplied in fp32.
// Owns the blocking and the packed layout's arithmetic; the layout itself is made in Python (`library.py`).
//
//   weight [N, K]  ->  panels [ceil(N / 32)][K][32], zero padded; a panel is read front to back, once per block of rows
//
// Few rows: bound by reading the panels. Many rows: bound by arithmetic, so a block of rows stays in the second-level
// cache while the panels pass. bf16 is widened in registers at any number of rows: two integer operations per 32
// weights cost less than a second copy in memory.
#include "simd.h"

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
        ahead.p = static_cast<const char *>(ahead.p) + ahead.step * c.k;
        if (!whole) write_tail(c, row, height, column, buffer);
    }
    if (c.bias) add_bias(c, block, column);
}

// The next panel is fetched evenly over this panel's tiles: the first tile would otherwise wait for memory alone.
Ahead next_panel(const void *panel, index_t row_bytes, index_t k, Block block) {
    index_t tiles = (block.to - block.from + MAX_ROWS - 1) / MAX_ROWS;
    return {static_cast<const char *>(panel) + row_bytes * k, row_bytes / tiles};
}

void one_panel(const Call &c, Block block, index_t p, bool bf16) {
    index_t row_bytes = PANEL * (bf16 ? 2 : 4);
    const void *panel = static_cast<const char *>(c.panels) + p * c.k * row_bytes;
    Ahead ahead = next_panel(panel, row_bytes, c.k, block);
    if (bf16)
        panel_product(c, block, p * PANEL, PairedPanel{static_cast<const std::uint32_t *>(panel)}, ahead);
    else
        panel_product(c, block, p * PANEL, Rows<float>{static_cast<const float *>(panel), PANEL}, ahead);
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
        one_panel(call, block, task % count, bf16 != 0);
    }
}
