// Vectors for every kernel: one source for AVX-512, AVX2, NEON and SSE through the compiler's vector extension.
// Owns loads, exp, tanh and the register-tiled product `tile`, which fixes the order of every sum.
// Knows no kernel, no layout of any tensor and no threads.
//
// Bit-identity: an output element is one chain of fused multiply-adds in a fixed order, whatever the number of rows in
// its tile. Never split a sum by the number of rows, threads or blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ADAPTERD_LANES 16
#elif defined(__AVX__)
#define ADAPTERD_LANES 8
#else
#define ADAPTERD_LANES 4
#endif

#define ADAPTERD_EXPORT extern "C" __attribute__((visibility("default")))
#define ADAPTERD_INLINE inline __attribute__((always_inline))
#define ADAPTERD_LAMBDA __attribute__((always_inline))

namespace adapterd {

using index_t = std::ptrdiff_t;

constexpr int LANES = ADAPTERD_LANES;
constexpr int PANEL = 32;               // columns of a packed panel, on every instruction set
constexpr int VECTORS = PANEL / LANES;  // vectors per panel row

// Rows of a register tile: as many accumulators as leave room for one panel row and a broadcast.
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;
#elif defined(__AVX__)
constexpr int MAX_ROWS = 3;
#elif defined(__aarch64__)
constexpr int MAX_ROWS = 2;
#else
constexpr int MAX_ROWS = 1;
#endif

typedef float vf __attribute__((vector_size(ADAPTERD_LANES * 4)));
typedef std::int32_t vi __attribute__((vector_size(ADAPTERD_LANES * 4)));
typedef std::uint32_t vu __attribute__((vector_size(ADAPTERD_LANES * 4)));
typedef std::uint16_t vh __attribute__((vector_size(ADAPTERD_LANES * 2)));
typedef std::int16_t vs __attribute__((vector_size(ADAPTERD_LANES * 2)));
typedef std::int8_t vb_loose __attribute__((vector_size(ADAPTERD_LANES), aligned(1), may_alias));
typedef float vf_loose __attribute__((vector_size(ADAPTERD_LANES * 4), aligned(4), may_alias));
typedef std::uint32_t vu_loose __attribute__((vector_size(ADAPTERD_LANES * 4), aligned(4), may_alias));
typedef std::uint16_t vh_loose __attribute__((vector_size(ADAPTERD_LANES * 2), aligned(2), may_alias));

ADAPTERD_INLINE vf load(const float *p) { return *reinterpret_cast<const vf_loose *>(p); }
ADAPTERD_INLINE void store(float *p, vf v) { *reinterpret_cast<vf_loose *>(p) = v; }
ADAPTERD_INLINE vf splat(float x) { return x - vf{}; }

// bf16 is the upper half of an fp32, so widening is a shift and exact. GCC widens by halves, with four shuffles, and bytes
// one at a time, so the instruction is named where there is one.
ADAPTERD_INLINE vf load(const std::uint16_t *p) {
#if defined(__AVX512F__)
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))) << 16);
#elif defined(__AVX2__)
    return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))) << 16);
#else
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_loose *>(p), vu) << 16);
#endif
}
ADAPTERD_INLINE vf load(const std::int8_t *p) {
#if defined(__AVX512F__)
    vi wide = (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#elif defined(__AVX2__)
    vi wide = (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
    vi wide = __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const vb_loose *>(p), vs), vi);
#endif
    return __builtin_convertvector(wide, vf);
}
ADAPTERD_INLINE float scalar(const float *p) { return *p; }
ADAPTERD_INLINE float scalar(const std::uint16_t *p) {
    std::uint32_t bits = static_cast<std::uint32_t>(*p) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// One rounding where the vectors have one. A plain `a * b + c` in a loop may be vectorised into a product and ordered
// sums, with two roundings, in one instantiation and not in another.
ADAPTERD_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Lane j of the result is lane j + HALF; the upper lanes are of no interest.
template <int HALF, int... J>
ADAPTERD_INLINE vf upper(vf v, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(v, v, ((J + HALF) % LANES)...);
#else
    return __builtin_shuffle(v, vi{((J + HALF) % LANES)...});
#endif
}

// Halving tree over lanes: the same order on every call.
template <int HALF = LANES / 2>
ADAPTERD_INLINE float sum(vf v) {
    v += upper<HALF>(v, std::make_integer_sequence<int, LANES>{});
    if constexpr (HALF > 1) return sum<HALF / 2>(v);
    return v[0];
}

template <int HALF = LANES / 2>
ADAPTERD_INLINE float largest(vf v) {
    vf other = upper<HALF>(v, std::make_integer_sequence<int, LANES>{});
    v = other > v ? other : v;
    if constexpr (HALF > 1) return largest<HALF / 2>(v);
    return v[0];
}

// exp to 2 ulp (Cephes' expf: 2^n times a degree-6 polynomial); 0 below -87.3, infinity above 88.3. NaN stays NaN: both
// comparisons are false for it and it is multiplied, never patched.
ADAPTERD_INLINE vf exp(vf x) {
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    vf shifted = x * 1.44269504f + shift;
    vf n = shifted - shift;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vu power = ((vu)shifted + 127u) << 23;
    p = p * (vf)power;
    p = x < -87.3f ? vf{} : p;
    return x > 88.3f ? splat(std::numeric_limits<float>::infinity()) : p;
}

ADAPTERD_INLINE float exp(float x) { return exp(splat(x))[0]; }

ADAPTERD_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Cephes' tanhf: a polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
ADAPTERD_INLINE vf tanh(vf x) {
    vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    vf small = p * z * x + x;
    vf large = 1.0f - 2.0f / (exp(x + x) + 1.0f);
    return z < 0.390625f ? small : large;
}

// ---- the product of a few rows with a strip of columns, held in registers ----

// Where a tile's weights come from; `row(k, w)` gives the V vectors of row k.
template <typename T>
struct Rows {  // row-major, in natural column order; T is float, bf16 bits or int8
    const T *p;
    index_t stride;
    template <int V>
    ADAPTERD_INLINE void row(index_t k, vf (&w)[V]) const {
        for (int v = 0; v < V; v++) w[v] = load(p + k * stride + v * LANES);
    }
};

struct PairedPanel {  // bf16 panel: word j of a row holds column j (low half) and column j + PANEL / 2 (high half)
    const std::uint32_t *p;
    template <int V>
    ADAPTERD_INLINE void row(index_t k, vf (&w)[V]) const {
        for (int v = 0; v < V / 2; v++) {
            vu pair = *reinterpret_cast<const vu_loose *>(p + k * (PANEL / 2) + v * LANES);
            w[v] = (vf)(pair << 16);
            w[v + V / 2] = (vf)(pair & 0xffff0000u);
        }
    }
};

// bf16 panel in tiles of 32 k by 16 columns: word (j, c) of a tile holds k = 2j (low half) and 2j + 1 (high half).
struct TiledPanel {
    const std::uint32_t *p;
    static constexpr index_t SIDE = 16, TILE = SIDE * SIDE;
    template <int V>
    ADAPTERD_INLINE void rows(std::size_t k, vf (&even)[V], vf (&odd)[V]) const {
        const std::uint32_t *at = p + k / (2 * SIDE) * (PANEL / SIDE * TILE) + k % (2 * SIDE) / 2 * SIDE;
        for (int v = 0; v < V; v++) {
            vu pair = *reinterpret_cast<const vu_loose *>(at + v * LANES / SIDE * TILE + v * LANES % SIDE);
            even[v] = (vf)(pair << 16);
            odd[v] = (vf)(pair & 0xffff0000u);
        }
    }
};

// Memory that will be read piece after piece, fetched a few cache lines at a time.
class Stream {
  public:
    static constexpr index_t LINE = 64;

    void clear() { pieces_.clear(), next_ = 0, left_ = 0; }
    static constexpr index_t lines(index_t bytes) { return (bytes + LINE - 1) / LINE; }
    // `lines` cache lines, each `stride` bytes behind the one before.
    void add(const void *p, index_t lines, index_t stride = LINE) {
        if (next_ >= KEPT) pieces_.erase(pieces_.begin(), pieces_.begin() + static_cast<index_t>(next_)), next_ = 0;
        pieces_.push_back({static_cast<const char *>(p), lines, stride});
    }

    ADAPTERD_INLINE void fetch(index_t lines) {
        for (; lines > 0; lines--) {
            while (!left_) {
                if (next_ == pieces_.size()) return;
                at_ = pieces_[next_].p, left_ = pieces_[next_].lines, stride_ = pieces_[next_].stride, next_++;
            }
            __builtin_prefetch(at_, 0, 2);
            at_ += stride_, left_--;
        }
    }

  private:
    static constexpr std::size_t KEPT = 256;  // pieces that may be behind us

    struct Piece {
        const char *p;
        index_t lines, stride;
    };
    std::vector<Piece> pieces_;
    std::size_t next_ = 0;
    const char *at_ = nullptr;
    index_t left_ = 0, stride_ = LINE;
};

// Memory wanted soon, fetched while the tile computes: `step` bytes of it for every k, and a line of the stream for every k
// whose bits under `mask` are zero.
struct Ahead {
    const void *p;
    index_t step, mask;
    Stream *stream;
    ADAPTERD_INLINE void fetch(index_t k) const {
        __builtin_prefetch(static_cast<const char *>(p) + k * step, 0, 2);
        if (!(k & mask)) stream->fetch(1);
    }
};

// A thread's own stream, cleared. By reference and out of sight: a compiler that knows it for thread-local asks for its address
// in every turn of a loop.
Stream &fresh_stream();

struct Nothing {
    ADAPTERD_INLINE void fetch(index_t) const {}
};

struct Streamed {  // so many lines of a stream for every k
    Stream *stream;
    index_t lines;
    ADAPTERD_INLINE void fetch(index_t) const { stream->fetch(lines); }
};

// out[r][c] (+)= sum over k of x[r][k] * w[k][c], k ascending, for R rows and V * LANES columns.
template <int R, int V, typename W, typename A>
ADAPTERD_INLINE void tile(const float *x, index_t ldx, W w, index_t depth, float *out, index_t ldo, bool resume, A ahead) {
    vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = resume ? load(out + r * ldo + v * LANES) : vf{};
    // One base per three rows keeps every address in base + {0, 1, 2} * stride form: no row pointer is spilled.
    const float *base[(R + 2) / 3];
    for (int g = 0; g < (R + 2) / 3; g++) base[g] = x + 3 * g * ldx;
    auto add = [&](index_t k, const vf (&row)[V]) ADAPTERD_LAMBDA {
        ahead.fetch(k);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            float factor = base[r / 3][(r % 3) * ldx + k];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] += factor * row[v];
        }
    };
    if constexpr (std::is_same_v<W, TiledPanel>) {
        vf even[V], odd[V];
        for (index_t k = 0; k + 1 < depth; k += 2) {
            w.rows(k, even, odd);
            add(k, even);
            add(k + 1, odd);
        }
        if (depth % 2) {
            w.rows(depth - 1, even, odd);
            add(depth - 1, even);
        }
    } else {
        for (index_t k = 0; k < depth; k++) {
            vf row[V];
            w.row(k, row);
            add(k, row);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * ldo + v * LANES, acc[r][v]);
}

template <int R, int V, typename W, typename A>
ADAPTERD_INLINE void tile_of(int rows, const float *x, index_t ldx, W w, index_t depth, float *out, index_t ldo,
                             bool resume, A ahead) {
    if (rows == R)
        tile<R, V>(x, ldx, w, depth, out, ldo, resume, ahead);
    else if constexpr (R > 1)
        tile_of<R - 1, V>(rows, x, ldx, w, depth, out, ldo, resume, ahead);
}

// Any number of rows, cut into tiles of nearly equal height. Not inlined: it holds a copy of the tile per height.
template <int V, int TALLEST, typename W, typename A = Nothing>
__attribute__((noinline)) void product(index_t rows, const float *x, index_t ldx, W w, index_t depth, float *out,
                                       index_t ldo, bool resume, A ahead = {}) {
    index_t tiles = (rows + TALLEST - 1) / TALLEST;
    for (index_t t = 0; t < tiles; t++) {
        index_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
        tile_of<TALLEST, V>(static_cast<int>(to - from), x + from * ldx, ldx, w, depth, out + from * ldo, ldo, resume, ahead);
    }
}

// A thread's scratch memory; it only grows, and its content is whatever the last user left.
class Scratch {
  public:
    float *floats(std::size_t count) { return of<float>(count); }

    template <typename T>
    T *of(std::size_t count) {
        std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > held_) {
            std::free(p_);
            held_ = 0;
            p_ = std::aligned_alloc(64, bytes);
            if (!p_) throw std::bad_alloc();
            held_ = bytes;
        }
        return static_cast<T *>(p_);
    }
    ~Scratch() { std::free(p_); }

  private:
    void *p_ = nullptr;
    std::size_t held_ = 0;
};

// Threads of a parallel region; set once by the loader to torch's own number, so that both share one pool.
extern int threads;

// Below this many multiply-adds a parallel region costs more than it saves.
constexpr index_t PARALLEL_WORK = 1 << 15;

}  // namespace adapterd
