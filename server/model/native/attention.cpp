// Causal attention of a flattened batch over a paged KV cache, and the scatter that fills the cache.
// Owns the softmax and its order. Allocates no pages and applies no rotary embedding.
//
//   q, out [T, Hq, D]; K [blocks, Hkv, D, block_size], V [blocks, Hkv, block_size, D]
//   row i owns tokens cu[i]..cu[i+1] and pages tables[i]; a head's part of a page lies together, K with positions innermost,
//   so that neither is copied or turned before it is multiplied
//
//   positions of one row   |  chunk 0: 0..63  |  chunk 1: 64..127  |  chunk 2: 128.. ctx |
//   partial per chunk         m, l, sum p v      m, l, sum p v        m, l, sum p v
//   merged left to right   --------------------------------------------------------------> out
//
// A chunk's partial depends on nothing but the query and its positions, and partials are merged in order of position.
// So a query's bits are the same alone, in company, in a prefill of any length, and however chunks are shared out.
// A query reads only the positions it sees: NaN at any other position cannot reach it.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

constexpr index_t CHUNK = 64;  // positions per partial
constexpr index_t VECS = CHUNK / LANES;
constexpr index_t QUERY_ROWS = 64;  // (token, head) pairs that share one chunk
constexpr index_t PIECE = 4;        // chunks per piece when one task is shared out
// Few rows leave room in registers for more columns, which hides the latency of a sum.
constexpr int FEW_ROWS = LANES == 16 ? MAX_ROWS / 2 : MAX_ROWS;
constexpr int WIDE = LANES == 16 ? 2 * VECTORS : VECTORS;  // vectors of columns for few rows
constexpr index_t WIDE_LINES = Stream::lines(WIDE * LANES * sizeof(float));
constexpr index_t LEAD = 64;           // cache lines that are fetched before they are needed
constexpr index_t CHUNK_LINES = 2048;  // more than any chunk has
constexpr float NONE = -std::numeric_limits<float>::infinity();

using Call = AttentionCall;

struct Task {  // queries [first, last) of one row under one KV head, and the chunks they see
    index_t row, head, first, last, chunk, chunks;
    float *partials;  // one per chunk when the task is shared out, else null
};

struct Partial {  // a view: m [rows], l [rows], acc [rows, padded]; l == 0 means nothing was seen
    float *m, *l, *acc;
    Partial(float *p, index_t rows) : m(p), l(p + rows), acc(p + 2 * rows) {}
    static index_t size(const Call &c, index_t rows) { return rows * (2 + c.padded()); }
};

index_t rows_of(const Call &c, const Task &t) { return (t.last - t.first) * c.group(); }

index_t position(const Call &c, const Task &t, index_t query) {
    return c.ctx[t.row] - (c.cu[t.row + 1] - c.cu[t.row]) + query;
}

// Positions a query at `position` sees, clipped to a chunk and relative to its start.
Range visible(const Call &c, index_t position, index_t chunk) {
    index_t base = chunk * CHUNK, from = c.window > 0 ? position + 1 - c.window : 0, to = position + 1;
    return {from > base ? from - base : 0, to < base + CHUNK ? to - base : CHUNK};
}

// Where one chunk's K and V lie: LANES positions of K next to each other for every feature, one position of V after another.
struct Located {
    const float *k[VECS];
    index_t k_stride;  // from feature to feature
    const float *v[CHUNK];
};

struct Work {  // a thread's buffers for one task
    float *keys;     // [VECS][dim][LANES], of pages that have no room for whole vectors
    float *values;   // [CHUNK][padded], of heads that are no whole panels
    float *queries;  // [rows, dim], scaled
    float *scores;   // [rows, CHUNK]
    float *partial, *running;
    Range *seen;  // [rows]
    Located where;
    Stream &coming;

    Work(const Call &c, index_t rows, Stream &ahead) : coming(ahead) {
        static thread_local Scratch scratch;
        float *spans;
        index_t span = sizeof(Range) / sizeof(float), part = Partial::size(c, rows);
        index_t sizes[] = {CHUNK * c.dim, CHUNK * c.padded(), rows * c.dim, rows * CHUNK, part, part, rows * span};
        float **parts[] = {&keys, &values, &queries, &scores, &partial, &running, &spans};
        index_t total = 0;
        for (index_t &size : sizes) total += size = (size + 15) / 16 * 16;
        float *p = scratch.floats(total);
        for (int i = 0; i < 7; p += sizes[i++]) *parts[i] = p;
        seen = reinterpret_cast<Range *>(spans);
    }
};

void stage_queries(const Call &c, const Task &t, Work &w) {
    index_t group = c.group();
    for (index_t r = 0; r < rows_of(c, t); r++) {
        index_t token = c.cu[t.row] + t.first + r / group, head = t.head * group + r % group;
        const float *from = c.q + token * c.q_token + head * c.q_head;
        for (index_t d = 0; d < c.dim; d++) w.queries[r * c.dim + d] = from[d] * c.scale;
    }
}

// Pages are read where they lie if they hold whole vectors of positions, and heads if they are whole panels.
bool keys_in_place(const Call &c) { return c.block_size % LANES == 0; }
bool values_in_place(const Call &c) { return c.dim % PANEL == 0; }

// f(position, its page, its offset there, how many follow on that page) for every run of the chunk's positions.
template <typename F>
ADAPTERD_INLINE void each_page(const Call &c, const Task &t, index_t chunk, Range seen, F f) {
    const std::int32_t *table = c.tables + t.row * c.table_width;
    for (index_t i = seen.from, count; i < seen.to; i += count) {
        index_t at = chunk * CHUNK + i, offset = at % c.block_size;
        count = std::min(seen.to - i, c.block_size - offset);
        f(i, table[at / c.block_size] * c.kv_heads + t.head, offset, count);
    }
}

// Finds, or copies, one chunk of K and V. K vectors that hold nothing of `seen` repeat one that does.
void locate(const Call &c, const Task &t, index_t chunk, Range seen, Work &w) {
    Located &where = w.where;
    bool in_place = keys_in_place(c), values = values_in_place(c);
    // A vector may begin before the first position that is seen, on the same page.
    Range whole{in_place ? seen.from / LANES * LANES : seen.from, seen.to};
    where.k_stride = in_place ? c.block_size : LANES;
    each_page(c, t, chunk, whole, [&](index_t i, index_t page, index_t offset, index_t count) ADAPTERD_LAMBDA {
        const float *k = c.k + page * c.dim * c.block_size + offset;
        if (in_place) {
            for (index_t j = 0; j < count; j += LANES) where.k[(i + j) / LANES] = k + j;
            return;
        }
        for (index_t d = 0; d < c.dim; d++)
            for (index_t j = i; j < i + count; j++)
                w.keys[(j / LANES * c.dim + d) * LANES + j % LANES] = k[d * c.block_size + j - i];
    });
    each_page(c, t, chunk, seen, [&](index_t i, index_t page, index_t offset, index_t count) ADAPTERD_LAMBDA {
        const float *v = c.v + (page * c.block_size + offset) * c.dim;
        for (index_t j = 0; j < count; j++) {
            where.v[i + j] = values ? v + j * c.dim : w.values + (i + j) * c.padded();
            if (values) continue;
            std::memcpy(w.values + (i + j) * c.padded(), v + j * c.dim, c.dim * sizeof(float));
            std::memset(w.values + (i + j) * c.padded() + c.dim, 0, (c.padded() - c.dim) * sizeof(float));
        }
    });
    index_t first = whole.from / LANES, last = (whole.to - 1) / LANES;
    if (!in_place)
        for (index_t j = first; j <= last; j++) where.k[j] = w.keys + j * c.dim * LANES;
    for (index_t j = 0; j < VECS; j++)
        if (j < first || j > last) where.k[j] = where.k[first];
}

// What `locate` will find is going to be read: all of K, then all of V.
void announce(const Call &c, const Task &t, index_t chunk, Range seen, Stream &coming) {
    constexpr index_t size = sizeof(float);
    each_page(c, t, chunk, seen, [&](index_t, index_t page, index_t offset, index_t count) ADAPTERD_LAMBDA {
        const float *k = c.k + page * c.dim * c.block_size;
        if (c.block_size <= CHUNK) return coming.add(k, Stream::lines(c.dim * c.block_size * size));
        for (index_t d = 0; d < c.dim; d++) coming.add(k + d * c.block_size + offset, Stream::lines(count * size));
    });
    each_page(c, t, chunk, seen, [&](index_t, index_t page, index_t offset, index_t count) ADAPTERD_LAMBDA {
        coming.add(c.v + (page * c.block_size + offset) * c.dim, Stream::lines(count * c.dim * size));
    });
}

// Scores of one query row become probabilities in place; lanes outside `seen` become 0.
void softmax_row(const Call &c, Range seen, float *scores, float *m, float *l) {
    vi lane;
    for (int j = 0; j < LANES; j++) lane[j] = j;
    vf highest = splat(NONE);
    for (index_t i = 0; i < CHUNK; i += LANES) {
        vi at = lane + static_cast<int>(i);
        vf s = load(scores + i);
        if (c.softcap > 0) s = c.softcap * tanh(s / c.softcap);
        s = (at >= static_cast<int>(seen.from)) & (at < static_cast<int>(seen.to)) ? s : splat(NONE);
        store(scores + i, s);
        highest = s > highest ? s : highest;
    }
    *m = largest(highest);
    vf total = {};
    for (index_t i = 0; i < CHUNK; i += LANES) {
        vi at = lane + static_cast<int>(i);
        vf p = exp(load(scores + i) - *m);
        p = (at >= static_cast<int>(seen.from)) & (at < static_cast<int>(seen.to)) ? p : vf{};
        store(scores + i, p);
        total += p;
    }
    *l = sum(total);
}

struct Keys {  // LANES positions per vector
    const float *const *p;
    index_t stride;
    template <int V>
    ADAPTERD_INLINE void row(index_t d, vf (&w)[V]) const {
        for (int v = 0; v < V; v++) w[v] = load(p[v] + d * stride);
    }
};

struct Values {  // columns from `column` on of one position per row
    const float *const *p;
    index_t column;
    template <int V>
    ADAPTERD_INLINE void row(index_t position, vf (&w)[V]) const {
        for (int v = 0; v < V; v++) w[v] = load(p[position] + column + v * LANES);
    }
};

// scores = q K of all rows.
void score(const Call &c, index_t rows, Work &w) {
    auto keys = [&](index_t vector) { return Keys{w.where.k + vector, w.where.k_stride}; };
    index_t j = 0;
    if (rows <= FEW_ROWS)
        for (; j < VECS; j += WIDE)
            product<WIDE, FEW_ROWS>(rows, w.queries, c.dim, keys(j), c.dim, w.scores + j * LANES, CHUNK, false,
                                    Streamed{&w.coming, WIDE_LINES});
    for (; j < VECS; j += VECTORS)
        product<VECTORS, MAX_ROWS>(rows, w.queries, c.dim, keys(j), c.dim, w.scores + j * LANES, CHUNK, false);
}

// acc of query rows [from, to) (+)= p V over positions `at`.
void weigh(const Call &c, Work &w, index_t from, index_t to, Range at, float *acc, bool resume) {
    index_t d = 0, rows = to - from, width = c.padded(), depth = at.to - at.from;
    const float *p = w.scores + from * CHUNK + at.from;
    const float *const *v = w.where.v + at.from;
    acc += from * width;
    if (rows <= FEW_ROWS)
        for (; d + WIDE * LANES <= width; d += WIDE * LANES)
            product<WIDE, FEW_ROWS>(rows, p, CHUNK, Values{v, d}, depth, acc + d, width, resume, Streamed{&w.coming, WIDE_LINES});
    for (; d < width; d += PANEL) product<VECTORS, MAX_ROWS>(rows, p, CHUNK, Values{v, d}, depth, acc + d, width, resume);
}

// Rows of one tile see overlapping spans: what all of them see is computed together, the rest row by row, in order.
void weigh_tile(const Call &c, Work &w, index_t from, index_t to, const Range *seen, float *acc) {
    Range common{seen[to - 1].from, seen[from].to};
    bool together = common.from < common.to, begun = !together || seen[from].from < common.from;
    for (index_t r = from; r < to && begun; r++)
        weigh(c, w, r, r + 1, {seen[r].from, together ? common.from : seen[r].to}, acc, false);
    if (!together) return;
    weigh(c, w, from, to, common, acc, begun);
    for (index_t r = from; r < to; r++)
        if (seen[r].to > common.to) weigh(c, w, r, r + 1, {common.to, seen[r].to}, acc, true);
}

// What all queries of a task see of a chunk together; queries ascend.
Range seen_by_all(const Call &c, const Task &t, index_t chunk) {
    return {visible(c, position(c, t, t.first), chunk).from, visible(c, position(c, t, t.last - 1), chunk).to};
}

// What comes behind this chunk is fetched meanwhile. `after` is the task that this thread runs next, or null.
void announce_next(const Call &c, const Task &t, index_t chunk, const Task *after, Work &w) {
    if (chunk + 1 < t.chunk + t.chunks)
        announce(c, t, chunk + 1, seen_by_all(c, t, chunk + 1), w.coming);
    else if (after)
        announce(c, *after, after->chunk, seen_by_all(c, *after, after->chunk), w.coming);
}

void chunk_partial(const Call &c, const Task &t, index_t chunk, const Task *after, Work &w, Partial partial) {
    index_t rows = rows_of(c, t), group = c.group();
    Range *seen = w.seen, all = seen_by_all(c, t, chunk);
    for (index_t r = 0; r < rows; r++) seen[r] = visible(c, position(c, t, t.first + r / group), chunk);
    announce_next(c, t, chunk, after, w);
    if (rows > FEW_ROWS) w.coming.fetch(CHUNK_LINES);
    locate(c, t, chunk, all, w);
    score(c, rows, w);
    // A query that sees nothing of this chunk lies outside [first, last): queries ascend, so these are its ends.
    index_t first = 0, last = rows;
    for (index_t r = 0; r < rows; r++) {
        if (seen[r].from < seen[r].to) {
            softmax_row(c, seen[r], w.scores + r * CHUNK, partial.m + r, partial.l + r);
            continue;
        }
        partial.l[r] = 0;
        seen[r].to <= 0 ? first = r + 1 : last = last < r ? last : r;
    }
    for (index_t from = first; from < last; from += MAX_ROWS)
        weigh_tile(c, w, from, from + MAX_ROWS < last ? from + MAX_ROWS : last, seen, partial.acc);
}

void merge(const Call &c, index_t rows, Partial total, Partial next) {
    index_t width = c.padded();
    for (index_t r = 0; r < rows; r++) {
        if (next.l[r] == 0) continue;
        bool fresh = total.l[r] == 0;
        float m = fresh || next.m[r] > total.m[r] ? next.m[r] : total.m[r];
        float keep = fresh ? 0.0f : exp(total.m[r] - m), add = exp(next.m[r] - m);
        float *acc = total.acc + r * width;
        const float *more = next.acc + r * width;
        for (index_t d = 0; d < width; d += LANES) {
            vf held = fresh ? vf{} : load(acc + d) * keep;
            store(acc + d, held + load(more + d) * add);
        }
        total.l[r] = fresh ? next.l[r] * add : fma(next.l[r], add, total.l[r] * keep);
        total.m[r] = m;
    }
}

void finish(const Call &c, const Task &t, Partial total) {
    index_t group = c.group();
    for (index_t r = 0; r < rows_of(c, t); r++) {
        index_t token = c.cu[t.row] + t.first + r / group, head = t.head * group + r % group;
        float *to = c.out + (token * c.heads + head) * c.dim;
        for (index_t d = 0; d < c.dim; d++) to[d] = total.acc[r * c.padded() + d] / total.l[r];
    }
}

Partial empty(float *p, index_t rows) {
    Partial partial(p, rows);
    for (index_t r = 0; r < rows; r++) partial.l[r] = 0;
    return partial;
}

// What a task reads first, if nothing before it has asked for that.
void begin(const Call &c, const Task &t, index_t chunk, Stream &coming) {
    announce(c, t, chunk, seen_by_all(c, t, chunk), coming);
    coming.fetch(LEAD);
}

void run_whole(const Call &c, const Task &t, const Task *after, Stream &coming) {
    index_t rows = rows_of(c, t);
    Work w(c, rows, coming);
    stage_queries(c, t, w);
    Partial total = empty(w.running, rows), partial(w.partial, rows);
    for (index_t i = 0; i < t.chunks; i++) {
        chunk_partial(c, t, t.chunk + i, after, w, partial);
        merge(c, rows, total, partial);
    }
    finish(c, t, total);
}

void run_piece(const Call &c, const Task &t, index_t piece, Stream &coming) {
    index_t rows = rows_of(c, t), end = (piece + 1) * PIECE < t.chunks ? (piece + 1) * PIECE : t.chunks;
    Work w(c, rows, coming);
    coming.clear();
    begin(c, t, t.chunk + piece * PIECE, coming);
    stage_queries(c, t, w);
    for (index_t i = piece * PIECE; i < end; i++)
        chunk_partial(c, t, t.chunk + i, nullptr, w, Partial(t.partials + i * Partial::size(c, rows), rows));
}

void gather_pieces(const Call &c, const Task &t, Stream &coming) {
    index_t rows = rows_of(c, t);
    Work w(c, rows, coming);
    Partial total = empty(w.running, rows);
    for (index_t i = 0; i < t.chunks; i++)
        merge(c, rows, total, Partial(t.partials + i * Partial::size(c, rows), rows));
    finish(c, t, total);
}

std::vector<Task> tasks_of(const Call &c) {
    std::vector<Task> tasks;
    index_t step = QUERY_ROWS / c.group() > 1 ? QUERY_ROWS / c.group() : 1;
    for (index_t row = 0; row < c.rows; row++) {
        index_t queries = c.cu[row + 1] - c.cu[row];
        for (index_t first = 0; first < queries; first += step)
            for (index_t head = 0; head < c.kv_heads; head++) {
                Task t{row, head, first, first + step < queries ? first + step : queries, 0, 0, nullptr};
                index_t low = position(c, t, first) + 1 - c.window, high = position(c, t, t.last - 1);
                t.chunk = c.window > 0 && low > 0 ? low / CHUNK : 0;
                t.chunks = high / CHUNK + 1 - t.chunk;
                tasks.push_back(t);
            }
    }
    return tasks;
}

}  // namespace

// Few tasks over long contexts are shared out by chunks. This moves work, never bits.
struct AttentionPlan {
    std::vector<Task> tasks;
    std::vector<std::pair<index_t, index_t>> pieces;  // (task, piece); empty where tasks are run whole
    std::unique_ptr<float[]> partials;
    bool parallel = false;
};

std::shared_ptr<AttentionPlan> attention_plan(const Call &c) {
    auto plan = std::make_shared<AttentionPlan>();
    std::vector<Task> &tasks = plan->tasks = tasks_of(c);
    index_t count = static_cast<index_t>(tasks.size()), longest = 0, work = 0, total = 0;
    for (const Task &t : tasks) {
        longest = t.chunks > longest ? t.chunks : longest;
        work += rows_of(c, t) * t.chunks * CHUNK * c.dim;
    }
    plan->parallel = count > 1 && work > PARALLEL_WORK;
    if (threads == 1 || count >= 4 * threads || longest <= PIECE) return plan;
    plan->parallel = true;
    for (index_t i = 0; i < count; i++) {
        for (index_t p = 0; p * PIECE < tasks[i].chunks; p++) plan->pieces.push_back({i, p});
        total += tasks[i].chunks * Partial::size(c, rows_of(c, tasks[i]));
    }
    plan->partials.reset(new float[total]);
    float *p = plan->partials.get();
    for (Task &t : tasks) {
        t.partials = p;
        p += t.chunks * Partial::size(c, rows_of(c, t));
    }
    return plan;
}

void team_attention(const Call &c, const AttentionPlan &plan) {
    static thread_local Stream coming;
    coming.clear();
    bool begun = false;
    index_t count = static_cast<index_t>(plan.tasks.size()), pieces = static_cast<index_t>(plan.pieces.size());
    if (!pieces)
        return each_taken(count, [&](index_t i, index_t next) {
            if (!begun) begin(c, plan.tasks[i], plan.tasks[i].chunk, coming);
            begun = true;
            run_whole(c, plan.tasks[i], next < count ? &plan.tasks[next] : nullptr, coming);
        });
    each_taken(pieces, [&](index_t i, index_t) {
        run_piece(c, plan.tasks[plan.pieces[i].first], plan.pieces[i].second, coming);
    });
    each(count, [&](index_t i) { gather_pieces(c, plan.tasks[i], coming); });
}

// 0, or the number of the first broken rule; see the export below.
int attention_rule(const Call &c) {
    if (c.rows > 0 && (c.cu[0] < 0 || c.cu[c.rows] > c.tokens)) return 1;
    for (index_t i = 0; i < c.rows; i++) {
        index_t queries = c.cu[i + 1] - c.cu[i], pages = (c.ctx[i] + c.block_size - 1) / c.block_size;
        if (queries < 0) return 1;
        if (c.ctx[i] < queries || pages > c.table_width) return 2;
        for (index_t p = 0; p < pages; p++) {
            index_t page = c.tables[i * c.table_width + p];
            if (page < 0 || page >= c.blocks) return 3;
        }
    }
    return 0;
}

// One head of one token into the caches.
struct Caches {
    float *k, *v;
    index_t block_size, kv_heads, dim;
};

void put(const float *k, const float *v, const Caches &to, index_t position, index_t head) {
    index_t page = position / to.block_size * to.kv_heads + head, offset = position % to.block_size;
    float *column = to.k + page * to.dim * to.block_size + offset;
    for (index_t d = 0; d < to.dim; d++) column[d * to.block_size] = k[d];
    std::memcpy(to.v + (page * to.block_size + offset) * to.dim, v, to.dim * sizeof(float));
}

void team_write(const NewKeys &c) {
    each(c.tokens, [&](index_t t) {
        if (c.cos) {
            const float *cos = c.cos + t * c.turned, *sin = c.sin + t * c.turned;
            for (index_t h = 0; h < c.heads; h++) rotate(c.q + (t * c.heads + h) * c.dim, cos, sin, c.turned / 2);
            for (index_t h = 0; h < c.kv_heads; h++) rotate(c.k + (t * c.kv_heads + h) * c.dim, cos, sin, c.turned / 2);
        }
        for (index_t h = 0; h < c.kv_heads; h++) {
            index_t from = (t * c.kv_heads + h) * c.dim;
            put(c.k + from, c.v + from, {c.k_cache, c.v_cache, c.block_size, c.kv_heads, c.dim}, c.write[t], h);
        }
    });
}

}  // namespace adapterd

// Returns 0; 1: cu is not ascending within the tokens; 2: a context is shorter than its queries or longer than its
// table; 3: a page is out of range. Nothing is written then.
ADAPTERD_EXPORT int adapterd_attention(const float *q, std::int64_t q_token, std::int64_t q_head, const float *k,
                                       const float *v, std::int64_t blocks, std::int64_t block_size,
                                       std::int64_t kv_heads, std::int64_t dim, const std::int32_t *tables,
                                       std::int64_t table_width, const std::int32_t *cu, const std::int32_t *ctx,
                                       std::int64_t rows, std::int64_t tokens, std::int64_t heads, float scale,
                                       std::int64_t window, float softcap, float *out) {
    using namespace adapterd;
    Call call{q,  q_token, q_head, k,      v,     blocks, block_size, kv_heads, dim, tables, table_width,
              cu, ctx,     rows,   tokens, heads, scale,  window,     softcap,  out};
    if (int rule = attention_rule(call)) return rule;
    std::shared_ptr<AttentionPlan> plan = attention_plan(call);
    in_team(plan->parallel, [&] { team_attention(call, *plan); });
    return 0;
}

// k, v [Hkv, T, D] by strides (floats); caches as above; token t goes to position write[t].
// Returns 0, or 1 when a position is out of range (nothing is written then).
ADAPTERD_EXPORT int adapterd_write_kv(const float *k, std::int64_t k_head, std::int64_t k_token, const float *v,
                                      std::int64_t v_head, std::int64_t v_token, float *k_cache, float *v_cache,
                                      const std::int64_t *write, std::int64_t tokens, std::int64_t blocks,
                                      std::int64_t block_size, std::int64_t kv_heads, std::int64_t dim) {
    using namespace adapterd;
    if (!all_within(write, tokens, blocks * block_size)) return 1;
    Caches to{k_cache, v_cache, block_size, kv_heads, dim};
    for (std::int64_t t = 0; t < tokens; t++)
        for (std::int64_t h = 0; h < kv_heads; h++)
            put(k + h * k_head + t * k_token, v + h * v_head + t * v_token, to, write[t], h);
    return 0;
}

// What a decoder layer does between its projections: q and k turn in place (cos null: they do not), k and v go into the
// caches, q attends. q [T, heads * dim], k, v [T, kv_heads * dim], cos and sin [T, turned], out [T, heads * dim].
// Returns 0, the number of the attention rule that is broken, or 4 when a position is out of range.
ADAPTERD_EXPORT int adapterd_attend(float *q, float *k, const float *v, const float *cos, const float *sin,
                                    std::int64_t turned, float *k_cache, float *v_cache, std::int64_t blocks,
                                    std::int64_t block_size, std::int64_t kv_heads, std::int64_t dim,
                                    const std::int64_t *write, const std::int32_t *tables, std::int64_t table_width,
                                    const std::int32_t *cu, const std::int32_t *ctx, std::int64_t rows,
                                    std::int64_t tokens, std::int64_t heads, float scale, std::int64_t window,
                                    float softcap, float *out) {
    using namespace adapterd;
    Call call{q,           heads * dim, dim, k_cache, v_cache, blocks, block_size, kv_heads, dim, tables,
              table_width, cu,          ctx, rows,    tokens,  heads,  scale,      window,   softcap, out};
    if (int rule = attention_rule(call)) return rule;
    if (!all_within(write, tokens, blocks * block_size)) return 4;
    NewKeys fresh{q, k, v, cos, sin, turned, k_cache, v_cache, write, block_size, tokens, heads, kv_heads, dim};
    std::shared_ptr<AttentionPlan> plan = attention_plan(call);
    in_team(plan->parallel || tokens * heads * dim > PARALLEL_WORK / 16, [&] {
        team_write(fresh);
        team_attention(call, *plan);
    });
    return 0;
}
