// chimera bench: how fast this machine decodes, how fast it could, and where the time goes.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <set>

#include "engine/error.h"
#include "engine/generate.h"
#include "tools/bench/roofline.h"
#include "tools/bench/shape.h"
#include "tools/bench/step_costs.h"
#include "tools/bench/timed_backend.h"
#include "tools/commands.h"
#include "tools/cost_cache.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/model.h"
#include "tools/output.h"

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
  std::optional<std::string> model, svg;
  std::vector<std::string> prompts;
  std::optional<int> limit, ctx, threads;
  std::string device = "auto", shape = "", type = "bf16", weights = "packed";
  int n = 128, rounds = 5;
  DrafterFlags drafting;
  Sampling sampling;
  bool json = false;
};

Command command(Options* o) {
  Command command{
      "bench",
      "-m MODEL | --shape NAME [FLAGS]",
      "Decodes sets of prompts with each drafter in turn, runs passes of 1 to 64 rows and after\n"
      "texts of growing length, times every op of a pass, and reads memory as fast as it can,\n"
      "all of it in every round. Reports medians of the rounds; of rates and ratios, the lowest\n"
      "and highest too.\n",
      {{'m', "model", "MODEL", "a GGUF or llama2.c file", file(&o->model)},
       {0, "prompts", "FILE,..",
        "JSONL with turns, prompt, text or messages, or plain text\nwith one prompt a line; each "
        "file is a set (default: four\nprompts of its own)",
        files(&o->prompts)},
       {0, "limit", "N", "prompts of a set to use, at most (default: all)",
        integer(&o->limit, 1, 1 << 30)},
       {'n', "tokens", "N", "tokens to generate for each, at most",
        integer(&o->n, 2, kLongestContext)},
       {0, "rounds", "R", "rounds over all prompts", integer(&o->rounds, 1, 1000)},
       {0, "temp", "T", "temperature", number(&o->sampling.temperature, 0, 1000)},
       threads_flag(&o->threads),
       {0, "device", "NAME", "cpu, cuda or auto (cuda where there is a GPU)",
        choice(&o->device, {"cpu", "cuda", "auto"})},
       {0, "shape", "NAME",
        "instead of a model's texts: single steps of a model of this\nshape with random weights",
        choice(&o->shape, shape_names())},
       {0, "type", "TYPE", "... of this type", choice(&o->type, shape_types())},
       {0, "ctx", "N", "tokens of context (default: what the longest prompt needs)",
        integer(&o->ctx, 1, kLongestContext)},
       {0, "weights", "HOW", "packed for this machine, or mapped: see chimera run --help",
        choice(&o->weights, {"packed", "mapped"})},
       {0, "svg", "FILE", "draw the passes under the limits of memory and arithmetic",
        file(&o->svg)},
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
  void add(const Total& other) {
    seconds += other.seconds;
    steps += other.steps;
    tokens += other.tokens;
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

// What each drafter did in one round, the first of them being none.
void add_round(const std::vector<Total>& totals, std::vector<Result>* results) {
  for (size_t d = 0; d < totals.size(); ++d) {
    (*results)[d].tokens_per_second.add(totals[d].tokens_per_second());
    (*results)[d].tokens_per_step.add(totals[d].tokens_per_step());
    (*results)[d].speedup.add(totals[d].tokens_per_second() / totals[0].tokens_per_second());
  }
}

struct PromptSet {
  std::string name;
  std::vector<std::vector<int32_t>> prompts;
  std::vector<Result> results;
};

std::vector<PromptSet> choose_prompts(const Options& o, const Model& model,
                                      LongestPrompt* longest) {
  std::vector<PromptSet> sets;
  for (const std::string& file : o.prompts)
    sets.push_back({printable(std::filesystem::path(file).filename().string(), 4096),
                    encode_file(model, file, o.limit, longest),
                    {}});
  if (!sets.empty()) return sets;
  PromptSet own{"own", {}, {}};
  for (const char* text : kPrompts) {
    if (o.limit && own.prompts.size() == static_cast<size_t>(*o.limit)) break;
    const Message message{"user", text};
    own.prompts.push_back(encode(model, {&message, 1}, model.chat_format != ChatFormat::kNone));
    longest->tokens = std::max(longest->tokens, own.prompts.back().size());
  }
  return {own};
}

void check_same(const std::vector<int32_t>& plain, const std::vector<int32_t>& drafted,
                const std::string& set, size_t prompt, const std::string& drafter) {
  const auto [a, b] = std::mismatch(plain.begin(), plain.end(), drafted.begin(), drafted.end());
  if (a == plain.end() && b == drafted.end()) return;
  throw Error(set + ", prompt " + std::to_string(prompt + 1) + ", token " +
                  std::to_string(a - plain.begin() + 1),
              "the text of plain decoding", "another one with " + drafter,
              "THE TEXTS DIFFER, which must never happen: please report it with this command");
}

// ---- What cannot be had by decoding faster -----------------------------------------------------

// Multiply-adds that one row costs.
double multiply_adds(const LlamaConfig& c) {
  const double hidden = c.hidden_size;
  return c.n_layers * hidden * (2.0 * c.q_size() + 2.0 * c.kv_size() + 3.0 * c.ffn_size) +
         hidden * c.vocab_size;
}

// Multiply-adds a second of products whose weights stay in cache: a piece of the model's own.
class ArithmeticLimit {
 public:
  ArithmeticLimit(Backend& backend, TensorView weights) : backend_(backend) {
    weights.rows = std::min<int64_t>(weights.rows, 256);
    matrix_ = backend.prepare({&weights, 1}, nullptr);
    std::vector<float> x(static_cast<size_t>(kRows * matrix_->cols));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
    x_ = backend.allocate(x.size() * sizeof(float));
    backend.upload(x_.get(), x.data(), x.size() * sizeof(float));
    y_ = backend.allocate(static_cast<size_t>(kRows * matrix_->rows) * sizeof(float));
    step_ = backend.make_step(1);
    step_->clear();
    step_->begin_sequence(0);
    for (int i = 0; i < kRows; ++i) step_->add_row(0, i - 1, false);
  }
  double measure() {
    double best = 1e9;
    for (int i = 0; i < 50; ++i) {
      const auto start = Clock::now();
      backend_.submit(reinterpret_cast<uintptr_t>(step_.get()), [this] {
        backend_.linear(step_.get(), {.weights = matrix_.get(),
                                      .x = static_cast<float*>(x_.get()),
                                      .y = static_cast<float*>(y_.get())});
      });
      best = std::min(best, seconds_since(start));
    }
    return static_cast<double>(kRows * matrix_->rows * matrix_->cols) / best;
  }

 private:
  static constexpr int kRows = 64;
  Backend& backend_;
  std::unique_ptr<Matrix> matrix_;
  std::shared_ptr<Step> step_;
  std::shared_ptr<void> x_, y_;
};

// ---- Output -------------------------------------------------------------------------------------

using Json = nlohmann::ordered_json;

template <typename... Values>
std::string line(const char* format, Values... values) {
  char buffer[200];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

Json json_of(const std::vector<Result>& results) {
  Json list = Json::array();
  for (const Result& r : results)
    list.push_back({{"drafter", r.drafter},
                    {"tokens_per_second", r.tokens_per_second.median()},
                    {"tokens_per_second_spread", r.tokens_per_second.spread()},
                    {"tokens_per_step", r.tokens_per_step.median()},
                    {"tokens_per_step_spread", r.tokens_per_step.spread()},
                    {"speedup", r.speedup.median()},
                    {"speedup_spread", r.speedup.spread()}});
  return list;
}

Json json_of(const char* what, const std::vector<StepCosts::Point>& points) {
  Json list = Json::array();
  for (const StepCosts::Point& p : points)
    list.push_back({{what, p.at},
                    {"seconds", p.seconds.median()},
                    {"seconds_spread", p.seconds.spread()},
                    {"ratio", p.ratio.median()},
                    {"ratio_spread", p.ratio.spread()}});
  return list;
}

Json json_of(const std::vector<StepCosts::Op>& ops) {
  Json list = Json::array();
  for (const StepCosts::Op& op : ops) {
    Json seconds = Json::array();
    for (size_t i = 0; i < op.seconds.size(); ++i)
      seconds.push_back({{"rows", StepCosts::op_rows()[i]}, {"seconds", op.seconds[i].median()}});
    list.push_back({{"op", op.name},
                    {"calls", op.calls},
                    {"weight_bytes", op.weight_bytes},
                    {"passes", seconds}});
  }
  return list;
}

std::string table_of(const std::vector<Result>& results) {
  std::string text = "drafter  tokens/s                  tokens/step          speedup\n";
  for (const Result& r : results)
    text += line("%-8s %-25s %-20s %s\n", r.drafter.c_str(), r.tokens_per_second.text(1).c_str(),
                 r.tokens_per_step.text(2).c_str(), r.speedup.text(2).c_str());
  return text;
}

std::string table_of(const char* what, const std::vector<StepCosts::Point>& points) {
  std::string text = line("\n%-22s  ms a step                 times the first\n", what);
  for (const StepCosts::Point& p : points)
    text += line("%-22d  %-25.2f %s\n", p.at, 1e3 * p.seconds.median(), p.ratio.text(2).c_str());
  return text;
}

std::string table_of(const std::vector<StepCosts::Op>& ops) {
  std::string text = line("\n%-30s %5s", "ms a step", "calls");
  for (const int rows : StepCosts::op_rows())
    text += line("  %9s", count_text(rows, "row").c_str());
  text += line("  %12s\n", "GB/s (1 row)");
  for (const StepCosts::Op& op : ops) {
    text += line("%-30s %5d", op.name.c_str(), op.calls);
    for (const Series& seconds : op.seconds) text += line("  %9.3f", 1e3 * seconds.median());
    if (op.weight_bytes > 0)
      text += line("  %12.1f", static_cast<double>(op.weight_bytes) / op.seconds[0].median() / 1e9);
    text += "\n";
  }
  return text;
}

// ---- The run ------------------------------------------------------------------------------------

// Of a shape, single steps are run: there are no texts, and no file to draw.
void check_together(const Options& o, const std::set<std::string>& given) {
  static const std::set<std::string> kOfShapes = {"shape",   "type",   "ctx", "rounds",
                                                  "threads", "device", "json"};
  const std::string see_help = "see chimera bench --help";
  if (o.model.has_value() != o.shape.empty())
    throw UsageError("bench", "-m MODEL or --shape NAME", o.model ? "both" : "neither", see_help);
  for (const std::string& flag : given)
    if (o.model ? flag == "type" : kOfShapes.count(flag) == 0)
      throw UsageError("--" + flag, o.model ? "--shape NAME" : "-m MODEL",
                       o.model ? "-m MODEL" : "--shape", "leave one out");
  o.drafting.check();
}

struct Contestant {
  std::string name;
  std::unique_ptr<Drafter> drafter;
};

std::vector<Contestant> choose_drafters(const Options& o, const std::optional<DraftTensors>& draft,
                                        const Llama& llama, int context) {
  std::vector<std::string> names = {"none", "ngram"};
  if (draft) names.insert(names.end(), {"chimera", "hybrid"});
  if (!o.drafting.tree.empty()) names.push_back("static");
  std::vector<Contestant> all;
  for (const std::string& name : names)
    all.push_back({name, make_drafter(name, o.drafting, draft, llama, context)});
  return all;
}

// One round over a set: what each drafter did.
std::vector<Total> decode(const PromptSet& set, const std::vector<Contestant>& drafters,
                          Session* session, GenerateOptions options, const Interrupt& interrupt,
                          const std::function<void(const std::string&)>& tell) {
  std::vector<Total> totals(drafters.size());
  for (size_t i = 0; i < set.prompts.size(); ++i) {
    tell(set.name + ", prompt " + std::to_string(i + 1) + " of " +
         std::to_string(set.prompts.size()));
    options.sampling.seed = i;
    std::vector<int32_t> plain;
    for (size_t d = 0; d < drafters.size(); ++d) {
      const Generation g = generate(*session, drafters[d].drafter.get(), set.prompts[i], options);
      interrupt.check();
      if (d == 0) plain = g.ids;
      check_same(plain, g.ids, set.name, i, drafters[d].name);
      totals[d].add(g);
    }
  }
  if (totals[0].steps == 0)
    throw Error("bench, " + set.name, "texts of two tokens and more", "none", "use other prompts");
  return totals;
}

// What all rounds gave, with what has to be said about it.
struct Report {
  const Options& o;
  std::string model, device;  // as people read them
  const Backend& backend;
  int threads = 0;
  size_t weight_bytes = 0, n_prompts = 0;
  int context = 0, rounds = 0;  // rounds that were finished
  std::vector<PromptSet> sets;
  std::vector<Result> results;  // of all sets together
  Series bandwidth, share, arithmetic;
  ChimeraDrafter::Spent drafting{};  // by the draft model alone, where the host runs it
  const StepCosts& costs;
};

Json json_of(const Report& r) {
  Json by_set = Json::array();
  for (const PromptSet& set : r.sets)
    by_set.push_back(
        {{"set", set.name}, {"prompts", set.prompts.size()}, {"results", json_of(set.results)}});
  return {{"model", r.model},
          {"cpu", cpu_model()},
          {"device", r.backend.name()},
          {"isa", r.backend.isa()},
          {"threads", r.threads},
          {"prompts", r.n_prompts},
          {"tokens", r.o.n},
          {"rounds", r.rounds},
          {"weights", r.o.weights},
          {"draft", r.o.drafting.draft ? Json(*r.o.drafting.draft) : Json()},
          {"context", r.context},
          {"nodes", r.o.drafting.most_nodes()},
          {"temperature", r.o.sampling.temperature},
          {"weight_bytes", r.weight_bytes},
          {"peak_memory_bytes", peak_memory_bytes()},
          {"read_bandwidth_gb_s", r.bandwidth.median()},
          {"read_bandwidth_gb_s_spread", r.bandwidth.spread()},
          {"bandwidth_share", r.share.median()},
          {"bandwidth_share_spread", r.share.spread()},
          {"arithmetic_limit_g_multiply_adds_s", r.arithmetic.median() / 1e9},
          {"results", json_of(r.results)},
          {"sets", by_set},
          {"passes", json_of("rows", r.costs.by_rows())},
          {"contexts", json_of("tokens", r.costs.by_context())},
          {"ops", json_of(r.costs.by_op())},
          {"waiting_share", r.costs.waiting_share().median()},
          {"draft_steps", r.drafting.steps},
          {"draft_depths", r.drafting.depths},
          {"draft_seconds", r.drafting.seconds},
          {"prefill_tokens", r.costs.prefill_tokens()},
          {"prefill_tokens_per_second", r.costs.prefill_tokens_per_second().median()},
          {"prefill_tokens_per_second_spread", r.costs.prefill_tokens_per_second().spread()}};
}

std::string waiting_of(const Report& r) {
  const Series& share = r.costs.waiting_share();
  if (share.empty() || r.threads == 1) return "";
  return line(
      "\nthe meetings of all threads between the ops take %.1f%% (%.1f..%.1f) of a plain step",
      100 * share.median(), 100 * share.spread()[0], 100 * share.spread()[1]);
}

// What the draft model took of a step.
std::string drafting_of(const Report& r) {
  const auto& [seconds, steps, depths] = r.drafting;
  if (steps == 0) return "";
  const double each = seconds / static_cast<double>(depths),
               plain = r.costs.by_rows().front().seconds.median();
  return line(
      "\nthe draft model takes %.3f ms a step for %.1f depths, all that comes with it: "
      "%.1f%% of a plain step each",
      1e3 * seconds / static_cast<double>(steps),
      static_cast<double>(depths) / static_cast<double>(steps), 100 * each / plain);
}

std::string table_of(const Report& r) {
  std::string by_set;
  for (const PromptSet& set : r.sets)
    if (r.sets.size() > 1)
      by_set += set.name + ", " + count_text(static_cast<int64_t>(set.prompts.size()), "prompt") +
                "\n" + table_of(set.results) + "\n";
  return r.model + " on " + r.device + "\n" +
         count_text(static_cast<int64_t>(r.n_prompts), "prompt") + ", up to " +
         std::to_string(r.o.n) + " tokens each; median (lowest..highest) of " +
         count_text(r.rounds, "round") + "\n\n" + by_set + table_of(r.results) +
         table_of("rows of a pass", r.costs.by_rows()) +
         table_of("tokens of context", r.costs.by_context()) + table_of(r.costs.by_op()) +
         waiting_of(r) + drafting_of(r) + "\nprefill of " +
         std::to_string(r.costs.prefill_tokens()) +
         " tokens: " + r.costs.prefill_tokens_per_second().text(0) + " tokens/s" +
         "\nreading memory at " + r.bandwidth.text(1) + " GB/s; plain decoding reads " +
         bytes_text(r.weight_bytes) + " of weights a token,\n" + r.share.text(2) +
         " of that speed. All texts were the same, token for token.\n";
}

void draw(const Report& r, double multiply_adds_of_a_row, const std::string& path) {
  Roofline roofline{r.model + " on " + r.device, 1e9 * r.bandwidth.median(),
                    r.arithmetic.median(),       static_cast<double>(r.weight_bytes),
                    multiply_adds_of_a_row,      {}};
  for (const StepCosts::Point& p : r.costs.by_rows())
    roofline.passes.push_back({p.at, p.seconds.median()});
  write_roofline(roofline, path);
}

}  // namespace

int bench(const std::vector<std::string>& args) {
  Options o;
  std::set<std::string> given;
  if (!parse(command(&o), args, &given)) return 0;
  check_together(o, given);
  if (o.svg) {
    expect_other_file(*o.svg, {o.model, o.drafting.draft});
    expect_other_file(*o.svg, o.prompts);
    expect_writable(*o.svg);
  }

  const int threads = o.threads.value_or(cpu::physical_cores());
  auto device = make_backend(o.device, {.threads = threads});
  if (!o.shape.empty())
    return bench_shape(std::move(device),
                       {o.shape, o.type, o.ctx.value_or(512), o.rounds, threads, o.json});
  TimedBackend backend(std::move(device));
  Model model(*o.model);
  LongestPrompt longest;
  std::vector<PromptSet> sets = choose_prompts(o, model, &longest);
  const LlamaConfig config = model.file.tensors.config;
  const int context = choose_context(config, o.ctx, longest, o.n);

  const std::optional<DraftTensors> draft = load_draft_for(model, o.drafting);
  ArithmeticLimit arithmetic_limit(backend, model.file.tensors.layers.front().w_gate);
  const Llama llama = prepare_weights(backend, &model, o.weights == "mapped");
  Session session(llama, {.context = context, .max_nodes = o.drafting.most_nodes()});
  StepCosts costs(llama, &backend, threads);
  const std::vector<Contestant> drafters = choose_drafters(o, draft, llama, context);
  Report report{o,
                model.name(),
                cpu_model() + ", " + backend.description(),
                backend,
                threads,
                llama.weight_bytes(),
                0,
                context,
                0,
                std::move(sets),
                {},
                {},
                {},
                {},
                {},
                costs};
  for (const Contestant& c : drafters) report.results.push_back({c.name, {}, {}, {}});
  for (PromptSet& set : report.sets) {
    set.results = report.results;
    report.n_prompts += set.prompts.size();
  }

  const Interrupt interrupt;
  GenerateOptions options;
  options.max_tokens = o.n;
  if (model.tokenizer.eos() >= 0) options.eos = {model.tokenizer.eos()};
  options.sampling = o.sampling;
  options.cancelled = [&] { return interrupt.asked(); };
  Progress progress;
  progress.show("warming up");
  const CostCache cost_cache(model, llama);
  if (!o.drafting.nodes) cost_cache.tune(&session, o.drafting.tune);
  for (const Contestant& c : drafters)
    generate(session, c.drafter.get(), report.sets.front().prompts.front(), options);
  interrupt.check();

  const auto measure_round = [&] {
    const auto tell = [&](const std::string& what) {
      progress.show("round " + std::to_string(report.rounds + 1) + " of " +
                    std::to_string(o.rounds) + ", " + what);
    };
    const double gb_per_second = read_bandwidth(backend, llama.weight_bytes(), threads);
    std::vector<Total> all(drafters.size());
    std::vector<std::vector<Total>> by_set;
    for (const PromptSet& set : report.sets) {
      by_set.push_back(decode(set, drafters, &session, options, interrupt, tell));
      for (size_t d = 0; d < all.size(); ++d) all[d].add(by_set.back()[d]);
    }
    tell("costs of a step");
    costs.measure_round();
    const double arithmetic = arithmetic_limit.measure();
    interrupt.check();
    for (size_t i = 0; i < by_set.size(); ++i) add_round(by_set[i], &report.sets[i].results);
    add_round(all, &report.results);
    report.arithmetic.add(arithmetic);
    report.bandwidth.add(gb_per_second);
    report.share.add(static_cast<double>(llama.weight_bytes()) * static_cast<double>(all[0].steps) /
                     all[0].seconds / 1e9 / gb_per_second);
  };
  try {
    for (; report.rounds < o.rounds; ++report.rounds) measure_round();
  } catch (const Interrupted&) {
    if (report.rounds == 0) throw;  // else what was measured so far is shown
  }
  progress.show("");
  for (const Contestant& c : drafters)
    if (c.name == "chimera")
      if (const auto* drafter = dynamic_cast<const ChimeraDrafter*>(c.drafter.get()))
        report.drafting = drafter->spent();

  if (o.json)
    print_json(json_of(report));
  else
    print(table_of(report));
  if (o.svg) draw(report, multiply_adds(config), *o.svg);
  return interrupt.exit_code();
}

}  // namespace chimera
