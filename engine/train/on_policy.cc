#include "engine/train/on_policy.h"

#include <algorithm>

#include "engine/candidate_tree.h"

namespace chimera::training {
namespace {
constexpr int kTextRows = 64;                         // of the text in a pass
constexpr int kGuesses = Step::kMaxRows - kTextRows;  // beside them
}  // namespace

OnPolicyFeatures::OnPolicyFeatures(const Llama& target, int context, int nodes, int depth)
    : options_{.nodes = nodes, .depth = depth, .ngrams = false},
      pass_(target, context, Step::kMaxRows),
      kept_(std::make_unique<Step>()) {}

void OnPolicyFeatures::use(const DraftTensors& draft) {
  drafter_ = make_chimera_drafter(pass_.session.model(), draft, options_, 1,
                                  pass_.session.options().context);
}

TrainingText OnPolicyFeatures::read(std::span<const int32_t> tokens, int64_t first_start) {
  TrainingText text = pass_.start(tokens, first_start);
  ++texts_read_;
  Step& step = pass_.session.edit_step();
  const int64_t d = pass_.session.model().config().hidden_size;
  // Everything before `root` has been gone through.
  for (int64_t root = 0; root < text.n_positions();) {
    const int64_t first = root, end = std::min(first + kTextRows, text.n_positions());
    pass_.add_text(text, first, end);
    pass_.run();
    guesses_.clear();
    while (root < end) {
      const bool is_prompt = root <= first_start;
      int n_kept = static_cast<int>(std::min(end, first_start + 1) - root);
      if (!is_prompt) {
        const bool all_there = root + options_.depth < end || end == text.n_positions();
        if (!all_there || guesses_.size() + static_cast<size_t>(options_.nodes) > kGuesses) break;
        const auto until_root = static_cast<size_t>(root + 1);
        n_kept = verify(
            drafter_->candidates({pass_.session.model().backend(), 0, texts_read_,
                                  tokens.first(until_root), /*root=*/0, options_.nodes,
                                  pass_.session.options().context - static_cast<int>(until_root),
                                  /*cost=*/nullptr, Sampling{}}),
            root, text);
      }
      observe(text, first, root, n_kept);
      root += n_kept;
    }
    text.states.insert(text.states.end(), pass_.states(), pass_.states() + (root - first) * d);
    for (int64_t at = std::max(first, first_start + 1); at < root; ++at)
      text.targets.push_back(pass_.likely()[step.logits_index[at - first]]);
    if (!guesses_.empty()) {
      pass_.add_text(text, first, end, /*wants_logits=*/false);  // over the same slots
      for (const Guess& g : guesses_)
        step.add_row(g.token,
                     g.parent < 0 ? static_cast<int>(g.left_at - first)
                                  : static_cast<int>(end - first) + g.parent,
                     true);
      pass_.run();
      add_branches(pass_.likely(), &text);
    }
  }
  return text;
}

int OnPolicyFeatures::verify(const CandidateTree& tree, int64_t root, const TrainingText& text) {
  constexpr int kOfText = -1;
  int64_t last_kept = root;
  place_.assign(static_cast<size_t>(tree.size()), {-1, kOfText});
  for (const int i : tree.chosen()) {
    const CandidateTree::Node& node = tree[i];
    const Place above = node.parent == CandidateTree::kRoot
                            ? Place{root, kOfText}
                            : place_[static_cast<size_t>(node.parent)];
    if (above.at < 0) continue;
    Place& place = place_[static_cast<size_t>(i)];
    if (above.guess == kOfText && node.token == text.tokens[static_cast<size_t>(above.at + 1)]) {
      if (above.at + 1 == text.n_positions()) continue;  // what follows the text is not known
      place = {above.at + 1, kOfText};
      last_kept = std::max(last_kept, place.at);
      continue;
    }
    if (above.guess != kOfText) guesses_[static_cast<size_t>(above.guess)].is_leaf = false;
    place = {above.at, static_cast<int>(guesses_.size())};
    guesses_.push_back({root, above.at, above.guess, node.token, true, false});
  }
  return static_cast<int>(last_kept - root) + 1;
}

void OnPolicyFeatures::observe(const TrainingText& text, int64_t first, int64_t root, int n_kept) {
  const Session& session = pass_.session;
  *kept_ = session.last_step();
  Step::Sequence& s = kept_->sequences[0];
  s.first_row = static_cast<int32_t>(root - first);
  s.n_rows = s.n_kept = n_kept;
  s.root = -1;  // as of a prompt: how much was accepted matters only where passes have costs
  s.committed = static_cast<int32_t>(root) + n_kept;
  for (int r = 0; r < kept_->n_rows; ++r) kept_->kept_at[r] = static_cast<int32_t>(first) + r;
  const LlamaConfig& config = session.model().config();
  drafter_->observe({0, texts_read_,
                     std::span(text.tokens).first(static_cast<size_t>(s.committed + 1)), n_kept,
                     s.committed, pass_.states() + (root - first) * config.hidden_size, kept_.get(),
                     session.logits(), config.vocab_size});
}

void OnPolicyFeatures::add_branches(const LikelyTokens* answers, TrainingText* text) {
  for (size_t leaf = 0; leaf < guesses_.size(); ++leaf) {
    if (!guesses_[leaf].is_leaf) continue;
    Branch branch{guesses_[leaf].root - 1, {}, {}};
    for (int i = static_cast<int>(leaf); i >= 0; i = guesses_[static_cast<size_t>(i)].parent) {
      Guess& g = guesses_[static_cast<size_t>(i)];
      branch.tokens.push_back(g.token);
      if (!std::exchange(g.is_learnt, true)) branch.targets.push_back(answers[i]);
    }
    for (int64_t at = guesses_[leaf].left_at; at > guesses_[leaf].root; --at)
      branch.tokens.push_back(text->tokens[static_cast<size_t>(at)]);
    std::reverse(branch.tokens.begin(), branch.tokens.end());
    std::reverse(branch.targets.begin(), branch.targets.end());
    text->branches.push_back(std::move(branch));
  }
}

}  // namespace chimera::training
