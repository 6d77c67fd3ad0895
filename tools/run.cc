// chimera run: a prompt in, text out.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "engine/error.h"
#include "engine/generate.h"
#include "tokenizer/stream_decoder.h"
#include "tools/commands.h"
#include "tools/cost_cache.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/machine.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/prompts.h"

namespace chimera {
namespace {

constexpr int kTokensUnasked = 2048;         // room for an answer if there is no -n
constexpr size_t kLongestPrompt = 64 << 20;  // bytes

struct Options {
  std::optional<std::string> model, prompt, file, system;
  std::optional<int> n, ctx, threads;
  std::string drafter = "best", device = "auto", kv = "f16", weights = "packed";
  DrafterFlags drafting;
  Sampling sampling;
  bool chat = false, raw = false, eager = false, json = false;
};

Command command(Options* o) {
  Command command{
      "run",
      "-m MODEL [-p TEXT | -f FILE] [FLAGS]",
      "Answers a prompt. The text goes to standard output and nothing else does; figures and\n"
      "warnings go to standard error. Ctrl-C ends the text early.\n",
      {heading("Prompt (from standard input without -p and -f)"),
       {'p', "prompt", "TEXT", "the prompt itself", text(&o->prompt)},
       {'f', "file", "FILE", "a file that holds it", file(&o->file)},
       {0, "chat", "", "ask in the model's chat format (default where it has one)", on(&o->chat)},
       {0, "raw", "", "continue the prompt as it stands", on(&o->raw)},
       {0, "system", "TEXT", "the system message of the chat", text(&o->system)},
       heading("Text"),
       {'n', "tokens", "N",
        "tokens to generate, at most\n(default: until the text or the context ends)",
        integer(&o->n, 1, kLongestContext)},
       {0, "temp", "T", "temperature; 0 takes the likeliest token each time",
        number(&o->sampling.temperature, 0, 1000)},
       {0, "top-k", "K", "sample from the K likeliest tokens; 0: from all",
        integer(&o->sampling.top_k, 0, 1 << 24)},
       {0, "top-p", "P", "... from the likeliest that make up P; 1: from all",
        number(&o->sampling.top_p, 1e-6f, 1)},
       {0, "min-p", "P", "... from those at least P times as likely as the likeliest",
        number(&o->sampling.min_p, 0, 1)},
       {0, "seed", "S", "same seed, same text", integer(&o->sampling.seed)},
       heading("Speed (none of these changes the text)"),
       {0, "drafter", "NAME",
        "who guesses the next tokens: ngram (what the text has\nsaid before), chimera (a draft "
        "model), hybrid (both),\nstatic (a draft model, in the shape of --tree), none, or best\n"
        "(static with --tree, hybrid with --draft, else ngram)",
        choice(&o->drafter, {"none", "ngram", "chimera", "hybrid", "static", "best"})},
       threads_flag(&o->threads),
       {0, "eager", "", "launch a step's ops one by one on the GPU, for debugging", on(&o->eager)},
       heading("Model, device and memory"),
       {'m', "model", "MODEL", "a GGUF or llama2.c file", file(&o->model)},
       {0, "device", "NAME",
        "cpu, cuda or auto (cuda where there is a GPU); each rounds\nin its own way, so texts may "
        "differ between them",
        choice(&o->device, {"cpu", "cuda", "auto"})},
       {0, "ctx", "N",
        "tokens of prompt and text together, at most (default:\nwhat the prompt and -n need, 2048 "
        "more than the prompt\n"
        "without -n, and no more than the model was trained for)",
        integer(&o->ctx, 1, kLongestContext)},
       {0, "kv", "TYPE", "keys and values as f16, or as f32 in twice the memory",
        choice(&o->kv, {"f16", "f32"})},
       {0, "weights", "HOW",
        "packed for this machine, or mapped: read where the file\nhas them, without a copy, shared "
        "between processes; slower",
        choice(&o->weights, {"packed", "mapped"})},
       heading("Output"),
       {0, "json", "", "print one JSON object instead: text, ids and figures", on(&o->json)}}};
  const auto drafter = std::find_if(command.flags.begin(), command.flags.end(),
                                    [](const Flag& flag) { return flag.name == "drafter"; });
  const std::vector<Flag> drafting = o->drafting.flags();
  command.flags.insert(drafter + 1, drafting.begin(), drafting.end());
  return command;
}

void check_together(Options* options) {
  Options& o = *options;
  const std::string see_help = "see chimera run --help";
  if (!o.model) throw UsageError("run", "-m MODEL", "none", see_help);
  if (o.prompt && o.file) throw UsageError("run", "-p or -f", "both", see_help);
  if (o.chat && o.raw) throw UsageError("run", "--chat or --raw", "both", see_help);
  if (o.raw && o.system) throw UsageError("--system", "a chat", "--raw", "put it into the prompt");
  if (o.drafter == "best")
    o.drafter = !o.drafting.tree.empty() ? "static" : o.drafting.draft ? "hybrid" : "ngram";
  o.drafting.check(o.drafter);
  if (o.drafter == "none" || o.drafter == "ngram") o.drafting.draft.reset();  // which need none
}

// All of a stream, which may be a pipe. The last newline is dropped: editors and `echo` add it.
std::string read_all(std::FILE* file, const std::string& name) {
  std::string text;
  char buffer[1 << 16];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;) {
    text.append(buffer, n);
    if (text.size() > kLongestPrompt) throw Error(name, "a prompt of at most 64 MiB", "more");
  }
  if (std::ferror(file)) throw Error(name, "a readable file", std::strerror(errno));
  check_utf8(name, text);
  if (text.ends_with('\n')) text.pop_back();
  if (text.ends_with('\r')) text.pop_back();
  return text;
}

std::string read_prompt(const Options& o) {
  if (o.prompt) {
    check_utf8("-p", *o.prompt);
    return *o.prompt;
  }
  if (o.file) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(o.file->c_str(), "rb"),
                                                               std::fclose);
    if (!file) throw Error(printable(*o.file, 4096), "a readable file", std::strerror(errno));
    std::string text = read_all(file.get(), printable(*o.file, 4096));
    if (text.empty()) throw Error(printable(*o.file, 4096), "a prompt", "nothing");
    return text;
  }
  if (isatty(STDIN_FILENO)) note("The prompt, please; Ctrl-D on a line of its own ends it.");
  std::string text = read_all(stdin, "standard input");
  if (text.empty()) {
    throw UsageError("standard input", "a prompt", "nothing", "give one with -p TEXT or -f FILE");
  }
  return text;
}

// plain_seconds: of a plain step; 0: this was plain decoding.
std::string figures(const Generation& g, double plain_seconds) {
  std::string speedup;
  if (plain_seconds > 0 && g.tokens_per_second() > 0)
    speedup = " (" + fixed_text(g.tokens_per_second() * plain_seconds, 2) + " times plain)";
  return "prompt: " + count_text(g.prompt_tokens, "token") + ", " +
         fixed_text(g.prompt_tokens_per_second(), 1) +
         " tokens/s | generated: " + count_text(static_cast<int64_t>(g.ids.size()), "token") +
         ", " + fixed_text(g.tokens_per_second(), 1) + " tokens/s" + speedup +
         " | steps: " + std::to_string(g.steps) +
         ", tokens per step (tau): " + fixed_text(g.tokens_per_step(), 2) +
         " | first token: " + fixed_text(g.prompt_seconds, 3) +
         " s | peak memory: " + bytes_text(peak_memory_bytes());
}

}  // namespace

int run(const std::vector<std::string>& args) {
  Options o;
  if (!parse(command(&o), args)) return 0;
  check_together(&o);

  // The prompt is read and measured before the weights are: most mistakes show at once.
  Clock::time_point start = Clock::now();
  const auto backend = make_backend(o.device, {.threads = o.threads.value_or(0), .eager = o.eager});
  if (o.eager && backend->name() != "cuda")
    throw UsageError("--eager", "a GPU, for which it is", "device " + backend->name());
  Model model(*o.model);
  double load_seconds = seconds_since(start);

  const bool chat = o.chat || (!o.raw && model.chat_format != ChatFormat::kNone);
  if (o.system && !chat) {
    throw UsageError("--system", "a model with a chat format", "none", "put it into the prompt");
  }
  std::vector<Message> messages;
  if (o.system) {
    check_utf8("--system", *o.system);
    messages.push_back({"system", *o.system});
  }
  messages.push_back({"user", read_prompt(o)});
  const std::vector<int32_t> prompt = encode(model, messages, chat);
  if (prompt.empty())
    throw UsageError("prompt", "text", "none", "this model cannot start from nothing");
  const int context = choose_context(model.file.tensors.config, o.ctx, {.tokens = prompt.size()},
                                     o.n.value_or(kTokensUnasked));

  start = Clock::now();
  std::optional<DraftTensors> draft = load_draft_for(model, o.drafting);
  const Llama llama = prepare_weights(*backend, &model, o.weights == "mapped");
  const bool plain = o.drafter == "none";
  Session session(llama, {.context = context,
                          .max_nodes = o.drafting.nodes_of(o.drafter),
                          .kv_type = o.kv == "f32" ? DType::kF32 : DType::kF16});
  const auto drafter = make_drafter(o.drafter, o.drafting, draft, llama, context);
  draft.reset();  // its weights are packed by now
  return_freed_memory();
  const CostCache costs(model, llama);
  if (!plain && o.drafter != "static" && !o.drafting.nodes) costs.tune(&session, o.drafting.tune);
  load_seconds += seconds_since(start);
  const Interrupt interrupt;
  if (!o.json) {
    note(model.name() + " on " + backend->description() + ", loaded in " +
         fixed_text(load_seconds, 2) + " s");
  }

  GenerateOptions options;
  options.max_tokens = o.n.value_or(-1);
  if (model.tokenizer.eos() >= 0) options.eos = {model.tokenizer.eos()};
  options.sampling = o.sampling;
  StreamDecoder decoder(model.tokenizer, /*at_text_start=*/chat || messages.back().content.empty());
  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += piece;
    if (!o.json && !piece.empty()) print(piece);
  };
  options.cancelled = [&] { return interrupt.asked(); };
  const Generation g = generate(session, drafter.get(), prompt, options,
                                [&](int32_t id) { emit(decoder.push(id)); });
  emit(decoder.finish());
  if (!text.ends_with('\n') && !o.json) print("\n");

  if (o.json) {
    print_json({{"text", text},
                {"stop", stop_name(g.stop)},
                {"prompt_ids", prompt},
                {"ids", g.ids},
                {"model", model.name()},
                {"chat_format", chat ? name(model.chat_format) : "none"},
                {"context", context},
                {"drafter", o.drafter},
                {"nodes", o.drafting.nodes_of(o.drafter)},
                {"device", backend->name()},
                {"isa", backend->isa()},
                {"contract_version", backend->contract_version()},
                {"steps", g.steps},
                {"drafted", g.drafted},
                {"tokens_per_step", g.tokens_per_step()},
                {"tokens_per_second", g.tokens_per_second()},
                {"prompt_tokens_per_second", g.prompt_tokens_per_second()},
                {"seconds_to_first_token", g.prompt_seconds},
                {"load_seconds", load_seconds},
                {"peak_memory_bytes", peak_memory_bytes()}});
  } else {
    if (g.stop == Stop::kLength && session.full(0) && static_cast<int>(g.ids.size()) != o.n) {
      note("The context of " + std::to_string(context) +
           " tokens is full; --ctx N makes room for more.");
    }
    note(figures(g, plain || g.ids.empty() ? 0 : session.plain_seconds()));
  }
  return g.stop == Stop::kCancelled ? interrupt.exit_code() : 0;
}

}  // namespace chimera
