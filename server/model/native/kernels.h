// The kernels as a team runs them: every thread of a parallel region calls them with the same arguments, they share out
// their work among the team and end with a barrier. Outside a region one thread does it all.
#pragma once

#include <cstdint>
#include <memory>

#include "simd.h"
#include "team.h"
#include "tiles.h"

namespace adapterd {

inline bool all_within(const std::int64_t *values, index_t n, index_t limit) {
    for (index_t i = 0; i < n; i++)
        if (values[i] < 0 || values[i] >= limit) return false;
    return true;
}

// One head of one token, in place: x = x * cos + concat(-x[half:], x[:half]) * sin on its first 2 * half features.
void rotate(float *x, const float *cos, const float *sin, index_t half);

// How rows are cut into blocks, and those into tiles of nearly equal height.
struct Tiling {
    index_t rows, blocks;

    Range block(index_t b) const { return {rows * b / blocks, rows * (b + 1) / blocks}; }
    static index_t tiles(Range block) { return (block.to - block.from + MAX_ROWS - 1) / MAX_ROWS; }
    static Range tile(Range block, index_t t) {
        index_t rows = block.to - block.from, count = tiles(block);
        return {block.from + rows * t / count, block.from + rows * (t + 1) / count};
    }
    index_t tile_end(index_t row) const;  // of the tile that holds the row
};

// Neighbouring rows of a step that go through one slot, all in one tile; `position` is that of the first in the index they
// came from.
struct Run {
    index_t row, position, slot;
    int count;
};

// The rows that adapters of one pool act on, those behind the tiling's left out.
struct Runs {
    std::vector<Run> all;            // by rows
    std::vector<index_t> beginning;  // of each row, and the one behind the last: the first run there or behind it

    index_t count() const { return static_cast<index_t>(all.size()); }
    // f(run) of those in some rows, whole tiles.
    template <typename F>
    void each(Range rows, F f) const {
        for (index_t i = beginning[rows.from]; i < beginning[rows.to]; i++) f(all[i]);
    }
};
std::shared_ptr<Runs> find_runs(const std::int64_t *index, const std::int64_t *slot, index_t n, Tiling tiling);

// What a bottleneck does to low = A x between the products, and behind the second one: see bottleneck.cpp.
struct Bend {
    int activation;
    const float *low_bias;  // [slots, rank]
    const float *out_bias;  // [slots, out]
};
void bend(const Bend &b, float *low, index_t rows, index_t rank, index_t slot);
// y[row] += B[slot] (A[slot] x[row]) of each row of the runs, A [slots, rank, in], B [slots, rank, out] in bf16 or fp32. The
// sums of B go on where y's own ended: they are the same whether or not anything else was done meanwhile.
struct LoraCall {
    bool bf16;
    const float *x;
    float *y;
    const void *a, *b;
    const Runs *runs;
    index_t in, out, rank;
    float *low;           // [n, rank] A x, the team's own space
    const Bend *between;  // null: nothing happens to it
};
void team_lora(const LoraCall &c);
// Its halves: A x of every `step`-th run from `first` on, and what B makes of it in some rows, whole tiles, and columns of y.
void lora_down(const LoraCall &c, index_t first, index_t step);
void lora_up(const LoraCall &c, Range rows, Range columns);
// Puts into the stream what `lora_up` reads of B for the panel from `column` on; returns the number of cache lines.
index_t lora_wants(const LoraCall &c, index_t column, Stream &stream);

// The rows from `prompt` on, as far as they go through bf16 pools, for the matrix unit.
struct LoraPools {
    const std::uint16_t *a, *b;
    const std::int64_t *index, *slot;
    index_t n, in, out, rank;
};
std::vector<AdaptedRows> adapted_rows(const LoraPools &pools, index_t prompt);

// y[row] += (or *=) vectors[slot], vectors [slots, width], of each row of the runs.
struct RowsCall {
    float *y;
    const float *vectors;
    const Runs *runs;
    index_t width;
    bool multiply;
};
void team_rows(const RowsCall &c);
void rows_change(const RowsCall &c, Range rows, Range columns);

// What an adapter does to a linear's output, piece by piece as it gets ready.
struct Behind {
    enum { LORA, ROWS } kind;
    LoraCall lora;
    RowsCall rows;
};

// How a packed linear's weights are stored.
enum Form { FP32, BF16, INT8, TILES };

// y = x W^T + b, and what happens to y right behind it.
struct Linear {
    int form;
    const float *x;
    const void *panels;
    const float *bias;
    float *y;
    index_t m, n, k;
    // Of TILES: rows from here on go through the matrix unit, those before it as all rows of other forms do; `space` is the
    // team's own, tiles_space(k) halves of a word on a 64-byte border, and `adapted` (or null) what adapters add to prompts'
    // rows.
    index_t prompt;
    std::uint16_t *space;
    const std::vector<AdaptedRows> *adapted;
    const Behind *behind;  // of the rows before `prompt`
    index_t behinds;
    index_t blocks;  // that its panels pass one after another

    Tiling tiling() const { return {vector_rows(), blocks}; }
    index_t vector_rows() const { return form == TILES && prompt < m ? prompt : m; }
};
// Linears of one x and one form, none of which writes what another one reads.
struct Stage {
    const Linear *linears;
    index_t count;
};
void team_linears(const Stage &s, const Stage *next);  // `next`: the stage that follows sooner or later, or null
index_t blocks_of(const Linear &c);
index_t tiles_space(index_t k);
bool tiles_usable();
// This member's share of the prompt's rows.
void tile_rows(const Linear &c);
// Few rows of a prompt behind others: each panel serves those first, which leaves it in the cache for the tiles.
bool few_for_tiles(index_t rows);
void both_panels(const Linear &c);  // this member's share
// Panel p of TILES for the rows before the prompt, with vectors.
void tiled_panel(const Linear &c, index_t p);

void team_rms_norm(const float *x, const float *weight, float *y, index_t rows, index_t width, float eps);
void team_silu_mul(const float *gate, const float *up, float *y, index_t rows, index_t width);
void team_gelu_tanh_mul(const float *gate, const float *up, float *y, index_t rows, index_t width);
void team_add(const float *x, float *y, index_t rows, index_t width);  // y += x

// The rotary embedding and the scatter into the cache of one layer's q, k, v.
struct NewKeys {
    float *q, *k;
    const float *v, *cos, *sin;  // cos null: nothing turns
    index_t turned;
    float *k_cache, *v_cache;
    const std::int64_t *write;
    index_t block_size, tokens, heads, kv_heads, dim;
};
void team_write(const NewKeys &c);

struct AttentionCall {
    const float *q;
    index_t q_token, q_head;  // strides of q in floats
    const float *k, *v;
    index_t blocks, block_size, kv_heads, dim;
    const std::int32_t *tables;
    index_t table_width;
    const std::int32_t *cu, *ctx;
    index_t rows, tokens, heads;
    float scale;
    index_t window;
    float softcap;
    float *out;

    index_t group() const { return heads / kv_heads; }
    index_t padded() const { return (dim + PANEL - 1) / PANEL * PANEL; }
};

// What is decided about a step's attention before any thread starts; the same for every layer of one window.
struct AttentionPlan;
int attention_rule(const AttentionCall &c);  // 0, or the number of the broken rule
std::shared_ptr<AttentionPlan> attention_plan(const AttentionCall &c);
void team_attention(const AttentionCall &c, const AttentionPlan &plan);

}  // namespace adapterd
