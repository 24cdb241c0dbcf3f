// Norms, gated activations, rotary embedding, the peak of a row and the sum under its softmax: few passes over their rows,
// each row on its own.
// Owns no layout but [rows, width]; formulas are Hugging Face's.
#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

constexpr index_t PARALLEL_ELEMENTS = 1 << 15;  // below this a parallel region costs more than it saves

// sum over i of (x[i] - mean)^2, lanes first, then the tree, then the tail: one order for every row of this width.
ADAPTERD_INLINE float squares(const float *x, index_t width, float mean) {
    vf acc = {}, more = {};
    index_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) {
        vf a = load(x + i) - mean, b = load(x + i + LANES) - mean;
        acc += a * a;
        more += b * b;
    }
    float total = sum(acc + more);
    for (; i < width; i++) total = fma(x[i] - mean, x[i] - mean, total);
    return total;
}

ADAPTERD_INLINE float average(const float *x, index_t width) {
    vf acc = {};
    index_t i = 0;
    for (; i + LANES <= width; i += LANES) acc += load(x + i);
    float total = sum(acc);
    for (; i < width; i++) total += x[i];
    return total / static_cast<float>(width);
}

// f over vectors of a row; the tail goes through a padded vector, so every element sees the same arithmetic.
template <typename F>
ADAPTERD_INLINE void gated_row(const float *gate, const float *up, float *y, index_t width, F f) {
    index_t i = 0;
    for (; i + LANES <= width; i += LANES) store(y + i, f(load(gate + i)) * load(up + i));
    if (i == width) return;
    float g[LANES] = {}, u[LANES] = {};
    std::memcpy(g, gate + i, (width - i) * sizeof(float));
    std::memcpy(u, up + i, (width - i) * sizeof(float));
    store(g, f(load(g)) * load(u));
    std::memcpy(y + i, g, (width - i) * sizeof(float));
}

ADAPTERD_INLINE vf silu(vf x) { return x * sigmoid(x); }

// 0.5 x (1 + tanh(u)) is x sigmoid(2u); u = sqrt(2 / pi) (x + 0.044715 x^3).
ADAPTERD_INLINE vf gelu_tanh(vf x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * (x * x * x))); }

// Vectors of a row, two chains of `take` at a time; behind the last whole one, lanes that are not there hold `none`.
template <typename F>
ADAPTERD_INLINE void each_vector(const float *x, index_t width, float none, vf &one, vf &other, F take) {
    index_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES) one = take(one, load(x + i)), other = take(other, load(x + i + LANES));
    for (; i < width; i += LANES) {
        float last[LANES];
        for (int j = 0; j < LANES; j++) last[j] = i + j < width ? x[i + j] : none;
        one = take(one, load(last));
    }
}

constexpr float NONE = -std::numeric_limits<float>::infinity();

ADAPTERD_INLINE float largest_of(const float *x, index_t width) {
    vf one = splat(NONE), other = one;
    each_vector(x, width, NONE, one, other, [](vf most, vf v) ADAPTERD_LAMBDA { return v > most ? v : most; });
    return largest(one > other ? one : other);
}

// Where the first of the values that equal `value` stands; 0 if none does.
ADAPTERD_INLINE index_t first_of(const float *x, index_t width, float value) {
    constexpr index_t LOOKED_AT = 64;  // values at once, without a jump
    index_t from = 0;
    for (; from + LOOKED_AT <= width; from += LOOKED_AT) {
        int found = 0;
        for (index_t i = 0; i < LOOKED_AT; i++) found |= x[from + i] == value;
        if (found) break;
    }
    for (index_t i = from; i < width; i++)
        if (x[i] == value) return i;
    return 0;
}

// log(sum of e^x), about the largest x. NaN or infinity anywhere gives NaN: one of them subtracts it from itself.
ADAPTERD_INLINE double log_sum(const float *x, index_t width, float most) {
    vf one = {}, other = {};
    each_vector(x, width, NONE, one, other, [=](vf total, vf v) ADAPTERD_LAMBDA { return total + exp(v - most); });
    return std::log(static_cast<double>(sum(one + other))) + most;
}

void layer_norm(const float *x, const float *weight, const float *bias, float *y, index_t rows, index_t width,
                float eps) {
    each(rows, [=](index_t r) {
        const float *from = x + r * width;
        float *to = y + r * width, mean = average(from, width);
        float scale = 1.0f / std::sqrt(squares(from, width, mean) / static_cast<float>(width) + eps);
        for (index_t i = 0; i < width; i++) to[i] = (from[i] - mean) * scale;
        if (weight)
            for (index_t i = 0; i < width; i++) to[i] *= weight[i];
        if (bias)
            for (index_t i = 0; i < width; i++) to[i] += bias[i];
    });
}

}  // namespace

void rotate(float *x, const float *cos, const float *sin, index_t half) {
    index_t j = 0;
    for (; j + LANES <= half; j += LANES) {
        vf a = load(x + j), b = load(x + half + j);
        store(x + j, a * load(cos + j) - b * load(sin + j));
        store(x + half + j, b * load(cos + half + j) + a * load(sin + half + j));
    }
    for (; j < half; j++) {
        float a = x[j], b = x[half + j];
        x[j] = fma(-b, sin[j], a * cos[j]);
        x[half + j] = fma(a, sin[half + j], b * cos[half + j]);
    }
}

// y = weight * x / sqrt(mean(x^2) + eps); x, y [rows, width].
void team_rms_norm(const float *x, const float *weight, float *y, index_t rows, index_t width, float eps) {
    each(rows, [=](index_t r) {
        const float *from = x + r * width;
        float scale = 1.0f / std::sqrt(squares(from, width, 0.0f) / static_cast<float>(width) + eps);
        for (index_t i = 0; i < width; i++) y[r * width + i] = weight[i] * (from[i] * scale);
    });
}

void team_silu_mul(const float *gate, const float *up, float *y, index_t rows, index_t width) {
    each(rows, [=](index_t r) { gated_row(gate + r * width, up + r * width, y + r * width, width, silu); });
}

void team_gelu_tanh_mul(const float *gate, const float *up, float *y, index_t rows, index_t width) {
    each(rows, [=](index_t r) { gated_row(gate + r * width, up + r * width, y + r * width, width, gelu_tanh); });
}

void change(const RowsCall &c, const Run &run, Range columns) {
    const float *own = c.vectors + run.slot * c.width;
    float *y = c.y + run.row * c.width;
    for (int r = 0; r < run.count; r++, y += c.width)
        if (c.multiply)
            for (index_t j = columns.from; j < columns.to; j++) y[j] *= own[j];
        else
            for (index_t j = columns.from; j < columns.to; j++) y[j] += own[j];
}

void team_rows(const RowsCall &c) {
    each(c.runs->count(), [&](index_t i) { change(c, c.runs->all[i], {0, c.width}); });
}

void rows_change(const RowsCall &c, Range rows, Range columns) {
    c.runs->each(rows, [&](const Run &run) { change(c, run, columns); });
}

void team_add(const float *x, float *y, index_t rows, index_t width) {
    each(rows, [=](index_t r) {
        for (index_t i = r * width; i < (r + 1) * width; i++) y[i] += x[i];
    });
}

}  // namespace adapterd

ADAPTERD_EXPORT void adapterd_rms_norm(const float *x, const float *weight, float *y, std::int64_t rows,
                                       std::int64_t width, float eps) {
    using namespace adapterd;
    in_team(rows * width > PARALLEL_ELEMENTS, [&] { team_rms_norm(x, weight, y, rows, width, eps); });
}

// y = weight * (x - mean) / sqrt(var + eps) + bias; weight and bias may be null.
ADAPTERD_EXPORT void adapterd_layer_norm(const float *x, const float *weight, const float *bias, float *y,
                                         std::int64_t rows, std::int64_t width, float eps) {
    using namespace adapterd;
    in_team(rows * width > PARALLEL_ELEMENTS, [&] { layer_norm(x, weight, bias, y, rows, width, eps); });
}

// best[r] = where the first of the largest x[r][i] stands, sums[r] = log(sum over i of e^x[r][i]); x [rows, width].
ADAPTERD_EXPORT void adapterd_peaks(const float *x, std::int64_t *best, double *sums, std::int64_t rows, std::int64_t width) {
    using namespace adapterd;
    in_team(rows * width > PARALLEL_ELEMENTS, [&] {
        each(rows, [=](index_t r) {
            const float *from = x + r * width, most = largest_of(from, width);
            best[r] = first_of(from, width, most);
            sums[r] = log_sum(from, width, most);
        });
    });
}

// y = silu(gate) * up, all [rows, width].
ADAPTERD_EXPORT void adapterd_silu_mul(const float *gate, const float *up, float *y, std::int64_t rows,
                                       std::int64_t width) {
    using namespace adapterd;
    in_team(rows * width > PARALLEL_ELEMENTS, [&] { team_silu_mul(gate, up, y, rows, width); });
}

// y = gelu_tanh(gate) * up, all [rows, width].
ADAPTERD_EXPORT void adapterd_gelu_tanh_mul(const float *gate, const float *up, float *y, std::int64_t rows,
                                            std::int64_t width) {
    using namespace adapterd;
    in_team(rows * width > PARALLEL_ELEMENTS, [&] { team_gelu_tanh_mul(gate, up, y, rows, width); });
}

// x [heads, tokens, >= dim] by strides (floats), in place on its first `dim` features; cos, sin [tokens, dim].
// x = x * cos + concat(-x[dim / 2:], x[:dim / 2]) * sin
ADAPTERD_EXPORT void adapterd_rotary(float *x, std::int64_t head_stride, std::int64_t token_stride, const float *cos,
                                     const float *sin, std::int64_t heads, std::int64_t tokens, std::int64_t dim) {
    using namespace adapterd;
    in_team(tokens * heads * dim > PARALLEL_ELEMENTS, [&] {
        each(tokens, [=](index_t t) {
            for (index_t h = 0; h < heads; h++)
                rotate(x + h * head_stride + t * token_stride, cos + t * dim, sin + t * dim, dim / 2);
        });
    });
}
