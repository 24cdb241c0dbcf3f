// y[index[i]] += B[slot[i]] (A[slot[i]] x[index[i]]): every row through its own low-rank adapter, in place.
// Owns the two products and their blocking. Touches only the named rows, and only the slots they name.
//
//   A [slots, r, in], B [slots, r, out] (B is stored transposed, so both products read memory front to back)
//
// Neighbouring rows of one slot are taken together, so that a prefill reads an adapter once per few rows; a decode step over
// distinct adapters is bound by reading A and B. Rows of prompts through bf16 pools are left to lora_tiles.cpp where the
// processor has tiles.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

constexpr int GROUP = 4;                   // rows of one slot whose A x is computed together
constexpr int WIDE = LANES == 16 ? 4 : 2;  // ranks computed together with GROUP rows
constexpr index_t STRIP = 8 * PANEL;       // output columns of one task
constexpr index_t LEAD = 256;              // cache lines that are fetched before they are needed

template <typename T>
struct Call {
    const LoraCall &c;
    const T *a = static_cast<const T *>(c.a), *b = static_cast<const T *>(c.b);
    const std::vector<Run> &runs = c.runs->all;

    const float *x_of(const Run &run) const { return c.x + run.row * c.in; }
    float *y_of(const Run &run) const { return c.y + run.row * c.out; }
    float *low_of(const Run &run) const { return c.low + run.position * c.rank; }
    const T *a_of(const Run &run) const { return a + run.slot * c.rank * c.in; }
    const T *b_of(const Run &run) const { return b + run.slot * c.rank * c.out; }
    index_t count() const { return c.runs->count(); }
};

// low[r][j] = sum over i of a[j][i] * x[r][i]: lanes along i, one accumulator each, then a fixed tree and the tail.
template <int R, int J, typename T>
ADAPTERD_INLINE void dots(const float *x, const T *a, index_t in, float *low, index_t ldl, Stream &stream) {
    vf acc[R][J] = {};
    index_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        vf row[R];
        for (int r = 0; r < R; r++) row[r] = load(x + r * in + i);
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
            for (index_t t = i; t < in; t++) total = fma(x[r * in + t], scalar(a + j * in + t), total);
            low[r * ldl + j] = total;
        }
}

template <int R, int J, typename T>
void down_rows(const float *x, const T *a, index_t in, index_t rank, float *low, Stream &stream) {
    index_t j = 0;
    for (; j + J <= rank; j += J) dots<R, J>(x, a + j * in, in, low + j, rank, stream);
    for (; j < rank; j++) dots<R, 1>(x, a + j * in, in, low + j, rank, stream);
}

template <typename T>
void down(const Call<T> &call, const Run &run, Stream &stream) {
    const LoraCall &c = call.c;
    const T *a = call.a_of(run);
    for (int r = 0; r < run.count; r += GROUP) {
        const float *x = call.x_of(run) + r * c.in;
        float *low = call.low_of(run) + r * c.rank;
        switch (run.count - r) {
            case 1: down_rows<1, 2 * WIDE>(x, a, c.in, c.rank, low, stream); break;
            case 2: down_rows<2, WIDE>(x, a, c.in, c.rank, low, stream); break;
            case 3: down_rows<3, WIDE>(x, a, c.in, c.rank, low, stream); break;
            default: down_rows<GROUP, WIDE>(x, a, c.in, c.rank, low, stream);
        }
    }
    if (c.between) bend(*c.between, call.low_of(run), run.count, c.rank, run.slot);
}

// Columns [o, o + V * LANES): B's sums go on where y's ended; with something between, they are sums of their own that begin
// with a bias.
template <int V, typename T>
ADAPTERD_INLINE void up_strip(const Call<T> &call, const Run &run, index_t o) {
    const LoraCall &c = call.c;
    const float *low = call.low_of(run);
    Rows<T> b{call.b_of(run) + o, c.out};
    float *y = call.y_of(run) + o;
    if (!c.between) return tile_of<MAX_ROWS, V>(run.count, low, c.rank, b, c.rank, y, c.out, true, Nothing{});
    float own[MAX_ROWS * V * LANES];
    for (int r = 0; r < run.count; r++)
        std::memcpy(own + r * V * LANES, c.between->out_bias + run.slot * c.out + o, V * LANES * sizeof(float));
    tile_of<MAX_ROWS, V>(run.count, low, c.rank, b, c.rank, own, V * LANES, true, Nothing{});
    for (int r = 0; r < run.count; r++, y += c.out)
        for (int v = 0; v < V * LANES; v += LANES) store(y + v, load(y + v) + load(own + r * V * LANES + v));
}

template <typename T>
void up(const Call<T> &call, const Run &run, Range columns) {
    const LoraCall &c = call.c;
    index_t o = columns.from;
    for (; o + PANEL <= columns.to; o += PANEL) up_strip<VECTORS>(call, run, o);
    for (; o + LANES <= columns.to; o += LANES) up_strip<1>(call, run, o);
    const T *b = call.b_of(run);
    for (; o < columns.to; o++)
        for (int r = 0; r < run.count; r++) {
            const float *low = call.low_of(run) + r * c.rank;
            float &y = call.y_of(run)[r * c.out + o], total = c.between ? c.between->out_bias[run.slot * c.out + o] : y;
            for (index_t j = 0; j < c.rank; j++) total = fma(low[j], scalar(b + j * c.out + o), total);
            y = c.between ? y + total : total;
        }
}

// A x of every `step`-th run. The As of distinct adapters come from memory one after another.
template <typename T>
void downs(const Call<T> &call, index_t first, index_t step) {
    Stream &stream = fresh_stream();
    index_t last = -1;
    for (index_t i = first; i < call.count(); last = call.runs[i].slot, i += step)
        if (call.runs[i].slot != last) stream.add(call.a_of(call.runs[i]), Stream::lines(call.c.rank * call.c.in * sizeof(T)));
    stream.fetch(LEAD);
    for (index_t i = first; i < call.count(); i += step) down(call, call.runs[i], stream);
}

// This member's runs one after another, each with both products while its rows are in the cache.
template <typename T>
void whole(const Call<T> &call) {
    Stream &stream = fresh_stream();
    index_t a = Stream::lines(call.c.rank * call.c.in * sizeof(T)), b = Stream::lines(call.c.rank * call.c.out * sizeof(T));
    index_t last = -1;
    for (index_t i = member.place; i < call.count(); last = call.runs[i].slot, i += member.size)
        if (call.runs[i].slot != last) stream.add(call.a_of(call.runs[i]), a), stream.add(call.b_of(call.runs[i]), b);
    stream.fetch(LEAD);
    for (index_t i = member.place; i < call.count(); i += member.size) {
        down(call, call.runs[i], stream);
        stream.fetch(b);
        up(call, call.runs[i], {0, call.c.out});
    }
}

template <typename T>
void team(const Call<T> &call) {
    index_t count = call.count(), out = call.c.out, strips = (out + STRIP - 1) / STRIP;
    if (count >= 2 * member.size) {  // whole runs per thread, so that no thread waits for the others half-way
        whole(call);
        return member.meet();
    }
    downs(call, member.place, member.size);
    member.meet();
    each(count * strips, [&](index_t t) {
        index_t from = t % strips * STRIP;
        up(call, call.runs[t / strips], {from, std::min(from + STRIP, out)});
    });
}

// f with the call as one over pools of their own type.
template <typename F>
ADAPTERD_INLINE auto typed(const LoraCall &c, F f) {
    return c.bf16 ? f(Call<std::uint16_t>{c}) : f(Call<float>{c});
}

}  // namespace

void lora_down(const LoraCall &c, index_t first, index_t step) {
    typed(c, [=](const auto &call) { downs(call, first, step); });
}

void lora_up(const LoraCall &c, Range rows, Range columns) {
    typed(c, [=](const auto &call) { call.c.runs->each(rows, [&](const Run &run) { up(call, run, columns); }); });
}

index_t lora_wants(const LoraCall &c, index_t column, Stream &stream) {
    return typed(c, [&](const auto &call) {
        constexpr index_t bytes = sizeof *call.b, wide = Stream::lines(PANEL * bytes);
        index_t last = -1, lines = 0;
        for (const Run &run : call.runs) {
            if (run.slot == last) continue;
            last = run.slot, lines += c.rank * wide;
            const char *b = reinterpret_cast<const char *>(call.b_of(run) + column);
            for (index_t line = 0; line < wide; line++) stream.add(b + line * Stream::LINE, c.rank, c.out * bytes);
        }
        return lines;
    });
}

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

void team_lora(const LoraCall &c) {
    typed(c, [](const auto &call) { team(call); });
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
    std::shared_ptr<Runs> runs = find_runs(index, slot, n, {prompt < tokens ? prompt : tokens, 1});
    LoraPools pools{static_cast<const std::uint16_t *>(a), static_cast<const std::uint16_t *>(b), index, slot, n, in, out, rank};
    std::vector<AdaptedRows> prompts = prompt < tokens ? adapted_rows(pools, prompt) : std::vector<AdaptedRows>{};
    in_team(n * rank * (in + out) > PARALLEL_WORK, [&] {
        if (runs->count()) team_lora({bf16 != 0, x, y, a, b, runs.get(), in, out, rank, low, nullptr});
        if (!prompts.empty()) team_lora_tiles(prompts, x, y, in, out);
    });
    return 0;
}
