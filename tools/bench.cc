// chimera bench: how fast plain decoding is, how much of the memory's speed it gets, and what
// drafting adds.
#include <algorithm>
#include <iterator>

#include "engine/generate.h"
#include "tools/bench_shape.h"
#include "tools/commands.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/machine.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/prompts.h"
#include "tools/step_costs.h"
#include "tools/timed_backend.h"

namespace chimera {
namespace {

// A story, an explanation, code, and a text that must be said again with changes: from little to
// much that a drafter can guess.
const char* const kPrompts[] = {
    "Tell me a short story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright, in simple words.",
    "Write a Python function that checks whether a number is prime, and explain it line by line.",
    "Correct the spelling and repeat the text: The quick brown fox jumpd over the lazy dog. The "
    "lazy "
    "dog did not moove. The quick brown fox jumpd over the lazy dog again, and the lazy dog slept.",
};

struct Options {
  std::optional<std::string> model, prompts;
  std::optional<int> limit, ctx, threads;
  std::string device = "auto", shape = "", type = "bf16";
  int n = 128, rounds = 5;
  DrafterFlags drafting;
  Sampling sampling;
  bool json = false;
};

Command command(Options* o) {
  Command command{
      "bench",
      "-m MODEL | --shape NAME [FLAGS]",
      "Decodes a set of prompts with each drafter in turn, and reads memory as fast as it goes\n"
      "between them. Reports medians of the rounds, and the lowest and highest.\n",
      {heading("Flags"),
       {'m', "model", "MODEL", "a GGUF or llama2.c file", text(&o->model)},
       {0, "prompts", "FILE",
        "JSONL with turns, prompt, text or messages, or plain text\nwith one prompt a line "
        "(default: four prompts of its own)",
        text(&o->prompts)},
       {0, "limit", "N", "prompts to use, at most (default: all)", integer(&o->limit, 1, 1 << 30)},
       {'n', "tokens", "N", "tokens to generate for each, at most", integer(&o->n, 2, kMaxContext)},
       {0, "rounds", "R", "rounds over all prompts", integer(&o->rounds, 1, 1000)},
       {0, "temp", "T", "temperature", number(&o->sampling.temperature, 0, 1000)},
       {0, "threads", "N", "CPU threads (default: one for each physical core)",
        integer(&o->threads, 1, 256)},
       {0, "device", "NAME", "cpu, cuda or auto (cuda where there is a GPU)",
        choice(&o->device, {"cpu", "cuda", "auto"})},
       {0, "shape", "NAME",
        "instead of a model's texts: single steps of a model of this\nshape with random weights",
        choice(&o->shape, shape_names())},
       {0, "type", "TYPE", "... of this type", choice(&o->type, shape_types())},
       {0, "ctx", "N", "tokens of context (default: what the longest prompt needs)",
        integer(&o->ctx, 1, kMaxContext)},
       {0, "json", "", "print one JSON object instead of a table", on(&o->json)}}};
  const std::vector<Flag> drafting = o->drafting.flags();
  command.flags.insert(command.flags.end() - 1, drafting.begin(), drafting.end());
  return command;
}

// What a drafter did in one round, all prompts together. The first token of a text is the prompt's.
struct Total {
  double seconds = 0;
  int64_t steps = 0, tokens = 0;

  void add(const Generation& g) {
    seconds += g.step_seconds;
    steps += g.steps;
    tokens += g.step_tokens;
  }
  double tokens_per_second() const { return static_cast<double>(tokens) / seconds; }
  double tokens_per_step() const {
    return static_cast<double>(tokens) / static_cast<double>(steps);
  }
};

struct Result {
  std::string drafter;
  Series tokens_per_second, tokens_per_step, speedup;
};

std::vector<Prompt> choose_prompts(const Options& o) {
  std::vector<Prompt> prompts;
  if (o.prompts) {
    prompts = load_prompts(*o.prompts);
  } else {
    for (const char* text : kPrompts) prompts.push_back({{"user", text}});
  }
  if (o.limit && prompts.size() > static_cast<size_t>(*o.limit))
    prompts.resize(static_cast<size_t>(*o.limit));
  return prompts;
}

void check_same(const std::vector<int32_t>& plain, const std::vector<int32_t>& drafted,
                size_t prompt, const std::string& drafter) {
  const auto [a, b] = std::mismatch(plain.begin(), plain.end(), drafted.begin(), drafted.end());
  if (a == plain.end() && b == drafted.end()) return;
  throw Error(
      "prompt " + std::to_string(prompt + 1) + ", token " + std::to_string(a - plain.begin() + 1),
      "the text of plain decoding", "another one with " + drafter,
      "THE TEXTS DIFFER, which must never happen: please report it with this command");
}

}  // namespace

int bench(const std::vector<std::string>& args) {
  Options o;
  if (!parse(command(&o), args)) return 0;
  if (!o.model && o.shape.empty())
    throw UsageError("bench", "-m MODEL or --shape NAME", "neither", "see chimera bench --help");
  if (o.model && !o.shape.empty())
    throw UsageError("bench", "-m MODEL or --shape NAME", "both", "see chimera bench --help");

  const int threads = o.threads.value_or(cpu::physical_cores());
  auto device = make_backend(o.device, {.threads = threads});
  if (!o.shape.empty())
    return bench_shape(std::move(device),
                       {o.shape, o.type, o.ctx.value_or(512), o.rounds, threads, o.json});
  TimedBackend backend(std::move(device));
  Model model(*o.model);
  std::vector<std::vector<int32_t>> prompts;
  size_t longest = 0;
  for (const Prompt& prompt : choose_prompts(o)) {
    prompts.push_back(encode(model, prompt, model.chat_format != ChatFormat::kNone));
    longest = std::max(longest, prompts.back().size());
  }
  const int context = choose_context(model.file.tensors.config, o.ctx, longest, o.n);

  const std::optional<DraftTensors> draft = load_draft_for(model, o.drafting);
  const Llama llama = prepare_weights(backend, &model);
  Session session(llama, {.context = context, .max_nodes = o.drafting.most_nodes()});
  StepCosts costs(llama, &backend);
  GenerateOptions options;
  options.max_tokens = o.n;
  if (model.tokenizer.eos() >= 0) options.eos = {model.tokenizer.eos()};
  options.sampling = o.sampling;

  std::vector<Result> results;
  std::vector<std::unique_ptr<Drafter>> drafters;
  for (const char* name : {"none", "ngram", "chimera", "hybrid", "static"}) {
    if (drafters.size() == 2 && !draft) break;
    if (name == std::string("static") && o.drafting.tree.empty()) break;
    drafters.push_back(make_drafter(name, o.drafting, draft, llama, context));
    results.emplace_back().drafter = name;
  }

  Progress progress;
  progress.show("warming up");
  if (!o.drafting.nodes) session.measure_cost();
  for (const auto& drafter : drafters) generate(session, drafter.get(), prompts.front(), options);

  Series bandwidth, share;
  for (int round = 0; round < o.rounds; ++round) {
    const double gb_per_second = read_bandwidth(backend, llama.weight_bytes(), threads);
    std::vector<Total> totals(drafters.size());
    for (size_t i = 0; i < prompts.size(); ++i) {
      progress.show("round " + std::to_string(round + 1) + " of " + std::to_string(o.rounds) +
                    ", prompt " + std::to_string(i + 1) + " of " + std::to_string(prompts.size()));
      options.sampling.seed = i;
      std::vector<int32_t> plain;
      for (size_t d = 0; d < drafters.size(); ++d) {
        const Generation g = generate(session, drafters[d].get(), prompts[i], options);
        if (d == 0) plain = g.ids;
        check_same(plain, g.ids, i, results[d].drafter);
        totals[d].add(g);
      }
    }
    if (totals[0].steps == 0)
      throw Error("bench", "texts of two tokens and more", "none", "use other prompts");
    for (size_t d = 0; d < drafters.size(); ++d) {
      results[d].tokens_per_second.add(totals[d].tokens_per_second());
      results[d].tokens_per_step.add(totals[d].tokens_per_step());
      results[d].speedup.add(totals[d].tokens_per_second() / totals[0].tokens_per_second());
    }
    costs.measure_round();
    bandwidth.add(gb_per_second);
    share.add(static_cast<double>(llama.weight_bytes()) * static_cast<double>(totals[0].steps) /
              totals[0].seconds / 1e9 / gb_per_second);
  }
  progress.show("");

  if (o.json) {
    const auto result = [](const Result& r) {
      return nlohmann::ordered_json{{"drafter", r.drafter},
                                    {"tokens_per_second", r.tokens_per_second.median()},
                                    {"tokens_per_second_spread", r.tokens_per_second.spread()},
                                    {"tokens_per_step", r.tokens_per_step.median()},
                                    {"tokens_per_step_spread", r.tokens_per_step.spread()},
                                    {"speedup", r.speedup.median()},
                                    {"speedup_spread", r.speedup.spread()}};
    };
    auto list = nlohmann::ordered_json::array();
    for (const Result& r : results) list.push_back(result(r));
    print_json({{"model", model.name()},
                {"cpu", cpu_model()},
                {"device", backend.name()},
                {"isa", backend.isa()},
                {"threads", threads},
                {"prompts", prompts.size()},
                {"tokens", o.n},
                {"rounds", o.rounds},
                {"nodes", o.drafting.most_nodes()},
                {"temperature", o.sampling.temperature},
                {"weight_bytes", llama.weight_bytes()},
                {"peak_memory_bytes", peak_memory_bytes()},
                {"read_bandwidth_gb_s", bandwidth.median()},
                {"read_bandwidth_gb_s_spread", bandwidth.spread()},
                {"bandwidth_share", share.median()},
                {"bandwidth_share_spread", share.spread()},
                {"results", list}});
    return 0;
  }
  std::string table;
  for (const Result& r : results) {
    char buffer[160];
    std::snprintf(buffer, sizeof buffer, "%-8s %-25s %-20s %s\n", r.drafter.c_str(),
                  r.tokens_per_second.text(1).c_str(), r.tokens_per_step.text(2).c_str(),
                  r.speedup.text(2).c_str());
    table += buffer;
  }
  const auto line = [&](const char* format, auto... values) {
    char buffer[160];
    std::snprintf(buffer, sizeof buffer, format, values...);
    return std::string(buffer);
  };
  const auto curve = [&](const char* what, const std::vector<StepCosts::Point>& points) {
    std::string text = line("\n%-22s  ms a step                 times the first\n", what);
    for (const StepCosts::Point& p : points)
      text += line("%-22d  %-25.2f %s\n", p.at, 1e3 * p.seconds.median(), p.ratio.text(2).c_str());
    return text;
  };
  std::string ops = line("\n%-30s %5s", "ms a step", "calls");
  for (const int rows : StepCosts::op_rows()) ops += line("  %9s", count_text(rows, "row").c_str());
  ops += line("  %12s\n", "GB/s (1 row)");
  for (const StepCosts::Op& op : costs.by_op()) {
    ops += line("%-30s %5d", op.name.c_str(), op.calls);
    for (const Series& seconds : op.seconds) ops += line("  %9.3f", 1e3 * seconds.median());
    if (op.weight_bytes > 0)
      ops += line("  %12.1f", static_cast<double>(op.weight_bytes) / op.seconds[0].median() / 1e9);
    ops += "\n";
  }
  print(model.name() + " on " + cpu_model() + ", " + backend.description() + "\n" +
        count_text(static_cast<int64_t>(prompts.size()), "prompt") + ", up to " +
        std::to_string(o.n) + " tokens each; median (lowest..highest) of " +
        count_text(o.rounds, "round") + "\n\n" +
        "drafter  tokens/s                  tokens/step          speedup\n" + table +
        curve("rows of a pass", costs.by_rows()) + curve("tokens of context", costs.by_context()) +
        ops + "\nprefill of " + std::to_string(costs.prefill_tokens()) +
        " tokens: " + costs.prefill_tokens_per_second().text(0) + " tokens/s" +
        "\nreading memory at " + bandwidth.text(1) + " GB/s; plain decoding reads " +
        bytes_text(llama.weight_bytes()) + " of weights a token,\n" + share.text(2) +
        " of that speed. All texts were the same, token for token.\n");
  return 0;
}

}  // namespace chimera
