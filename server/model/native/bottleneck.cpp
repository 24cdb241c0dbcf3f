// What a bottleneck adapter does between LoRA's two products: low = act(low + bias), and a bias behind the second one.
// Owns the activations; the products and their blocking are those of lora.cpp.
//
// Every element goes through the same vector code, so that its bits do not depend on its place: torch's activations round
// differently in the tail of a tensor, and where the tail starts depends on how many rows share the step.
#include <cstring>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

// The order of ACTIVATIONS in prepared.py.
enum Activation {
    LINEAR,
    RELU,
    RELU2,
    RELU6,
    LEAKY_RELU,
    SIGMOID,
    SILU,
    QUICK_GELU,
    TANH,
    GELU_TANH,
    GELU,
    GELU_10,
    HARDSWISH,
    LAPLACE,
    MISH,
    ACTIVATION_COUNT
};

// NaN fails every comparison and has to come through: it is always the branch that keeps x.
ADAPTERD_INLINE vf at_least(vf x, float low) { return x < low ? splat(low) : x; }
ADAPTERD_INLINE vf at_most(vf x, float high) { return x > high ? splat(high) : x; }

// Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most.
ADAPTERD_INLINE vf erf(vf x) {
    vf size = x < 0.0f ? -x : x;
    vf t = 1.0f / (1.0f + 0.3275911f * size);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf positive = 1.0f - p * t * exp(-(size * size));
    return x < 0.0f ? -positive : positive;
}

ADAPTERD_INLINE vf gelu(vf x) { return 0.5f * x * (1.0f + erf(x * 0.70710678f)); }

// x tanh(log(1 + e^x)), without the logarithm: tanh(log(u)) = (u^2 - 1) / (u^2 + 1).
ADAPTERD_INLINE vf mish(vf x) {
    vf e = exp(x < 20.0f ? x : splat(20.0f));
    vf n = e * (e + 2.0f);
    return x * (n / (n + 2.0f));
}

template <typename F>
ADAPTERD_INLINE void bend_each(const Bend &b, float *low, index_t rows, index_t rank, index_t slot, F f) {
    const float *bias = b.low_bias + slot * rank;
    for (index_t r = 0; r < rows; r++, low += rank)
        for (index_t j = 0; j < rank; j += LANES) {
            // Whole vectors and the last few elements by one piece of code: two might be contracted differently.
            std::size_t size = (rank - j < LANES ? rank - j : LANES) * sizeof(float);
            float part[LANES] = {}, shift[LANES] = {};
            std::memcpy(part, low + j, size);
            std::memcpy(shift, bias + j, size);
            store(part, f(load(part) + load(shift)));
            std::memcpy(low + j, part, size);
        }
}

}  // namespace

void bend(const Bend &b, float *low, index_t rows, index_t rank, index_t slot) {
    auto with = [&](auto f) { bend_each(b, low, rows, rank, slot, f); };
    switch (b.activation) {
        case RELU: return with([](vf x) { return at_least(x, 0.0f); });
        case RELU2: return with([](vf x) { return at_least(x, 0.0f) * at_least(x, 0.0f); });
        case RELU6: return with([](vf x) { return at_most(at_least(x, 0.0f), 6.0f); });
        case LEAKY_RELU: return with([](vf x) { return x < 0.0f ? 0.01f * x : x; });
        case SIGMOID: return with([](vf x) { return sigmoid(x); });
        case SILU: return with([](vf x) { return x * sigmoid(x); });
        case QUICK_GELU: return with([](vf x) { return x * sigmoid(1.702f * x); });
        case TANH: return with([](vf x) { return tanh(x); });
        case GELU_TANH: return with([](vf x) { return x * sigmoid(1.5957691216f * (x + 0.044715f * (x * x * x))); });
        case GELU: return with([](vf x) { return gelu(x); });
        case GELU_10: return with([](vf x) { return at_most(at_least(gelu(x), -10.0f), 10.0f); });
        case HARDSWISH: return with([](vf x) { return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) / 6.0f; });
        case LAPLACE: return with([](vf x) { return 0.5f * (1.0f + erf((x - 0.707107f) * 2.5066266f)); });
        case MISH: return with([](vf x) { return mish(x); });
        default: return with([](vf x) { return x; });
    }
}

}  // namespace adapterd

// y[index[i]] += act(x[index[i]] down[slot[i]]^T + low_bias[slot[i]]) up[slot[i]] + out_bias[slot[i]]; x and y may be the
// same. x, y [tokens, width], down and up [slots, rank, width], low_bias [slots, rank], out_bias [slots, width].
// Returns 0, or 1 when an index, 2 when a slot and 3 when the activation is out of range (y is untouched then).
ADAPTERD_EXPORT int adapterd_bottleneck(int activation, const float *x, float *y, const float *down,
                                        const float *low_bias, const float *up, const float *out_bias,
                                        const std::int64_t *index, const std::int64_t *slot, std::int64_t n,
                                        std::int64_t tokens, std::int64_t slots, std::int64_t width, std::int64_t rank) {
    using namespace adapterd;
    if (!all_within(index, n, tokens)) return 1;
    if (!all_within(slot, n, slots)) return 2;
    if (activation < 0 || activation >= ACTIVATION_COUNT) return 3;
    static thread_local Scratch scratch;
    float *low = scratch.floats(n * rank + 1);
    std::shared_ptr<Runs> runs = find_runs(index, slot, n, {tokens, 1});
    Bend between{activation, low_bias, out_bias};
    LoraCall call{false, x, y, down, up, runs.get(), width, width, rank, low, &between};
    in_team(2 * n * rank * width > PARALLEL_WORK, [&] { team_lora(call); });
    return 0;
}
