// A decoder layer as one call: a program of kernels that one team of threads runs through, with nothing in between.
// Owns the instructions' encoding (the words of `opcodes.py`) and the checks that a program needs before it starts.
// Knows no model: what a layer is made of, and where its tensors lie, was decided when the program was written.
//
// A call per kernel costs a trip through Python and the start of a team each; with some five hundred kernels in a step
// that is more than the kernels of a small step themselves.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "simd.h"
#include "team.h"

namespace adapterd {
namespace {

constexpr int WORDS = 16;

enum Kind : std::int64_t { NORM, LINEAR, LORA, WRITE, ATTEND, ADD, SILU_MUL, GELU_TANH_MUL, ADD_ROWS, MUL_ROWS, BOTTLENECK };

// What changes from step to step; every pointer as an integer, like the words of an instruction.
struct Frame {
    std::int64_t hidden, cos, sin, turned, write, tables, table_width, cu, ctx, rows, tokens, prompt;
};

template <typename T>
T *at(std::int64_t word) {
    return reinterpret_cast<T *>(word);
}

float number(std::int64_t word) {
    double value;
    std::memcpy(&value, &word, sizeof value);
    return static_cast<float>(value);
}

struct Instruction {
    const std::int64_t *words;
    const Frame *frame;

    std::int64_t kind() const { return words[0]; }
    std::int64_t operator[](int i) const { return words[i + 1]; }
    // A tensor of the step, 0 being the hidden states that run through all layers.
    float *rows(int i) const { return at<float>((*this)[i] ? (*this)[i] : frame->hidden); }
};

NewKeys new_keys(const Instruction &i) {
    const Frame &f = *i.frame;
    return {i.rows(0),          i.rows(1),    i.rows(2), at<float>(f.cos), at<float>(f.sin), f.turned, at<float>(i[3]),
            at<float>(i[4]), at<std::int64_t>(f.write), i[6], f.tokens, i[7], i[8], i[9]};
}

AttentionCall attention_call(const Instruction &i) {
    const Frame &f = *i.frame;
    std::int64_t heads = i[6], dim = i[5];
    return {i.rows(0), heads * dim,   dim,           at<float>(i[1]),          at<float>(i[2]),          i[3],
            i[4],      i[7],          dim,           at<std::int32_t>(f.tables), f.table_width,          at<std::int32_t>(f.cu),
            at<std::int32_t>(f.ctx), f.rows, f.tokens, heads, number(i[8]), i[9], number(i[10]), i.rows(11)};
}

// What must be known before the team starts, one entry per instruction.
struct Ready {
    std::shared_ptr<LoraGroups> groups;
    std::vector<AdaptedRows> adapted;  // rows of prompts: a LoRA's own, and of a linear those of the LoRA behind it
    std::shared_ptr<AttentionPlan> plan;
    index_t space = 0;
};

// The rows an adapter acts on: index, slot, their number and the number of slots, from word `first` on.
int rows_rule(const Instruction &i, int first) {
    if (!all_within(at<std::int64_t>(i[first]), i[first + 2], i.frame->tokens)) return 1000 * LORA + 1;
    if (!all_within(at<std::int64_t>(i[first + 1]), i[first + 2], i[first + 3])) return 1000 * LORA + 2;
    return 0;
}

// 0, or 1000 * kind + the number of the rule that is broken.
int prepare(const Instruction &i, Ready &ready) {
    if (i.kind() == LINEAR && i[0] == TILES) ready.space = tiles_space(i[6]);
    if (i.kind() == LORA) {
        if (int rule = rows_rule(i, 5)) return rule;
        std::int64_t prompt = i[0] && tiles_usable() ? i[13] : i.frame->tokens;
        auto *index = at<std::int64_t>(i[5]), *slot = at<std::int64_t>(i[6]);
        ready.groups = lora_groups(index, slot, i[7], prompt);
        LoraPools pools{at<std::uint16_t>(i[3]), at<std::uint16_t>(i[4]), index, slot, i[7], i[9], i[10], i[11]};
        if (prompt < i.frame->tokens) ready.adapted = adapted_rows(pools, prompt);
    }
    if (i.kind() == BOTTLENECK) {
        if (int rule = rows_rule(i, 6)) return rule;
        ready.groups = lora_groups(at<std::int64_t>(i[6]), at<std::int64_t>(i[7]), i[8], i.frame->tokens);
    }
    if (i.kind() == ADD_ROWS || i.kind() == MUL_ROWS) return rows_rule(i, 2);
    if (i.kind() == WRITE && !all_within(at<std::int64_t>(i.frame->write), i.frame->tokens, i[5] * i[6])) return 1000 * WRITE + 1;
    if (i.kind() == ATTEND) {
        AttentionCall call = attention_call(i);
        if (int rule = attention_rule(call)) return static_cast<int>(1000 * ATTEND + rule);
        ready.plan = attention_plan(call);
    }
    return 0;
}

bool disjoint(const std::vector<AdaptedRows> &some, const std::vector<AdaptedRows> &others) {
    for (const AdaptedRows &a : some)
        for (const AdaptedRows &b : others)
            if (a.from < b.to && b.from < a.to) return false;
    return true;
}

// Hands the prompts' rows of LoRA instructions to the linear right before them, which has their x in pieces and their y in
// registers. The sums are the same; with a bias in between they would not be.
void hand_over(const Instruction &lora, Ready &own, const Instruction &linear, Ready &linears) {
    bool same = lora[1] == linear[1] && lora[2] == linear[4] && lora[13] == lora.frame->prompt;
    if (!same || linear[0] != TILES || linear[3] || !disjoint(own.adapted, linears.adapted)) return;
    linears.adapted.insert(linears.adapted.end(), own.adapted.begin(), own.adapted.end());
    std::sort(linears.adapted.begin(), linears.adapted.end(), [](const auto &a, const auto &b) { return a.from < b.from; });
    own.adapted.clear();
}

// A LoRA's rows, but for those that the linear before it has done.
void lora(const Instruction &i, const Ready &ready) {
    auto *index = at<std::int64_t>(i[5]);
    if (rows_of(*ready.groups))
        team_lora(i[0] != 0, i.rows(1), i.rows(2), at<void>(i[3]), at<void>(i[4]), index, *ready.groups, i[9], i[10], i[11],
                  at<float>(i[12]));
    if (!ready.adapted.empty()) team_lora_tiles(ready.adapted, i.rows(1), i.rows(2), i[9], i[10]);
}

// A bottleneck whose input is the output it adds to.
void bottleneck(const Instruction &i, const LoraGroups &groups) {
    Bend between{static_cast<int>(i[0]), at<float>(i[3]), at<float>(i[5])};
    team_lora(false, i.rows(1), i.rows(1), at<void>(i[2]), at<void>(i[4]), at<std::int64_t>(i[6]), groups, i[10], i[10], i[11],
              at<float>(i[12]), &between);
}

void run(const Instruction &i, const Ready &ready, std::uint16_t *space) {
    index_t tokens = i.frame->tokens;
    switch (i.kind()) {
        case NORM: return team_rms_norm(i.rows(0), at<float>(i[2]), i.rows(1), tokens, i[3], number(i[4]));
        case LINEAR:
            return team_linear(static_cast<int>(i[0]), i.rows(1), at<void>(i[2]), at<float>(i[3]), i.rows(4), tokens, i[5], i[6],
                               i.frame->prompt, space, ready.adapted.empty() ? nullptr : &ready.adapted);
        case LORA: return lora(i, ready);
        case WRITE: return team_write(new_keys(i));
        case ATTEND: return team_attention(attention_call(i), *ready.plan);
        case ADD: return team_add(i.rows(0), i.rows(1), tokens, i[2]);
        case SILU_MUL: return team_silu_mul(i.rows(0), i.rows(1), i.rows(2), tokens, i[3]);
        case ADD_ROWS:
            return team_add_rows(i.rows(0), at<float>(i[1]), at<std::int64_t>(i[2]), at<std::int64_t>(i[3]), i[4], i[6]);
        case MUL_ROWS:
            return team_mul_rows(i.rows(0), at<float>(i[1]), at<std::int64_t>(i[2]), at<std::int64_t>(i[3]), i[4], i[6]);
        case BOTTLENECK: return bottleneck(i, *ready.groups);
        case GELU_TANH_MUL: return team_gelu_tanh_mul(i.rows(0), i.rows(1), i.rows(2), tokens, i[3]);
    }
}

}  // namespace
}  // namespace adapterd

// program [count][16] words, frame [12] words. Returns 0, or 1000 * kind + rule where an index is out of range
// (nothing has run then), or -1 for an unknown instruction.
ADAPTERD_EXPORT int adapterd_layer(const std::int64_t *program, std::int64_t count, const std::int64_t *frame_words) {
    using namespace adapterd;
    Frame frame;
    std::memcpy(&frame, frame_words, sizeof frame);
    std::vector<Ready> ready(count);
    index_t space = 0, linear = -1;
    for (index_t i = 0; i < count; i++) {
        Instruction instruction{program + i * WORDS, &frame};
        if (instruction.kind() < NORM || instruction.kind() > BOTTLENECK) return -1;
        if (int rule = prepare(instruction, ready[i])) return rule;
        space = std::max(space, ready[i].space);
        if (instruction.kind() != LORA)
            linear = instruction.kind() == LINEAR ? i : -1;
        else if (linear >= 0 && !ready[i].adapted.empty())
            hand_over(instruction, ready[i], Instruction{program + linear * WORDS, &frame}, ready[linear]);
    }
    static thread_local Scratch scratch;
    auto *halves = scratch.of<std::uint16_t>(space);
    in_team(true, [&] {
        for (index_t i = 0; i < count; i++) run(Instruction{program + i * WORDS, &frame}, ready[i], halves);
    });
    return 0;
}
