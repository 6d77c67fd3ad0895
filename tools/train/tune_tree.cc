// chimera tune-tree: the static tree that makes the most of a draft on this machine.
//
// The draft is told the true tokens of held-out texts and says at which rank it would have guessed
// each next one. So the text after every position is a path of ranks, and the best tree of n nodes
// consists of the n most frequent beginnings of such paths. How many nodes, and how deep: what
// gives most tokens for the time of a pass of that many rows and of drafting that deep.
#include <cmath>

#include "engine/error.h"
#include "tools/commands.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/train/draft_measurement.h"
#include "tools/tree_file.h"

namespace chimera {
namespace {

struct Options {
  std::optional<std::string> model, draft, prompts, output;
  std::optional<int> limit, nodes, ctx, threads;
  int n = 128, depth = 8;
  Sampling sampling;
};

Command command(Options* o) {
  return {
      "tune-tree",
      "-m MODEL --draft DRAFT --prompts FILE -o TREE [FLAGS]",
      "Finds the best static tree for a draft on this machine, on the answers to prompts that\n"
      "the draft has not learnt from. chimera run --tree TREE then uses it.\n",
      {{'m', "model", "MODEL", "the target: a GGUF or llama2.c file", file(&o->model)},
       {0, "draft", "DRAFT", "a draft that was trained for it", file(&o->draft)},
       {0, "prompts", "FILE", "JSONL or one prompt a line", file(&o->prompts)},
       {'o', "output", "TREE", "the file to write", file(&o->output)},
       {0, "limit", "N", "prompts to use, at most (default: all)", integer(&o->limit, 1, 1 << 30)},
       {'n', "tokens", "N", "tokens to generate for each, at most",
        integer(&o->n, 2, kLongestContext)},
       {0, "temp", "T", "temperature", number(&o->sampling.temperature, 0, 1000)},
       {0, "nodes", "N", "nodes of the tree (default: as many as pay here)",
        integer(&o->nodes, 1, StaticTree::kMostNodes)},
       {0, "depth", "N", "... and its depth, at most", integer(&o->depth, 1, kMeasuredDepths)},
       threads_flag(&o->threads),
       {0, "ctx", "N", "tokens of context (default: what the longest prompt needs)",
        integer(&o->ctx, 1, kLongestContext)}}};
}

struct Tuned {
  StaticTree tree;
  double tokens = 1, seconds = 0;  // of a pass
};

Tuned tune(const RankPaths& paths, std::optional<int> nodes, int depth, const CostCurve& cost,
           const Measurement& m) {
  Tuned best;
  for (int deepest = 1; deepest <= depth; ++deepest) {
    Tuned t;
    std::vector<int> place(paths.nodes().size(), -1);
    for (size_t i = 0; i < place.size() && t.tree.size() < StaticTree::kMostNodes; ++i) {
      const RankPaths::Node& node = paths.nodes()[i];
      if (node.depth > deepest) continue;
      place[i] =
          t.tree.add(node.parent < 0 ? -1 : place[static_cast<size_t>(node.parent)], node.rank);
      t.tokens += static_cast<double>(node.count) / static_cast<double>(paths.positions());
      t.seconds = m.observe_seconds + deepest * m.depth_seconds + cost.seconds(1 + t.tree.size());
      const bool size_asked = !nodes || t.tree.size() == *nodes;
      if (size_asked && (best.tree.empty() || t.tokens / t.seconds > best.tokens / best.seconds))
        best = t;
    }
  }
  return best;
}

}  // namespace

int tune_tree(const std::vector<std::string>& args) {
  Options o;
  if (!parse(command(&o), args)) return 0;
  expect_given("tune-tree", {{"-m MODEL", o.model.has_value()},
                             {"--draft DRAFT", o.draft.has_value()},
                             {"--prompts FILE", o.prompts.has_value()},
                             {"-o TREE", o.output.has_value()}});
  expect_other_file(*o.output, {o.model, o.draft, o.prompts});
  expect_writable(*o.output);

  const auto backend = make_backend("cpu", {.threads = o.threads.value_or(0)});
  Model model(*o.model);
  LongestPrompt longest;
  const auto prompts = encode_file(model, *o.prompts, o.limit, &longest);
  const int context = choose_context(model.file.tensors.config, o.ctx, longest, o.n);
  DrafterFlags drafting;
  drafting.draft = o.draft;
  const auto draft = load_draft_for(model, drafting);
  const Llama llama = prepare_weights(*backend, &model);
  Session session(llama, {.context = context, .max_nodes = StaticTree::kMostNodes});
  session.measure_cost();

  GenerateOptions generation;
  generation.max_tokens = o.n;
  if (model.tokenizer.eos() >= 0) generation.eos = {model.tokenizer.eos()};
  generation.sampling = o.sampling;
  const Interrupt interrupt;
  generation.cancelled = [&] { return interrupt.asked(); };
  Progress progress;
  const Measurement m =
      measure_draft(session, *draft, {.depth = o.depth}, false, prompts, generation,
                    [&](double done) { progress.bar("measuring the draft", done); });
  progress.show("");
  interrupt.check();
  RankPaths paths;
  for (const MeasuredText& text : m.texts)
    for (const MeasuredPosition& position : text) paths.add(position);
  paths.rank();
  const Tuned best = tune(paths, o.nodes, o.depth, session.cost(), m);
  if (best.tree.empty())
    throw Error("tune-tree",
                o.nodes ? "paths for " + std::to_string(*o.nodes) + " nodes" : "right guesses",
                "too few in " + std::to_string(m.positions()) + " positions", "use more prompts");

  const auto ms = [](double seconds) { return fixed_text(1000 * seconds, 2) + " ms"; };
  const double plain = session.cost().seconds(1);
  const std::string summary =
      count_text(best.tree.size(), "node") + ", " + std::to_string(best.tree.depth()) +
      " deep: " + fixed_text(best.tokens, 2) + " tokens a pass, after any of " +
      std::to_string(m.positions()) + " positions\nA pass takes " + ms(plain) +
      " with the root alone, " + ms(session.cost().seconds(1 + best.tree.size())) +
      " with the tree; drafting takes " + ms(m.observe_seconds) + " and " + ms(m.depth_seconds) +
      " a depth\nSpeed over plain: " + fixed_text(best.tokens / best.seconds * plain, 2) +
      " expected";
  print(summary + "\n");
  write_tree(best.tree,
             "A static tree for " + printable(*o.draft, 4096) + " and " + model.name() + ",\n" +
                 "by chimera tune-tree on " + cpu_model() + ", " + backend->description() + ".\n" +
                 summary +
                 "\nA line is a node: the ranks of the draft's guesses on the way to it, 1 the "
                 "likeliest.",
             *o.output);
  return 0;
}

}  // namespace chimera
