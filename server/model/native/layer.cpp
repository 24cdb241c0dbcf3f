// A decoder layer as one call: a program of kernels that one team of threads runs through, with nothing in between.
// Owns the checks that a program needs before it starts, and which kernel an instruction is.
// Knows no model: what a layer is made of, and where its tensors lie, was decided when the program was written.
//
// A call per kernel costs a trip through Python and the start of a team each; with some five hundred kernels in a step
// that is more than the kernels of a small step themselves.
#include "program.h"

namespace adapterd {
namespace {

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

// The rows an adapter acts on: index, slot, their number and the number of slots, from word `first` on.
int rows_rule(const Instruction &i, int first) {
    if (!all_within(at<std::int64_t>(i[first]), i[first + 2], i.frame->tokens)) return 1000 * LORA + 1;
    if (!all_within(at<std::int64_t>(i[first + 1]), i[first + 2], i[first + 3])) return 1000 * LORA + 2;
    return 0;
}

// 0, or 1000 * kind + the number of the rule that is broken.
int prepare(const Instruction &i, Ready &ready) {
    index_t tokens = i.frame->tokens;
    if (i.kind() == LORA) {
        if (int rule = rows_rule(i, 5)) return rule;
        if (prompt_of(i) < tokens) ready.adapted = adapted_rows(lora_pools(i), prompt_of(i));
    }
    if (i.kind() == BOTTLENECK) {
        if (int rule = rows_rule(i, 6)) return rule;
        ready.runs = find_runs(at<std::int64_t>(i[6]), at<std::int64_t>(i[7]), i[8], {tokens, 1});
        ready.between = {static_cast<int>(i[0]), at<float>(i[3]), at<float>(i[5])};
    }
    if (i.kind() == ADD_ROWS || i.kind() == MUL_ROWS) return rows_rule(i, 2);
    if (i.kind() == WRITE && !all_within(at<std::int64_t>(i.frame->write), tokens, i[5] * i[6])) return 1000 * WRITE + 1;
    if (i.kind() == ATTEND) {
        AttentionCall call = attention_call(i);
        if (int rule = attention_rule(call)) return static_cast<int>(1000 * ATTEND + rule);
        ready.plan = attention_plan(call);
    }
    return 0;
}

// A LoRA's rows, but for those that a linear before it has done.
void lora(const Instruction &i, const Ready &ready) {
    if (ready.runs->count()) team_lora(lora_call(i, ready));
    if (!ready.adapted.empty()) team_lora_tiles(ready.adapted, i.rows(1), i.rows(2), i[9], i[10]);
}

void run(const Instruction &i, const Ready &ready, const Stages &stages) {
    index_t tokens = i.frame->tokens;
    if (ready.within) return;
    switch (i.kind()) {
        case NORM: return team_rms_norm(i.rows(0), at<float>(i[2]), i.rows(1), tokens, i[3], number(i[4]));
        case LINEAR: return team_linears(*ready.stage, stages.after(ready.stage));
        case LORA: return lora(i, ready);
        case WRITE: return team_write(new_keys(i));
        case ATTEND: return team_attention(attention_call(i), *ready.plan);
        case ADD: return team_add(i.rows(0), i.rows(1), tokens, i[2]);
        case SILU_MUL: return team_silu_mul(i.rows(0), i.rows(1), i.rows(2), tokens, i[3]);
        case ADD_ROWS:
        case MUL_ROWS: return team_rows(rows_call(i, ready));
        case BOTTLENECK: return team_lora(bottleneck_call(i, ready));
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
    for (index_t i = 0; i < count; i++) {
        Instruction instruction{program + i * WORDS, &frame};
        if (instruction.kind() < NORM || instruction.kind() > BOTTLENECK) return -1;
        if (int rule = prepare(instruction, ready[i])) return rule;
    }
    Stages stages(program, count, frame, ready);
    in_team(true, [&] {
        for (index_t i = 0; i < count; i++) run(Instruction{program + i * WORDS, &frame}, ready[i], stages);
    });
    return 0;
}
