// y = x W^T + b over bf16 weights in AMX tiles, with fp32's accuracy, and what the rows' own LoRA adapters add to it. Owns the
// blocking; what tiles and pieces are is said in tiles.h.
//
//   weight [N, K]  ->  panels [ceil(N / 32)][ceil(K / 32)][2][16][16][2], zero padded: two tiles of 16 columns per step
//                      of 32 k
//   x [M, K]       ->  pieces, made anew for every product
//
// A tile's rows do not meet: an output element is one chain of sums along k and then along the adapter's ranks, in a fixed
// order, whatever the number of rows. An infinity has no pieces: it gives NaN, and a row of no finite values either way.
#include "tiles.h"

#include "kernels.h"
#include "team.h"

#ifdef ADAPTERD_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace adapterd {

#ifdef ADAPTERD_TILES
namespace {

constexpr index_t BLOCK_BYTES = 9 << 17;  // of the second-level cache: a block's pieces, and the panels that pass
constexpr index_t FEW = 64;               // rows up to which a second thread's cutting of the same rows is cheap
constexpr index_t LINE = 64;              // bytes the cache takes at once
constexpr index_t FIRST_LINES = 256;      // of a thread's first panel, asked for before anything else

struct Call {
    const float *x;
    const bf16 *panels;
    const float *bias;
    float *y;
    index_t m, n, k, steps;
    const std::vector<AdaptedRows> *adapted;  // null: no row goes through an adapter
    index_t origin;                           // the row of `adapted` that x begins with

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

// Memory wanted next, `lines` cache lines of it per step: tiles are read too fast for the processor to foresee.
struct Coming {
    const char *at;
    index_t lines;
};

// Sums of 16 rows times one panel, or two that lie side by side; `out`, where they will go, is asked for meanwhile.
template <int PANELS>
ADAPTERD_INLINE void multiply(const bf16 *pieces, const bf16 *panel, index_t steps, const float *out, index_t ldo,
                              Coming coming) {
    const bf16 *next = panel + 2 * TILE * steps;
    zero_sums<2 * PANELS>();
    for (index_t s = 0; s < steps; s++) {
        for (index_t line = 0; line < coming.lines; line++, coming.at += LINE) __builtin_prefetch(coming.at, 0, 2);
        if (s < SIDE)
            for (int column = 0; column < PANELS * PANEL; column += SIDE) __builtin_prefetch(out + s * ldo + column, 1, 2);
        load_pieces(pieces);
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
}

void add_bias(const float *bias, float *out, index_t ldo, index_t rows, index_t width) {
    for (index_t r = 0; r < rows; r++)
        for (index_t j = 0; j < width; j++) out[r * ldo + j] += bias[j];
}

// A row of tiles' place in y, PANELS panels wide from panel `p` on.
template <int PANELS>
struct Place {
    static constexpr index_t wide = PANELS * PANEL;
    const Call &c;
    index_t row, column, rows, width;

    Place(const Call &call, index_t first, index_t p)
        : c(call), row(first), column(p * PANEL), rows(std::min<index_t>(c.m - row, SIDE)), width(std::min(c.n - column, wide)) {}

    float *out() const { return c.y + row * c.n + column; }
    // What hangs over the edges of y goes through a buffer.
    void store() const {
        if (rows == SIDE && width == wide) return store_sums<2 * PANELS>(out(), c.n);
        alignas(64) float sums[SIDE * wide];
        store_sums<2 * PANELS>(sums, wide);
        copy(sums, row, row + rows);
    }
    void copy(const float *sums, index_t from, index_t to) const {
        for (index_t r = from - row; r < to - row; r++) std::memcpy(out() + r * c.n, sums + r * wide, width * sizeof(float));
    }
};

// The rows of a product that go through adapters, tile after tile, and B of the one whose turn it is.
template <int PANELS>
class Adapters {
  public:
    Adapters(const std::vector<Segment> &segments, index_t out, index_t p)
        : next_(segments.data()), end_(next_ + segments.size()), out_(out), column_(p * PANEL) {}

    // Adds to the sums of the tile at `place`, and stores them.
    void finish(const Place<PANELS> &place) {
        const Segment *mine = next_;
        while (next_ != end_ && next_->tile == place.row) next_++;
        if (mine == next_) return place.store();
        if (next_ - mine == 1 && mine->from == place.row && mine->to == place.row + place.rows) {
            add_low<2 * PANELS>(*mine, b_of(*mine));
            return place.store();
        }
        alignas(64) float base[SIDE * Place<PANELS>::wide], own[SIDE * Place<PANELS>::wide];
        store_sums<2 * PANELS>(base, Place<PANELS>::wide);
        place.copy(base, place.row, place.row + place.rows);
        for (; mine != next_; mine++) {
            load_sums<2 * PANELS>(base, Place<PANELS>::wide);
            add_low<2 * PANELS>(*mine, b_of(*mine));
            store_sums<2 * PANELS>(own, Place<PANELS>::wide);
            place.copy(own, mine->from, mine->to);
        }
    }

  private:
    const bf16 *b_of(const Segment &segment) {
        static thread_local Scratch space;
        if (segment.run != laid_) {
            laid_ = segment.run;
            b_ = space.of<bf16>(static_cast<std::size_t>(steps_of(laid_->rank) * 2 * PANELS * TILE));
            lay_b<2 * PANELS>(*laid_, out_, column_, b_);
        }
        return b_;
    }

    const Segment *next_, *end_;
    index_t out_, column_;
    const AdaptedRows *laid_ = nullptr;
    bf16 *b_ = nullptr;
};

// Rows whose pieces have been made, and what their adapters will add.
struct Cut {
    Range rows;
    const bf16 *pieces;
    const std::vector<Segment> &segments;
};

// The rows times PANELS panels from `p` on, fetching `ahead` bytes behind them meanwhile.
template <int PANELS>
void strip(const Call &c, const Cut &cut, index_t p, index_t ahead) {
    index_t tiles = (cut.rows.to - cut.rows.from + SIDE - 1) / SIDE, lines = ahead / LINE;
    Coming coming{c.panel(p + PANELS), (lines + c.steps * tiles - 1) / (c.steps * tiles)};
    Adapters<PANELS> adapters(cut.segments, c.n, p);
    for (index_t row = cut.rows.from; row < cut.rows.to; row += SIDE) {
        Place<PANELS> place(c, row, p);
        const bf16 *pieces = cut.pieces + (row - cut.rows.from) / SIDE * c.steps * PIECES * TILE;
        multiply<PANELS>(pieces, reinterpret_cast<const bf16 *>(c.panel(p)), c.steps, place.out(), c.n, coming);
        adapters.finish(place);
        if (c.bias) add_bias(c.bias + place.column, place.out(), c.n, place.rows, place.width);
        coming.at += coming.lines * c.steps * LINE;
    }
}

// Two panels at a time.
void product(const Call &c, const Cut &cut, Range panels) {
    index_t p = panels.from;
    for (; p + 2 <= panels.to; p += 2) strip<2>(c, cut, p, std::min<index_t>(panels.to - p - 2, 2) * c.panel_bytes());
    if (p < panels.to) strip<1>(c, cut, p, 0);
}

// Cuts rows into `pieces`; the segments are this thread's own and hold until it cuts again.
Cut cut_rows(const Call &c, Range rows, bf16 *pieces) {
    static thread_local LowRank low;
    bf16 *to = pieces;
    for (index_t row = rows.from; row < rows.to; row += SIDE, to += c.steps * PIECES * TILE)
        cut_rows_of_tile(c.x + row * c.k, c.k, std::min<index_t>(rows.to - row, SIDE), c.k, to);
    low.begin(c.adapted, c.origin, rows.from, rows.to, pieces, c.k);
    return {rows, pieces, low.segments()};
}

// Few rows: each thread has its panels, and cuts every row for itself, which is sooner done than waited for.
void by_panels(const Call &c, bf16 *pieces) {
    Range mine = member.share((c.n + PANEL - 1) / PANEL);
    for (index_t line = 0; mine.from < mine.to && line < FIRST_LINES; line++)
        __builtin_prefetch(c.panel(mine.from) + line * LINE, 0, 2);
    product(c, cut_rows(c, {0, c.m}, pieces), mine);
}

// Many rows: each thread has its own, and cuts as many at a time as stay in the cache while all panels pass.
void by_rows(const Call &c, bf16 *pieces) {
    Range mine = member.share((c.m + SIDE - 1) / SIDE);
    index_t tiles = mine.to - mine.from, most = block_tiles(c.steps), blocks = (tiles + most - 1) / most;
    for (index_t b = 0; b < blocks; b++) {
        index_t from = mine.from + tiles * b / blocks, to = mine.from + tiles * (b + 1) / blocks;
        product(c, cut_rows(c, {from * SIDE, std::min(to * SIDE, c.m)}, pieces), {0, (c.n + PANEL - 1) / PANEL});
    }
}

Call prompt_rows(const Linear &c) {
    return {c.x + c.prompt * c.k, static_cast<const bf16 *>(c.panels), c.bias, c.y + c.prompt * c.n, c.m - c.prompt, c.n, c.k,
            steps_of(c.k),        c.adapted,                           c.prompt};
}

}  // namespace

bool tiles_usable() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    static const bool usable = syscall(SYS_arch_prctl, request, tile_data) == 0;  // for the whole process
    return usable;
}

index_t tiles_space(index_t k) { return threads * own_space(steps_of(k)); }

bool few_for_tiles(index_t rows) { return rows <= FEW; }

void both_panels(const Linear &c) {
    Call call = prompt_rows(c);
    Range mine = member.share((c.n + PANEL - 1) / PANEL);
    configure();
    Cut cut = cut_rows(call, {0, call.m}, c.space + member.place * own_space(call.steps));
    for (index_t p = mine.from; p < mine.to; p++) {
        tiled_panel(c, p);
        strip<1>(call, cut, p, 0);
    }
    _tile_release();
}

void tile_rows(const Linear &c) {
    Call call = prompt_rows(c);
    bf16 *pieces = c.space + member.place * own_space(call.steps);
    configure();
    if (call.m <= FEW)
        by_panels(call, pieces);
    else
        by_rows(call, pieces);
    _tile_release();
}

#else

bool tiles_usable() { return false; }
index_t tiles_space(index_t) { return 0; }
void tile_rows(const Linear &) {}
bool few_for_tiles(index_t) { return false; }
void both_panels(const Linear &) {}

#endif

}  // namespace adapterd

// 1 where this processor has AMX tiles and the kernel lets this process use them.
ADAPTERD_EXPORT int adapterd_tiles() { return adapterd::tiles_usable() ? 1 : 0; }
