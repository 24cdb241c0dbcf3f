// The kernels as a team runs them: every thread of a parallel region calls them with the same arguments, they share out
// their work among the team and end with a barrier. Outside a region one thread does it all.
#pragma once

#include <cstdint>
#include <memory>

#include "simd.h"
#include "tiles.h"

namespace adapterd {

inline bool all_within(const std::int64_t *values, index_t n, index_t limit) {
    for (index_t i = 0; i < n; i++)
        if (values[i] < 0 || values[i] >= limit) return false;
    return true;
}

// One head of one token, in place: x = x * cos + concat(-x[half:], x[:half]) * sin on its first 2 * half features.
void rotate(float *x, const float *cos, const float *sin, index_t half);

// How a packed linear's weights are stored.
enum Form { FP32, BF16, INT8, TILES };
// TILES: rows from `prompt` on go through the matrix unit, those before it as all rows of other forms do; `space` is the
// team's own, tiles_space(k) halves of a word on a 64-byte border, and `adapted` (or null) what adapters add to prompts' rows.
void team_linear(int form, const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n,
                 index_t k, index_t prompt, std::uint16_t *space, const std::vector<AdaptedRows> *adapted = nullptr);
index_t tiles_space(index_t k);
bool tiles_usable();
void team_tiles(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k,
                index_t prompt, std::uint16_t *space, const std::vector<AdaptedRows> *adapted);
// Few rows of a prompt behind `prompt` others: each panel serves those first, which leaves it in the cache for the tiles.
bool few_for_tiles(index_t rows);
void team_both(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k,
               index_t prompt, std::uint16_t *space, const std::vector<AdaptedRows> *adapted);
// Panel p of TILES for the rows of x, with vectors.
void tiled_panel(const float *x, const void *panels, const float *bias, float *y, index_t m, index_t n, index_t k, index_t p);

// y[index[i]] += B[slot[i]] (A[slot[i]] x[index[i]]) for rows whose slots are cut into groups beforehand; those from `prompt`
// on are left out.
struct LoraGroups;
std::shared_ptr<LoraGroups> lora_groups(const std::int64_t *index, const std::int64_t *slot, index_t n, index_t prompt);
index_t rows_of(const LoraGroups &groups);
// The rows from `prompt` on, as far as they go through bf16 pools A [slots, rank, in] and B [slots, rank, out] in tiles.
struct LoraPools {
    const std::uint16_t *a, *b;
    const std::int64_t *index, *slot;
    index_t n, in, out, rank;
};
std::vector<AdaptedRows> adapted_rows(const LoraPools &pools, index_t prompt);
// What a bottleneck does to low = A x between the products, and behind the second one: see bottleneck.cpp.
struct Bend {
    int activation;
    const float *low_bias;  // [slots, rank]
    const float *out_bias;  // [slots, out]
};
void bend(const Bend &b, float *low, index_t rows, index_t rank, index_t slot);
// `low` [n, rank] is the team's own space.
void team_lora(bool bf16, const float *x, float *y, const void *a, const void *b, const std::int64_t *index,
               const LoraGroups &groups, index_t in, index_t out, index_t rank, float *low, const Bend *between = nullptr);

void team_rms_norm(const float *x, const float *weight, float *y, index_t rows, index_t width, float eps);
void team_silu_mul(const float *gate, const float *up, float *y, index_t rows, index_t width);
void team_gelu_tanh_mul(const float *gate, const float *up, float *y, index_t rows, index_t width);
// y[index[i]] += (or *=) vectors[slot[i]], vectors [slots, width].
void team_add_rows(float *y, const float *vectors, const std::int64_t *index, const std::int64_t *slot, index_t n,
                   index_t width);
void team_mul_rows(float *y, const float *vectors, const std::int64_t *index, const std::int64_t *slot, index_t n,
                   index_t width);
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
