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
#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {

int threads = 1;

namespace {

constexpr index_t BLOCK_BYTES = 1 << 20;  // rows of x that stay in the second-level cache while panels pass

// A panel of a linear for some of its rows.
struct Task {
    const Linear *linear = nullptr;
    index_t block = 0, panel = 0;

    Range rows() const { return linear->tiling().block(block); }
    index_t column() const { return panel * PANEL; }
    index_t end() const { return std::min(column() + PANEL, linear->n); }
};

index_t row_bytes(const Linear &c) { return PANEL * (c.form == INT8 ? 1 : c.form == FP32 ? 4 : 2); }
index_t depth(const Linear &c) { return c.form == TILES ? (c.k + 31) / 32 * 32 : c.k; }
index_t header(const Linear &c) { return c.form == INT8 ? PANEL * static_cast<index_t>(sizeof(float)) : 0; }
index_t panels_of(const Linear &c) { return (c.n + PANEL - 1) / PANEL; }

const char *weights(const Task &t) {
    const Linear &c = *t.linear;
    return static_cast<const char *>(c.panels) + t.panel * (header(c) + depth(c) * row_bytes(c)) + header(c);
}

// What stands between a product and what it is to be, in some rows of a panel.
void finish(const Task &t, Range rows) {
    const Linear &c = *t.linear;
    Range columns{t.column(), t.end()};
    auto each_output = [&](auto f) {
        for (index_t r = rows.from; r < rows.to; r++)
            for (index_t j = columns.from; j < columns.to; j++) f(c.y[r * c.n + j], j);
    };
    const float *scales = reinterpret_cast<const float *>(weights(t)) - PANEL;
    if (c.form == INT8) each_output([&](float &y, index_t j) { y *= scales[j - columns.from]; });
    if (c.bias) each_output([&](float &y, index_t j) { y += c.bias[j]; });
    for (const Behind *b = c.behind; b != c.behind + c.behinds; b++)
        if (b->kind == Behind::LORA)
            lora_up(b->lora, rows, columns);
        else
            rows_change(b->rows, rows, columns);
}

template <typename W>
void panel_product(const Task &t, W w, Ahead ahead) {
    const Linear &c = *t.linear;
    bool whole = t.column() + PANEL <= c.n;
    float buffer[MAX_ROWS * PANEL];
    Range block = t.rows();
    for (index_t i = 0; i < Tiling::tiles(block); i++) {
        Range rows = Tiling::tile(block, i);
        int height = static_cast<int>(rows.to - rows.from);
        float *y = c.y + rows.from * c.n + t.column();
        float *out = whole ? y : buffer;
        tile_of<MAX_ROWS, VECTORS>(height, c.x + rows.from * c.k, c.k, w, c.k, out, whole ? c.n : PANEL, false, ahead);
        ahead.p = static_cast<const char *>(ahead.p) + ahead.step * c.k;
        for (int r = 0; r < height && !whole; r++)
            std::memcpy(y + r * c.n, buffer + r * PANEL, (c.n - t.column()) * sizeof(float));
        finish(t, rows);
    }
}

// f(LoRA, first, step) of every LoRA of a stage, for this member's runs; whether there is any.
template <typename F>
ADAPTERD_INLINE bool each_lora(const Stage &s, F f) {
    index_t before = 0, size = member.size;
    for (index_t i = 0; i < s.count; i++)
        for (const Behind *b = s.linears[i].behind; b != s.linears[i].behind + s.linears[i].behinds; b++)
            if (b->kind == Behind::LORA) {
                f(b->lora, ((member.place - before) % size + size) % size, size);
                before += b->lora.runs->count();
            }
    return before > 0;
}

// What the next panel needs is fetched evenly over this panel's tiles: the first tile would otherwise wait for memory alone.
Ahead ahead_of(const Task &t, const Task &next, Stream &stream) {
    if (!next.linear) return {weights(t), 0, ~index_t{0}, &stream};
    index_t tiles = Tiling::tiles(t.rows()), lines = 0, every = 1;
    for (const Behind *b = next.linear->behind; b != next.linear->behind + next.linear->behinds; b++)
        if (b->kind == Behind::LORA) lines += lora_wants(b->lora, next.column(), stream);
    while (2 * every * lines <= tiles * t.linear->k && every < t.linear->k) every *= 2;
    return {weights(next), row_bytes(*next.linear) / tiles, every - 1, &stream};
}

void one_panel(const Task &t, const Task &next) {
    Stream &stream = fresh_stream();
    const Linear &c = *t.linear;
    const char *panel = weights(t);
    Ahead ahead = ahead_of(t, next, stream);
    if (c.form == INT8)
        panel_product(t, Rows<std::int8_t>{reinterpret_cast<const std::int8_t *>(panel), PANEL}, ahead);
    else if (c.form == TILES)
        panel_product(t, TiledPanel{reinterpret_cast<const std::uint32_t *>(panel)}, ahead);
    else if (c.form == BF16)
        panel_product(t, PairedPanel{reinterpret_cast<const std::uint32_t *>(panel)}, ahead);
    else
        panel_product(t, Rows<float>{reinterpret_cast<const float *>(panel), PANEL}, ahead);
}

// Whether each panel serves the few rows of a prompt together with the others.
bool is_both(const Linear &c) {
    index_t before = c.vector_rows();
    return before && before < c.m && few_for_tiles(c.m - before);
}

index_t panels_of(const Stage &s) {
    index_t total = 0;
    for (index_t i = 0; i < s.count; i++) total += panels_of(s.linears[i]);
    return total;
}

// Of what each panel serves alone. Every block meets all panels of the stage before the next one does.
index_t tasks_of(const Stage &s) { return is_both(*s.linears) ? 0 : s.linears->blocks * panels_of(s); }

Task task_of(const Stage &s, index_t number) {
    index_t panels = panels_of(s), panel = number % panels;
    const Linear *c = s.linears;
    for (; panel >= panels_of(*c); c++) panel -= panels_of(*c);
    return {c, number / panels, panel};
}

Task following(const Stage &s, const Task &t) {
    if (t.panel + 1 < panels_of(*t.linear)) return {t.linear, t.block, t.panel + 1};
    bool last = t.linear + 1 == s.linears + s.count;
    return {last ? s.linears : t.linear + 1, t.block + last, 0};
}

// The first of a member's tasks; none where it has none.
Task first_of(const Stage *s) {
    Range mine = s ? member.share(tasks_of(*s)) : Range{0, 0};
    return mine.from < mine.to ? task_of(*s, mine.from) : Task{};
}

}  // namespace

Stream &fresh_stream() {
    static thread_local Stream stream;
    stream.clear();
    return stream;
}

index_t Tiling::tile_end(index_t row) const {
    Range own = block(((row + 1) * blocks - 1) / rows);
    index_t count = tiles(own), height = own.to - own.from;
    return tile(own, ((row - own.from + 1) * count - 1) / height).to;
}

std::shared_ptr<Runs> find_runs(const std::int64_t *index, const std::int64_t *slot, index_t n, Tiling tiling) {
    auto found = std::make_shared<Runs>();
    std::vector<Run> &runs = found->all;
    for (index_t i = 0; i < n; i++)
        if (index[i] < tiling.rows) runs.push_back({index[i], i, slot[i], 1});
    auto before = [](const Run &a, const Run &b) { return a.row < b.row; };
    if (!std::is_sorted(runs.begin(), runs.end(), before)) std::sort(runs.begin(), runs.end(), before);
    index_t kept = 0, end = 0;
    for (const Run &next : runs) {
        Run &last = runs[kept ? kept - 1 : 0];
        bool beside = last.row + last.count == next.row && last.position + last.count == next.position;
        if (kept && beside && next.row < end && last.slot == next.slot) {
            last.count++;
            continue;
        }
        if (next.row >= end) end = tiling.tile_end(next.row);
        runs[kept++] = next;
    }
    runs.resize(kept);
    found->beginning.resize(tiling.rows + 1);
    for (index_t row = tiling.rows, i = kept; row >= 0; row--) {
        while (i && runs[i - 1].row >= row) i--;
        found->beginning[row] = i;
    }
    return found;
}

index_t blocks_of(const Linear &c) {
    if (is_both(c)) return 1;
    index_t fitting = BLOCK_BYTES / (4 * std::max<index_t>(c.k, 1)) / MAX_ROWS * MAX_ROWS;
    index_t height = std::max<index_t>(fitting, 4 * MAX_ROWS);
    return (c.vector_rows() + height - 1) / height;
}

void tiled_panel(const Linear &c, index_t p) { one_panel({&c, 0, p}, {}); }

void team_linears(const Stage &s, const Stage *next) {
    if (each_lora(s, lora_down)) member.meet();
    Range mine = member.share(tasks_of(s));
    Task task = first_of(&s);
    for (index_t left = mine.to - mine.from; left > 0; left--) {
        Task then = left > 1 ? following(s, task) : first_of(next);
        one_panel(task, then);
        task = then;
    }
    for (const Linear *c = s.linears; c != s.linears + s.count && c->vector_rows() < c->m; c++)
        is_both(*c) ? both_panels(*c) : tile_rows(*c);
    member.meet();
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
    Linear linear{form, x, panels, bias, y, m, n, k, prompt, space, nullptr, nullptr, 0, 0};
    linear.blocks = blocks_of(linear);
    in_team(m * n * k > PARALLEL_WORK, [&] { team_linears({&linear, 1}, nullptr); });
}
