// chimera train eval: how good a draft is. Tokens per pass for trees of every kind and size, the
// accuracy of its guesses, and how true its probabilities are.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include "engine/error.h"
#include "loader/draft_file.h"
#include "tools/commands.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/train/draft_measurement.h"
#include "tools/train/eval_chart.h"
#include "tools/train/train.h"
#include "tools/tree_file.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::optional<std::string> model, svg, calibrated;
  std::vector<std::string> prompts;
  std::optional<int> limit, ctx, threads;
  std::optional<float> temperature;
  int n = 128;
  DrafterFlags drafting;
  bool json = false;
};

Command command(Options* o) {
  return {
      "train eval",
      "-m MODEL --draft DRAFT --prompts FILE[,FILE...] [FLAGS]",
      "Measures a draft on the answers to prompts that it should not have learnt from: tokens a\n"
      "pass of the target (the root's own included) for n-grams, chains, the best static trees,\n"
      "trees grown by the draft's probabilities and hybrids with n-grams, each of several sizes\n"
      "(without the root); how often its guesses are right; how far its probabilities are true.\n",
      {{'m', "model", "MODEL", "the target: a GGUF or llama2.c file", file(&o->model)},
       {0, "draft", "DRAFT", "a draft that was trained for it", file(&o->drafting.draft)},
       {0, "prompts", "FILES", "JSONL or one prompt a line; several separated by commas",
        files(&o->prompts)},
       {0, "limit", "N", "prompts of a file to use, at most (default: all)",
        integer(&o->limit, 1, 1 << 30)},
       {'n', "tokens", "N", "tokens to generate for each, at most",
        integer(&o->n, 2, kLongestContext)},
       {0, "temp", "T", "temperature (default: first 0, then 1)", number(&o->temperature, 0, 1000)},
       {0, "tree", "SPEC", "measure this static tree too (see chimera run --help)",
        tree_value(&o->drafting.tree)},
       {0, "calibrate", "OUT",
        "write the draft again, to read its probabilities as they\nwere true here: at temperature "
        "0, at others, or both",
        file(&o->calibrated)},
       {0, "depth", "N",
        "how far ahead of the text trees reach (a chain reaches as far\nas it has nodes)",
        integer(&o->drafting.depth, 1, kMeasuredDepths)},
       {0, "width", "N",
        "guesses that the draft goes on from at each depth\n(default: 12, a fifth of the largest "
        "tree)",
        integer(&o->drafting.width, 1, 32)},
       threads_flag(&o->threads),
       {0, "ctx", "N", "tokens of context (default: what the longest prompt needs)",
        integer(&o->ctx, 1, kLongestContext)},
       {0, "json", "", "print one JSON object instead of tables", on(&o->json)},
       {0, "svg", "FILE", "draw a picture as well", file(&o->svg)}}};
}

template <typename F>
double tokens_per_pass(const Measurement& m, const F& accepted) {
  PassCount count;
  for (const MeasuredText& text : m.texts) count_passes(text, accepted, &count);
  return count.tokens_per_pass();
}

// Of the best static tree: found on every other text, measured on those between, and the other way
// round.
double static_tokens_per_pass(const Measurement& m, const RankPaths (&found)[2], int nodes) {
  PassCount count;
  for (size_t i = 0; i < m.texts.size(); ++i) {
    const RankPaths& others = found[m.texts.size() > 1 ? 1 - i % 2 : 0];
    count_passes(
        m.texts[i], [&](const MeasuredPosition& p) { return others.accepted(p, nodes); }, &count);
  }
  return count.tokens_per_pass();
}

std::vector<TreeCurve> tree_curves(const Measurement& m) {
  const auto source = [&](TreeSource s) {
    std::vector<double> values;
    for (const int nodes : kTreeSizes)
      values.push_back(tokens_per_pass(
          m, [&](const MeasuredPosition& p) { return accepted_in(p.place[s], nodes); }));
    return values;
  };
  std::vector<double> chain, fixed;
  RankPaths found[2];
  for (size_t i = 0; i < m.texts.size(); ++i)
    for (const MeasuredPosition& p : m.texts[i]) found[i % 2].add(p);
  for (RankPaths& paths : found) paths.rank();
  for (const int nodes : kTreeSizes) {
    chain.push_back(
        tokens_per_pass(m, [&](const MeasuredPosition& p) { return std::min(nodes, p.chain); }));
    fixed.push_back(static_tokens_per_pass(m, found, nodes));
  }
  return {{"ngram", source(kNgramTree)},
          {"chain", chain},
          {"static", fixed},
          {"dynamic", source(kDraftTree)},
          {"hybrid", source(kHybridTree)}};
}

std::string padded(const std::string& text, size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

std::string table_of(const EvalRow& row) {
  std::string table = "\n" + row.title + ": " + count_text(row.prompts, "prompt") + ", " +
                      std::to_string(row.measurement.positions()) + " positions\n\n" +
                      "  tokens a pass";
  for (const int nodes : kTreeSizes) table += padded(std::to_string(nodes), 7);
  table += "  nodes\n";
  for (const TreeCurve& curve : row.curves) {
    table += "  " + curve.tree + std::string(13 - curve.tree.size(), ' ');
    for (const double tau : curve.tokens_per_pass) table += padded(fixed_text(tau, 3), 7);
    table += "\n";
  }
  if (row.tree_nodes > 0)
    table += "  --tree: " + fixed_text(row.tree_tokens_per_pass, 3) + " with its " +
             count_text(row.tree_nodes, "node") + "\n";
  table += "\n  right guesses, %, after the true tokens\n  depth  known";
  for (size_t r = 0; r < DepthAccuracy::kRanks; ++r)
    table += padded("rank " + std::to_string(r + 1), 8);
  table += "  temperature\n";
  for (size_t d = 0; d < row.measurement.depths.size(); ++d) {
    const DepthAccuracy& a = row.measurement.depths[d];
    table += padded(std::to_string(d + 1), 7) + padded(percent_text(a.known, a.n), 7);
    for (const int64_t right : a.at_rank) table += padded(percent_text(right, a.n), 8);
    table += padded(fixed_text(a.best_temperature(), 2), 13) + "\n";
  }
  table += "\n  candidates of " + std::to_string(Measurement::kReliabilityNodes) +
           " nodes, by the probability given to their path\n  probability  ";
  const std::pair<const char*, TreeSource> kinds[] = {
      {"ngram", kNgramTree}, {"dynamic", kDraftTree}, {"hybrid", kHybridTree}};
  for (const auto& [name, source] : kinds) table += padded(name, 9) + "  given   true";
  table += "\n";
  for (size_t b = 0; b < Reliability::kBins; ++b) {
    table += "  " + fixed_text(Reliability::kEdges[b], 2) + " to " +
             fixed_text(Reliability::kEdges[b + 1], 2) + " ";
    for (const auto& [name, source] : kinds) {
      const Reliability::Bin& bin = row.measurement.reliability[source].bins[b];
      table +=
          padded(std::to_string(bin.n), 9) +
          padded(bin.n > 0 ? fixed_text(bin.probability / static_cast<double>(bin.n), 3) : "-", 7) +
          padded(bin.n > 0 ? fixed_text(
                                 static_cast<double>(bin.came_true) / static_cast<double>(bin.n), 3)
                           : "-",
                 7);
    }
    table += "\n";
  }
  table += "  mean error   ";
  for (const auto& [name, source] : kinds)
    table += padded(fixed_text(row.measurement.reliability[source].expected_error(), 4), 23);
  return table + "\n";
}

ordered_json json_of(const EvalRow& row) {
  ordered_json trees, depths = ordered_json::array(), reliability;
  for (const TreeCurve& curve : row.curves)
    for (size_t i = 0; i < curve.tokens_per_pass.size(); ++i)
      trees[curve.tree][std::to_string(kTreeSizes[i])] = curve.tokens_per_pass[i];
  for (const DepthAccuracy& a : row.measurement.depths) {
    ordered_json ranks = ordered_json::array();
    for (const int64_t right : a.at_rank)
      ranks.push_back(static_cast<double>(right) / static_cast<double>(std::max<int64_t>(1, a.n)));
    depths.push_back(
        {{"positions", a.n},
         {"known", static_cast<double>(a.known) / static_cast<double>(std::max<int64_t>(1, a.n))},
         {"accuracy", ranks},
         {"temperature", a.best_temperature()}});
  }
  const std::pair<const char*, TreeSource> kinds[] = {
      {"ngram", kNgramTree}, {"dynamic", kDraftTree}, {"hybrid", kHybridTree}};
  for (const auto& [name, source] : kinds) {
    ordered_json bins = ordered_json::array();
    const Reliability& r = row.measurement.reliability[source];
    for (size_t b = 0; b < Reliability::kBins; ++b) {
      const auto n = static_cast<double>(std::max<int64_t>(1, r.bins[b].n));
      bins.push_back({{"from", Reliability::kEdges[b]},
                      {"to", Reliability::kEdges[b + 1]},
                      {"candidates", r.bins[b].n},
                      {"given", r.bins[b].probability / n},
                      {"true", static_cast<double>(r.bins[b].came_true) / n}});
    }
    reliability[name] = {{"expected_error", r.expected_error()}, {"bins", bins}};
  }
  if (row.tree_nodes > 0) trees["given"][std::to_string(row.tree_nodes)] = row.tree_tokens_per_pass;
  return {{"prompts", row.file},
          {"n_prompts", row.prompts},
          {"temperature", row.temperature},
          {"positions", row.measurement.positions()},
          {"tokens_per_pass", trees},
          {"depths", depths},
          {"reliability", reliability}};
}

// From the rows at temperature 0, or from the others, if there are any.
void calibrate(const std::vector<EvalRow>& rows, bool greedy, DraftCalibration* result) {
  std::vector<DepthAccuracy> depths;
  for (const EvalRow& row : rows) {
    if ((row.temperature == 0) != greedy) continue;
    depths.resize(row.measurement.depths.size());
    for (size_t d = 0; d < depths.size(); ++d) depths[d].add(row.measurement.depths[d]);
  }
  if (!depths.empty()) *result = calibration(depths);
}

}  // namespace

int train_eval(const std::vector<std::string>& args) {
  Options o;
  if (!parse(command(&o), args)) return 0;
  expect_given("train eval", {{"-m MODEL", o.model.has_value()},
                              {"--draft DRAFT", o.drafting.draft.has_value()},
                              {"--prompts FILE", !o.prompts.empty()}});
  const int width = o.drafting.width.value_or(12);
  if (o.drafting.tree.depth() > o.drafting.depth)
    throw UsageError("--tree", "a tree of --depth " + std::to_string(o.drafting.depth),
                     std::to_string(o.drafting.tree.depth()) + " deep", "raise --depth");

  for (const auto& path : {o.svg, o.calibrated}) {
    if (!path) continue;
    expect_other_file(*path, o.prompts);
    expect_other_file(*path, {o.model});
    expect_writable(*path);
  }
  if (o.svg) expect_other_file(*o.svg, {o.drafting.draft, o.calibrated});

  const auto backend = make_backend("cpu", {.threads = o.threads.value_or(0)});
  Model model(*o.model);
  const std::vector<std::string>& files = o.prompts;
  std::vector<std::vector<std::vector<int32_t>>> prompts;  // of each file
  LongestPrompt longest;
  for (const std::string& file : files)
    prompts.push_back(encode_file(model, file, o.limit, &longest));
  const int context = choose_context(model.file.tensors.config, o.ctx, longest, o.n);
  const auto draft = load_draft_for(model, o.drafting);
  const Llama llama = prepare_weights(*backend, &model);
  Session session(llama, {.context = context});

  if (!o.json)
    print(printable(*o.drafting.draft, 4096) + " for " + model.name() + ", up to " +
          std::to_string(o.n) + " tokens each, trees of depth " + std::to_string(o.drafting.depth) +
          ", width " + std::to_string(width) + "\n");
  std::vector<EvalRow> rows;
  const Interrupt interrupt;
  Progress progress;
  const std::vector<float> temperatures =
      o.temperature ? std::vector<float>{*o.temperature} : std::vector<float>{0, 1};
  for (size_t f = 0; f < files.size(); ++f)
    for (const float temperature : temperatures) {
      GenerateOptions generation;
      generation.max_tokens = o.n;
      if (model.tokenizer.eos() >= 0) generation.eos = {model.tokenizer.eos()};
      generation.sampling.temperature = temperature;
      generation.cancelled = [&] { return interrupt.asked(); };
      EvalRow& row = rows.emplace_back();
      row.file = printable(std::filesystem::path(files[f]).filename().string(), 4096);
      row.temperature = temperature;
      row.title = row.file + ", temperature " +
                  fixed_text(static_cast<double>(temperature),
                             temperature == std::floor(temperature) ? 0 : 2);
      row.prompts = static_cast<int64_t>(prompts[f].size());
      row.measurement = measure_draft(
          session, *draft, {.depth = o.drafting.depth, .width = width}, true, prompts[f],
          generation, [&](double done) {
            progress.bar(row.title, (static_cast<double>(rows.size() - 1) + done) /
                                        static_cast<double>(files.size() * temperatures.size()));
          });
      interrupt.check();
      row.tree_nodes = o.drafting.tree.size();
      row.tree_tokens_per_pass = tokens_per_pass(row.measurement, [&](const MeasuredPosition& p) {
        return accepted_in(p, o.drafting.tree);
      });
      row.curves = tree_curves(row.measurement);
      if (o.json) continue;
      progress.show("");
      print(table_of(row));  // at once: whoever stops here keeps it
    }
  progress.show("");

  if (o.json) {
    ordered_json list = ordered_json::array();
    for (const EvalRow& row : rows) list.push_back(json_of(row));
    print_json({{"model", model.name()},
                {"draft", printable(*o.drafting.draft, 4096)},
                {"cpu", cpu_model()},
                {"isa", backend->isa()},
                {"tokens", o.n},
                {"depth", o.drafting.depth},
                {"width", width},
                {"rows", list}});
  }
  if (o.calibrated) {
    DraftTensors calibrated = *draft;
    calibrate(rows, true, &calibrated.config.greedy);
    calibrate(rows, false, &calibrated.config.sampled);
    save_draft(calibrated, *o.calibrated);
  }
  if (o.svg) write_eval_chart(rows, *o.svg);
  return 0;
}

}  // namespace chimera
