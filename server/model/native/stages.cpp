// Which instructions of a program are computed together. A stage is a run of linears with the same x and whatever adapters do
// right behind each of them: their A x comes first, then every panel and what is done to its columns, while they are in the
// cache. Between two stages all threads wait for each other, within one they do so once, if there are adapters.
//
// An element of the output sees the same operations in the same order as if every instruction ran alone.
#include <algorithm>

#include "program.h"

namespace adapterd {
namespace {

bool disjoint(const std::vector<AdaptedRows> &some, const std::vector<AdaptedRows> &others) {
    for (const AdaptedRows &a : some)
        for (const AdaptedRows &b : others)
            if (a.from < b.to && b.from < a.to) return false;
    return true;
}

// The rows an adapter acts on: index, slot and their number, from word `first` on.
std::shared_ptr<Runs> runs_of(const Instruction &i, int first, Tiling tiling) {
    return find_runs(at<std::int64_t>(i[first]), at<std::int64_t>(i[first + 1]), i[first + 2], tiling);
}

bool is_rows(const Instruction &i) { return i.kind() == ADD_ROWS || i.kind() == MUL_ROWS; }

// The rows of a step before those that a LoRA takes through the matrix unit.
index_t vector_rows(const Instruction &lora) { return std::min<index_t>(prompt_of(lora), lora.frame->tokens); }

}  // namespace

Stages::Stages(const std::int64_t *program, index_t count, const Frame &frame, std::vector<Ready> &ready)
    : program_(program), frame_(frame), ready_(ready) {
    linears_.reserve(count), behind_.reserve(count), stages_.reserve(count);  // what points into them stays valid
    for (index_t i = 0; i < count; i++) take(i);
    give_space();
}

void Stages::take(index_t i) {
    Instruction own = at(i);
    Ready &ready = ready_[i];
    if (own.kind() == LINEAR) {
        ready.within = open_ && joins(own);
        if (!ready.within) open(ready);
        return add(i);
    }
    ready.within = open_ && (own.kind() == LORA ? attach_lora(i) : attach_rows(i));
    if (ready.within) return;
    open_ = false, lows_ = 0;
    if (own.kind() == LORA) ready.runs = runs_of(own, 5, {vector_rows(own), 1});
    if (own.kind() == LORA) take_space(i, own[7] * own[11]);
    if (is_rows(own)) ready.runs = runs_of(own, 2, {frame_.tokens, 1});
    if (own.kind() == BOTTLENECK) take_space(i, own[8] * own[11]);
}

void Stages::open(Ready &ready) {
    stages_.push_back({linears_.data() + linears_.size(), 0});
    ready.stage = &stages_.back();
    open_ = true, lows_ = 0;
}

// Whether a linear belongs to the open stage: nothing in it writes what this one reads or writes.
bool Stages::joins(const Instruction &i) const {
    const Linear &last = linears_.back();
    if (i.rows(1) != last.x || i[6] != last.k || i[0] != last.form || i.rows(4) == last.x) return false;
    const Stage &stage = stages_.back();
    return std::none_of(stage.linears, stage.linears + stage.count, [&](const Linear &l) { return l.y == i.rows(4); });
}

void Stages::add(index_t at) {
    Instruction i = this->at(at);
    if (i[0] == TILES && frame_.prompt < frame_.tokens) pieces_ = std::max(pieces_, tiles_space(i[6]));
    Linear linear{};
    linear.form = static_cast<int>(i[0]);
    linear.x = i.rows(1), linear.panels = adapterd::at<void>(i[2]), linear.bias = adapterd::at<float>(i[3]), linear.y = i.rows(4);
    linear.m = frame_.tokens, linear.n = i[5], linear.k = i[6], linear.prompt = frame_.prompt;
    linear.behind = behind_.data() + behind_.size();
    linear.blocks = blocks_of(linear);
    linears_.push_back(linear);
    stages_.back().count++;
    at_ = at;
}

// The prompts' rows go to the linear itself, which has their x in pieces and their y in registers. The sums are the same; with a
// bias in between they would not be.
bool Stages::attach_lora(index_t at) {
    Instruction i = this->at(at);
    Ready &ready = ready_[at], &linears = ready_[at_];
    Linear &linear = linears_.back();
    if (i.rows(1) != linear.x || i.rows(2) != linear.y || vector_rows(i) != linear.vector_rows()) return false;
    if (!ready.adapted.empty()) {
        if (linear.form != TILES || linear.bias || !disjoint(ready.adapted, linears.adapted)) return false;
        linears.adapted.insert(linears.adapted.end(), ready.adapted.begin(), ready.adapted.end());
        std::sort(linears.adapted.begin(), linears.adapted.end(), [](const auto &a, const auto &b) { return a.from < b.from; });
        linear.adapted = &linears.adapted;
    }
    ready.runs = runs_of(i, 5, linear.tiling());
    if (!ready.runs->count()) return true;
    take_space(at, i[7] * i[11]);
    push({Behind::LORA, lora_call(i, ready), {}}, &ready);
    return true;
}

bool Stages::attach_rows(index_t at) {
    Instruction i = this->at(at);
    const Linear &linear = linears_.back();
    if (!is_rows(i) || i.rows(0) != linear.y || i[6] != linear.n || linear.vector_rows() != linear.m) return false;
    ready_[at].runs = runs_of(i, 2, linear.tiling());
    push({Behind::ROWS, {}, rows_call(i, ready_[at])}, nullptr);
    return true;
}

void Stages::push(const Behind &behind, const Ready *of) {
    behind_.push_back(behind);
    of_.push_back(of);
    linears_.back().behinds++;
}

// The A x of a stage's adapters lie one behind the other.
void Stages::take_space(index_t i, index_t floats) {
    offsets_.push_back({i, lows_});
    lows_ += floats;
    most_ = std::max(most_, lows_);
}

void Stages::give_space() {
    static thread_local Scratch pieces, lows;
    auto *halves = pieces.of<std::uint16_t>(pieces_);
    float *low = lows.floats(most_ + 1);
    for (Linear &linear : linears_) linear.space = halves;
    for (auto [i, offset] : offsets_) ready_[i].low = low + offset;
    for (std::size_t b = 0; b < behind_.size(); b++)
        if (of_[b]) behind_[b].lora.low = of_[b]->low;
}

}  // namespace adapterd
