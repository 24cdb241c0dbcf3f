// y[index[i]] += B[slot[i]] (A[slot[i]] x[index[i]]): every row through its own low-rank adapter, in place.
// Owns the two products and their blocking. Touches only the named rows, and only the slots they name.
//
//   A [slots, r, in], B [slots, r, out] (B is stored transposed, so both products read memory front to back)
//
// Rows of one slot that stand next to each other are taken four at a time, so that a prefill reads an adapter once per
// four rows; a decode step over distinct adapters is bound by reading A and B. Rows of prompts through bf16 pools are left to
// lora_tiles.cpp where the processor has tiles.
#include <vector>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

constexpr int GROUP = 4;                   // rows of one slot taken together
constexpr int WIDE = LANES == 16 ? 4 : 2;  // ranks, or vectors of columns, computed together with GROUP rows
constexpr index_t STRIP = 8 * PANEL;       // output columns of one task
constexpr index_t LEAD = 256;              // cache lines that are fetched before they are needed

}  // namespace

struct Group {  // `count` rows of one slot, starting at row `from` of index and slot
    index_t from, slot;
    int count;
};

struct LoraGroups {
    std::vector<Group> groups;
    index_t rows = 0;
};

namespace {

template <typename T>
struct Call {
    const float *x;
    float *y;
    const T *a, *b;
    const std::int64_t *index;
    index_t in, out, rank;
    float *low;  // [n, rank] A x
    const Bend *between;  // null: nothing happens to it
    Stream *stream;       // what this thread reads of the pools
};

// Positions of `index` below `prompt`, by slots and neighbours.
LoraGroups groups_of(const std::int64_t *index, const std::int64_t *slot, index_t n, index_t prompt) {
    LoraGroups found;
    std::vector<Group> &groups = found.groups;
    for (index_t i = 0; i < n; i++) {
        if (index[i] >= prompt) continue;
        found.rows++;
        if (!groups.empty() && groups.back().slot == slot[i] && groups.back().count < GROUP &&
            groups.back().from + groups.back().count == i)
            groups.back().count++;
        else
            groups.push_back({i, slot[i], 1});
    }
    return found;
}

// low[r][j] = sum over i of a[j][i] * x[r][i]: lanes along i, one accumulator each, then a fixed tree and the tail.
template <int R, int J, typename T>
ADAPTERD_INLINE void dots(const float *const *x, const T *a, index_t in, float *low, index_t ldl, Stream &stream) {
    vf acc[R][J] = {};
    index_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        vf row[R];
        for (int r = 0; r < R; r++) row[r] = load(x[r] + i);
        stream.fetch(Stream::lines(J * LANES * sizeof(T)));
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
            vf weight = load(a + j * in + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) acc[r][j] += row[r] * weight;
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) {
            float total = sum(acc[r][j]);
            for (index_t t = i; t < in; t++) total = fma(x[r][t], scalar(a + j * in + t), total);
            low[r * ldl + j] = total;
        }
}

template <int R, int J, typename T>
void down(const Call<T> &c, Group g) {
    const float *x[R];
    for (int r = 0; r < R; r++) x[r] = c.x + c.index[g.from + r] * c.in;
    const T *a = c.a + g.slot * c.rank * c.in;
    float *low = c.low + g.from * c.rank;
    index_t j = 0;
    for (; j + J <= c.rank; j += J) dots<R, J>(x, a + j * c.in, c.in, low + j, c.rank, *c.stream);
    for (; j < c.rank; j++) dots<R, 1>(x, a + j * c.in, c.in, low + j, c.rank, *c.stream);
}

// Adds B's product to columns [o, to) in tiles of V vectors; returns the first column that is left over.
template <int R, int V, typename T>
ADAPTERD_INLINE index_t up_tiles(const Call<T> &c, Group g, const float *low, const T *b, index_t o, index_t to) {
    constexpr index_t width = V * LANES;
    float delta[R * width];
    for (; o + width <= to; o += width) {
        if (c.between)
            for (int r = 0; r < R; r++)
                std::memcpy(delta + r * width, c.between->out_bias + g.slot * c.out + o, width * sizeof(float));
        tile<R, V>(low, c.rank, Rows<T>{b + o, c.out}, c.rank, delta, width, c.between != nullptr,
                   Streamed{c.stream, Stream::lines(width * sizeof(T))});
        for (int r = 0; r < R; r++) {
            float *y = c.y + c.index[g.from + r] * c.out + o;
            for (int v = 0; v < width; v += LANES) store(y + v, load(y + v) + load(delta + r * width + v));
        }
    }
    return o;
}

template <int R, int V, typename T>
void up(const Call<T> &c, Group g, index_t from, index_t to) {
    const T *b = c.b + g.slot * c.rank * c.out;
    const float *low = c.low + g.from * c.rank;
    index_t o = up_tiles<R, V>(c, g, low, b, from, to);
    o = up_tiles<R, 1>(c, g, low, b, o, to);
    for (; o < to; o++)
        for (int r = 0; r < R; r++) {
            float total = c.between ? c.between->out_bias[g.slot * c.out + o] : 0;
            for (index_t j = 0; j < c.rank; j++) total = fma(low[r * c.rank + j], scalar(b + j * c.out + o), total);
            c.y[c.index[g.from + r] * c.out + o] += total;
        }
}

template <typename T>
void down(const Call<T> &c, Group g) {
    switch (g.count) {
        case 1: return down<1, 2 * WIDE>(c, g);
        case 2: return down<2, WIDE>(c, g);
        case 3: return down<3, WIDE>(c, g);
        default: return down<GROUP, WIDE>(c, g);
    }
}

template <typename T>
void up(const Call<T> &c, Group g, index_t from, index_t to) {
    switch (g.count) {
        case 1: return up<1, 2 * WIDE>(c, g, from, to);
        case 2: return up<2, WIDE>(c, g, from, to);
        case 3: return up<3, WIDE>(c, g, from, to);
        default: return up<GROUP, WIDE>(c, g, from, to);
    }
}

template <typename T>
void first(const Call<T> &c, Group g) {
    down(c, g);
    if (c.between) bend(*c.between, c.low + g.from * c.rank, g.count, c.rank, g.slot);
}

// Groups that each have an adapter of their own: their A and B come from memory one after another.
template <typename T>
void run_decodes(const Call<T> &c, const std::vector<Group> &groups, Range mine) {
    for (index_t g = mine.from; g < mine.to; g++) {
        c.stream->add(c.a + groups[g].slot * c.rank * c.in, c.rank * c.in * sizeof(T));
        c.stream->add(c.b + groups[g].slot * c.rank * c.out, c.rank * c.out * sizeof(T));
    }
    c.stream->fetch(LEAD);
    for (index_t g = mine.from; g < mine.to; g++) {
        first(c, groups[g]);
        for (index_t o = 0; o < c.out; o += STRIP) up(c, groups[g], o, o + STRIP < c.out ? o + STRIP : c.out);
    }
}

template <typename T>
void run(Call<T> c, const LoraGroups &found) {
    const std::vector<Group> &groups = found.groups;
    static thread_local Stream stream;
    stream.clear();
    c.stream = &stream;
    index_t count = static_cast<index_t>(groups.size()), strips = (c.out + STRIP - 1) / STRIP;
    if (count >= 2 * threads) {  // whole groups per thread, so that no thread waits for the others half-way
        if (found.rows < 2 * count) {
            run_decodes(c, groups, member.share(count));
            return member.meet();
        }
        return each_taken(count, [&](index_t g, index_t) {
            first(c, groups[g]);
            for (index_t from = 0; from < c.out; from += STRIP)
                up(c, groups[g], from, from + STRIP < c.out ? from + STRIP : c.out);
        });
    }
    each(count, [&](index_t g) { first(c, groups[g]); });
    each(count * strips, [&](index_t t) {
        index_t from = t % strips * STRIP, to = from + STRIP < c.out ? from + STRIP : c.out;
        up(c, groups[t / strips], from, to);
    });
}

template <typename T>
Call<T> pools(const float *x, float *y, const void *a, const void *b, const std::int64_t *index, index_t in,
              index_t out, index_t rank, float *low, const Bend *between) {
    return {x, y, static_cast<const T *>(a), static_cast<const T *>(b), index, in, out, rank, low, between, nullptr};
}

}  // namespace

std::shared_ptr<LoraGroups> lora_groups(const std::int64_t *index, const std::int64_t *slot, index_t n, index_t prompt) {
    return std::make_shared<LoraGroups>(groups_of(index, slot, n, prompt));
}

index_t rows_of(const LoraGroups &groups) { return groups.rows; }

std::vector<AdaptedRows> adapted_rows(const LoraPools &pools, index_t prompt) {
    std::vector<AdaptedRows> runs;
    for (index_t i = 0; i < pools.n; i++) {
        index_t row = pools.index[i];
        const std::uint16_t *a = pools.a + pools.slot[i] * pools.rank * pools.in;
        if (row < prompt) continue;
        if (!runs.empty() && runs.back().to == row && runs.back().a == a)
            runs.back().to++;
        else
            runs.push_back({row, row + 1, a, pools.b + pools.slot[i] * pools.rank * pools.out, pools.rank});
    }
    return runs;
}

void team_lora(bool bf16, const float *x, float *y, const void *a, const void *b, const std::int64_t *index,
               const LoraGroups &groups, index_t in, index_t out, index_t rank, float *low, const Bend *between) {
    if (bf16)
        run(pools<std::uint16_t>(x, y, a, b, index, in, out, rank, low, between), groups);
    else
        run(pools<float>(x, y, a, b, index, in, out, rank, low, between), groups);
}

}  // namespace adapterd

// x [tokens, in], y [tokens, out], pools as above (bf16 != 0: bf16 bits), index and slot [n]; index has no duplicates. Rows from
// `prompt` on go through the matrix unit, if there is one and the pools are bf16.
// Returns 0, or 1 when an index and 2 when a slot is out of range (y is untouched then).
ADAPTERD_EXPORT int adapterd_lora(int bf16, const float *x, float *y, const void *a, const void *b,
                                  const std::int64_t *index, const std::int64_t *slot, std::int64_t n,
                                  std::int64_t tokens, std::int64_t slots, std::int64_t in, std::int64_t out,
                                  std::int64_t rank, std::int64_t prompt) {
    using namespace adapterd;
    if (!all_within(index, n, tokens)) return 1;
    if (!all_within(slot, n, slots)) return 2;
    static thread_local Scratch scratch;
    float *low = scratch.floats(n * rank + 1);
    if (!bf16 || !tiles_usable()) prompt = tokens;
    LoraGroups groups = groups_of(index, slot, n, prompt);
    LoraPools pools{static_cast<const std::uint16_t *>(a), static_cast<const std::uint16_t *>(b), index, slot, n, in, out, rank};
    std::vector<AdaptedRows> prompts = prompt < tokens ? adapted_rows(pools, prompt) : std::vector<AdaptedRows>{};
    in_team(n * rank * (in + out) > PARALLEL_WORK, [&] {
        if (groups.rows) team_lora(bf16 != 0, x, y, a, b, index, groups, in, out, rank, low);
        if (!prompts.empty()) team_lora_tiles(prompts, x, y, in, out);
    });
    return 0;
}
