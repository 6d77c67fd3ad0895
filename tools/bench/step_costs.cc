#include "tools/bench/step_costs.h"

#include <algorithm>

#include "tools/machine.h"

namespace chimera {
namespace {

constexpr int kMostRows = 64, kRowsContext = 32, kOpsContext = 128, kPrefill = 512;
constexpr int kMostContext = 2048;
constexpr int kSteps = 5;  // for each figure and round; the median counts

// What the model was trained for is its texts' concern; passes take as long behind it.
SessionOptions options_for(const LlamaConfig& config) {
  return {.context = std::clamp(config.max_context, kOpsContext, kMostContext) + kMostRows + 16,
          .max_nodes = kMostRows - 1};
}

}  // namespace

StepCosts::StepCosts(const Llama& model, TimedBackend* backend, int threads)
    : backend_(backend), threads_(threads), session_(model, options_for(model.config())) {
  const int vocab = model.config().vocab_size;
  const int longest = session_.options().context - kMostRows - 16;
  for (int i = 0; i < longest; ++i)
    text_.push_back(static_cast<int32_t>(int64_t{i} * 7919 % vocab));
  for (const int rows : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64})
    by_rows_.push_back({rows, {}, {}});
  for (const int context : {32, 256, 512, 1024, 2048})
    if (context <= longest) by_context_.push_back({context, {}, {}});
  prefill_tokens_ = std::min(kPrefill, longest);
  session_.start(0, text_, {});
  while (session_.step(nullptr) && session_.emitted(0) == 0) {
  }
}

// A step over a root and a binary tree of candidates below it, after `context` committed tokens.
double StepCosts::step_seconds(int context, int rows) {
  std::vector<double> seconds;
  for (int i = 0; i < kSteps; ++i) {
    const auto begin = Clock::now();
    Step& step = session_.edit_step();
    step.clear();
    step.sequences[0].committed = context;
    step.begin_sequence(0);
    step.set_root(step.add_row(1, -1, true));
    for (int node = 1; node < rows; ++node) step.add_row(node % 2, (node - 1) / 2, true);
    if (backend_->timing()) {
      session_.forward();
      session_.accept_and_keep();
    } else {
      session_.pass();
    }
    seconds.push_back(seconds_since(begin));
  }
  std::nth_element(seconds.begin(), seconds.begin() + kSteps / 2, seconds.end());
  return seconds[kSteps / 2];
}

void StepCosts::measure_round() {
  for (auto* points : {&by_rows_, &by_context_})
    for (Point& p : *points) {
      const bool rows = points == &by_rows_;
      p.seconds.add(step_seconds(rows ? kRowsContext : p.at, rows ? p.at : 1));
      p.ratio.add(p.seconds.last() / points->front().seconds.last());
    }

  const auto begin = Clock::now();
  session_.start(0, std::span(text_).first(static_cast<size_t>(prefill_tokens_)), {});
  while (session_.step(nullptr) && session_.emitted(0) == 0) {
  }
  prefill_.add(prefill_tokens_ / seconds_since(begin));

  time_ops();

  if (backend_->name() != "cpu") return;
  int meetings = 0;
  for (const Op& op : by_op_) {
    if (op.part != TimedBackend::Part::kRest) meetings += op.calls;
    if (op.part == TimedBackend::Part::kAttention) meetings += op.calls;  // before RoPE as well
  }
  waiting_.add(meetings * meeting_seconds(threads_) / by_rows_.front().seconds.last());
}

std::span<const int> StepCosts::op_rows() {
  static constexpr int kRows[] = {1, 4, 16, 64};
  return kRows;
}

void StepCosts::time_ops() {
  for (size_t i = 0; i < op_rows().size(); ++i) {
    backend_->start();
    step_seconds(std::min(kOpsContext, static_cast<int>(text_.size())), op_rows()[i]);
    for (const TimedBackend::Op& op : backend_->stop()) {
      auto known = std::find_if(by_op_.begin(), by_op_.end(),
                                [&](const Op& o) { return o.name == op.name; });
      if (known == by_op_.end())
        known =
            by_op_.insert(known, {op.name, op.part, static_cast<int>(op.calls / kSteps),
                                  op.weight_bytes / kSteps, std::vector<Series>(op_rows().size())});
      known->seconds[i].add(op.seconds / kSteps);
    }
  }
}

}  // namespace chimera
