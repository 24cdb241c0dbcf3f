// A layer's program: instructions in words (those of `opcodes.py`), what changes from step to step, and what an instruction
// needs to know before it runs. Owns the encoding; runs nothing.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace adapterd {

constexpr int WORDS = 16;

// In the order of opcodes.py.
enum Kind : std::int64_t { NORM, LINEAR, LORA, WRITE, ATTEND, ADD, SILU_MUL, GELU_TANH_MUL, ADD_ROWS, MUL_ROWS, BOTTLENECK };

// What changes from step to step; every pointer as an integer, like the words of an instruction.
struct Frame {
    std::int64_t hidden, cos, sin, turned, write, tables, table_width, cu, ctx, rows, tokens, prompt;
};

template <typename T>
T *at(std::int64_t word) {
    return reinterpret_cast<T *>(word);
}

inline float number(std::int64_t word) {
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

// What must be known before the team starts, one entry per instruction.
struct Ready {
    std::shared_ptr<Runs> runs;
    std::vector<AdaptedRows> adapted;  // rows of prompts: a LoRA's own, and of a linear those of the LoRA behind it
    std::shared_ptr<AttentionPlan> plan;
    Bend between{};
    float *low = nullptr;
    const Stage *stage = nullptr;  // of the linear that begins one
    bool within = false;           // a stage that began before does it
};

inline LoraPools lora_pools(const Instruction &i) {
    auto *a = at<std::uint16_t>(i[3]), *b = at<std::uint16_t>(i[4]);
    return {a, b, at<std::int64_t>(i[5]), at<std::int64_t>(i[6]), i[7], i[9], i[10], i[11]};
}

// Where the rows begin that a LoRA's pools and this processor can take through the matrix unit.
inline std::int64_t prompt_of(const Instruction &i) { return i[0] && tiles_usable() ? i[12] : i.frame->tokens; }

inline LoraCall lora_call(const Instruction &i, const Ready &ready) {
    void *a = at<void>(i[3]), *b = at<void>(i[4]);
    return {i[0] != 0, i.rows(1), i.rows(2), a, b, ready.runs.get(), i[9], i[10], i[11], ready.low, nullptr};
}

// A bottleneck whose input is the output it adds to.
inline LoraCall bottleneck_call(const Instruction &i, const Ready &ready) {
    float *y = i.rows(1);
    return {false, y, y, at<void>(i[2]), at<void>(i[4]), ready.runs.get(), i[10], i[10], i[11], ready.low, &ready.between};
}

inline RowsCall rows_call(const Instruction &i, const Ready &ready) {
    return {i.rows(0), at<float>(i[1]), ready.runs.get(), i[6], i.kind() == MUL_ROWS};
}

// The linears of a program in stages: neighbours with the same x are computed together, with what adapters do right behind
// them. Owns the calls that stages are made of, and with them the team's space.
class Stages {
  public:
    // Says in `ready` which instructions are parts of a stage, and gives all others what they need.
    Stages(const std::int64_t *program, index_t count, const Frame &frame, std::vector<Ready> &ready);
    // The one that follows, or null.
    const Stage *after(const Stage *stage) const { return stage == &stages_.back() ? nullptr : stage + 1; }

  private:
    void take(index_t i);
    void open(Ready &ready);
    bool joins(const Instruction &i) const;
    void add(index_t i);
    bool attach_lora(index_t i);
    bool attach_rows(index_t i);
    void push(const Behind &behind, const Ready *of);
    void take_space(index_t i, index_t floats);
    void give_space();
    Instruction at(index_t i) const { return {program_ + i * WORDS, &frame_}; }

    const std::int64_t *program_;
    const Frame &frame_;
    std::vector<Ready> &ready_;
    std::vector<Linear> linears_;
    std::vector<Behind> behind_;
    std::vector<const Ready *> of_;  // whose space an entry of `behind_` has
    std::vector<Stage> stages_;
    std::vector<std::pair<index_t, index_t>> offsets_;  // instructions, and where their A x begins
    bool open_ = false;
    index_t at_ = 0;  // the open stage's last linear
    index_t pieces_ = 0, lows_ = 0, most_ = 0;
};

}  // namespace adapterd
