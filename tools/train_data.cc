// chimera train data: the target answers prompts, many at once, to give a draft model something to
// learn from.
//
// The shard it writes is JSONL. The first line describes it:
//   {"chimera_data":1,"model":"...","seed":1,"max_tokens":256,"temperatures":[0,0,0.7,1],"shard":"0/1",
//   ...}
// and each of the others is one answer:
//   {"prompt":17,"prompt_len":41,"temperature":0.7,"ids":[1,9690,...]}
// ids are the prompt's tokens and the answer's. An answer depends on the model, the seed, the
// settings and the prompt's number alone - not on the batch, the shard or the machine. (GPUs have
// an arithmetic of their own: their shards say "device":"cuda".)
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <unordered_set>

#include "engine/session.h"
#include "engine/train/target_features.h"
#include "loader/feature_file.h"
#include "tools/commands.h"
#include "tools/flags.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/prompts.h"
#include "tools/train.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

volatile std::sig_atomic_t interrupted = 0;

struct Options {
  std::optional<std::string> model, prompts, output, shard;
  int n = 256, sequences = 96, threads = 0, max_prompt = 512, limit = 0, own_prompts = 0;
  bool features = false, strict = false;
  uint64_t seed = 1;
  std::string device = "cpu";
};

// Half of the answers greedy, half sampled: a draft serves both.
constexpr float kTemperatures[] = {0.0f, 0.0f, 0.7f, 1.0f};

// Of prompts that the target writes itself: cooler ones repeat each other, warmer ones make less
// sense.
constexpr float kPromptTemperature = 0.85f;

Sampling sampling_of(uint64_t seed, size_t prompt) {
  Sampling s;
  s.temperature = kTemperatures[prompt % std::size(kTemperatures)];
  s.seed = seed * 1000003 + prompt;
  return s;
}

Sampling sampling_of_own_prompt(uint64_t seed, size_t prompt) {
  Sampling s = sampling_of(seed, prompt);
  s.temperature = kPromptTemperature;
  s.seed = ~s.seed;
  return s;
}

// What a sequence of the session is busy with.
struct Job {
  size_t prompt = kNone;    // its number
  bool asks = false;        // it writes the prompt, not the answer
  size_t given_tokens = 0;  // before what it writes
  static constexpr size_t kNone = SIZE_MAX;
};

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kWhiteSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kWhiteSpace);
  if (begin == std::string_view::npos) return "";
  return text.substr(begin, text.find_last_not_of(kWhiteSpace) + 1 - begin);
}

// The prompts already answered in a shard that an earlier run left, which must have the same
// header. A last line that was cut short is taken off.
std::unordered_set<size_t> resume(const std::string& path, const std::string& header) {
  std::unordered_set<size_t> done;
  std::ifstream file(path, std::ios::binary);
  if (!file) return done;
  std::string line;
  if (!std::getline(file, line) || line != header)
    throw Error(path, "a shard made with the same model and settings", "another file",
                "name another --output, or remove it");
  auto good = static_cast<uint64_t>(line.size() + 1);
  while (std::getline(file, line)) {
    const ordered_json record = ordered_json::parse(line, nullptr, false);
    if (file.eof() || !record.is_object() || !record.contains("prompt")) break;
    done.insert(record["prompt"].get<size_t>());
    good += line.size() + 1;
  }
  file.close();
  std::filesystem::resize_file(path, good);
  return done;
}

std::pair<size_t, size_t> parse_shard(const std::string& text) {
  size_t i = 0, n = 0;
  char rest = 0;
  if (std::sscanf(text.c_str(), "%zu/%zu%c", &i, &n, &rest) != 2 || n == 0 || i >= n)
    throw UsageError("--shard", "i/n with 0 <= i < n, such as 0/4", "'" + text + "'");
  return {i, n};
}

}  // namespace

int train_data(const std::vector<std::string>& args) {
  Options o;
  const Command command{
      "train data",
      "-m MODEL (--prompts FILE | --own-prompts N) -o SHARD [FLAGS]",
      "Answers prompts in the model's chat format, many at once, and writes the token ids: what\n"
      "`chimera train fit` learns from. A run that was stopped goes on where it was.\n",
      {
          {'m', "model", "FILE", "the target: GGUF or llama2.c", text(&o.model)},
          {0, "prompts", "FILE", "JSONL or one prompt a line", text(&o.prompts)},
          {0, "own-prompts", "N", "instead: N prompts that the target writes itself, as a user",
           integer(&o.own_prompts, 1, 100000000)},
          {'o', "output", "FILE", "the shard to write or to go on with", text(&o.output)},
          {0, "features", "",
           "keep what the target said of each token beside the shard, in\nSHARD.features, so that "
           "fit need not run it again (1.4 KB a\ntoken for a hidden size of 576)",
           on(&o.features)},
          {'n', "max-tokens", "N", "tokens of an answer, at most", integer(&o.n, 1, 4096)},
          {0, "max-prompt", "N", "longer prompts are left out", integer(&o.max_prompt, 1, 4096)},
          {0, "strict", "", "stop at a broken line of the file instead of leaving it out",
           on(&o.strict)},
          {0, "limit", "N", "prompts of the file to use; 0: all", integer(&o.limit, 0, 100000000)},
          {0, "sequences", "N", "answers at once", integer(&o.sequences, 1, Step::kMaxSequences)},
          {0, "shard", "I/N", "only prompts whose number is I modulo N", text(&o.shard)},
          {0, "seed", "S", "of the sampled answers", integer(&o.seed)},
          {0, "threads", "N", "0: one for each physical core", integer(&o.threads, 0, 1024)},
          {0, "device", "NAME", "cpu or cuda, whose answers differ a little",
           choice(&o.device, {"cpu", "cuda"})},
      }};
  if (!parse(command, args)) return 0;
  if (!o.model || !o.output || o.prompts.has_value() == (o.own_prompts > 0))
    throw UsageError("train data", "-m MODEL, -o SHARD, and --prompts FILE or --own-prompts N",
                     o.prompts && o.own_prompts > 0 ? "both of them" : "one missing",
                     "see chimera train data --help");
  const auto [shard, shards] = parse_shard(o.shard.value_or("0/1"));

  Model model(*o.model);
  const bool chat = model.chat_format != ChatFormat::kNone;
  if (o.own_prompts > 0 && !chat)
    throw Error(*o.model, "a model with a known chat format for --own-prompts", "none",
                "give --prompts FILE");
  std::vector<Prompt> prompts;
  if (o.prompts)
    prompts = load_prompts(*o.prompts, o.strict ? BrokenLines::kStop : BrokenLines::kLeaveOut);
  size_t count = o.prompts ? prompts.size() : static_cast<size_t>(o.own_prompts);
  if (o.limit > 0) count = std::min(count, static_cast<size_t>(o.limit));
  ordered_json about{{"chimera_data", 1},
                     {"model", model.name()},
                     {"vocab_size", model.tokenizer.size()},
                     {"seed", o.seed},
                     {"max_tokens", o.n},
                     {"max_prompt", o.max_prompt},
                     {"temperatures", kTemperatures},
                     {"shard", o.shard.value_or("0/1")},
                     {"chat", chat}};
  if (o.own_prompts > 0) about["prompt_temperature"] = kPromptTemperature;
  if (o.device != "cpu") about["device"] = o.device;
  const std::string header = about.dump();
  const std::unordered_set<size_t> done = resume(*o.output, header);
  std::ofstream out(*o.output, std::ios::binary | std::ios::app);
  if (done.empty() && std::filesystem::file_size(*o.output) == 0) out << header << "\n";

  const auto backend = make_backend(o.device, {.threads = o.threads});
  const int32_t eos = model.tokenizer.eos();
  const Llama llama = prepare_weights(*backend, &model);
  Session session(llama,
                  {.context = o.max_prompt + o.n, .n_sequences = o.sequences, .prefill_rows = 128});

  std::optional<FeatureFile> features;
  if (o.features)
    features.emplace(features_path(*o.output), model.fingerprint, llama.config().hidden_size);
  training::FeatureRecorder recorder(llama.config(), o.sequences);

  std::vector<Job> jobs(static_cast<size_t>(o.sequences));
  size_t next = 0, answers = done.size(), left_out = 0;
  int64_t tokens = 0;
  const std::vector<int32_t> opening =
      o.own_prompts > 0 ? encode_chat(model.tokenizer, model.chat_format, {}, "user")
                        : std::vector<int32_t>();
  const size_t max_prompt = static_cast<size_t>(o.max_prompt);

  const auto write = [&](int s, bool asks, std::span<const int32_t> given) {
    Job& job = jobs[static_cast<size_t>(s)];
    job.asks = asks;
    job.given_tokens = given.size();
    session.start(
        s, given,
        asks ? sampling_of_own_prompt(o.seed, job.prompt) : sampling_of(o.seed, job.prompt));
    recorder.start(s, static_cast<int>(given.size()));
  };
  // Too long a prompt is left out.
  const auto answer = [&](int s, std::span<const Message> prompt) {
    const std::vector<int32_t> ids = encode(model, prompt, chat);
    if (ids.size() > max_prompt) {
      ++left_out;
      jobs[static_cast<size_t>(s)] = {};
      return;
    }
    write(s, false, ids);
  };

  const auto start = std::chrono::steady_clock::now();
  auto last_note = start;
  std::signal(SIGINT, [](int) { interrupted = 1; });
  for (bool busy = true; busy && !interrupted;) {
    busy = false;
    for (int s = 0; s < o.sequences; ++s) {
      Job& job = jobs[static_cast<size_t>(s)];
      while (job.prompt == Job::kNone && next < count) {
        const size_t candidate = next++;
        if (candidate % shards != shard || done.count(candidate)) continue;
        job.prompt = candidate;
        if (o.prompts)
          answer(s, prompts[candidate]);
        else
          write(s, true, opening);
      }
      busy = busy || job.prompt != Job::kNone;
    }
    if (!busy || !session.step(features ? &recorder : nullptr)) break;
    for (int s = 0; s < o.sequences; ++s) {
      Job& job = jobs[static_cast<size_t>(s)];
      if (job.prompt == Job::kNone || session.emitted(s) == 0) continue;
      ++tokens;
      const auto text = session.tokens(s);
      const auto written = text.subspan(job.given_tokens);
      const bool ended = written.back() == eos;
      const size_t room = job.asks ? max_prompt : job.given_tokens + static_cast<size_t>(o.n);
      if (!ended && text.size() < room) continue;
      if (job.asks) {
        const std::string prompt = model.tokenizer.decode(written.first(written.size() - 1));
        const Message message{"user", std::string(trimmed(prompt))};
        session.stop(s);
        if (!ended || message.content.empty()) {
          ++left_out;
          job = {};
        } else {
          answer(s, {&message, 1});
        }
        continue;
      }
      ordered_json record{{"prompt", job.prompt},
                          {"prompt_len", job.given_tokens},
                          {"temperature", sampling_of(o.seed, job.prompt).temperature},
                          {"ids", text}};
      out << record.dump() << "\n" << std::flush;
      if (!out)
        throw Error(*o.output, "room to write", "none", "free some and run the same command again");
      if (features && written.size() >= 2)
        features->append(static_cast<int64_t>(answers), recorder.take(s, text));
      session.stop(s);
      job = {};
      ++answers;
    }
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - start).count();
    if (now - last_note > std::chrono::seconds(isatty(2) ? 1 : 60)) {
      last_note = now;
      std::fprintf(stderr, "%s%zu of %zu answers, %lld tokens, %.0f tokens/s%s",
                   isatty(2) ? "\r" : "", answers, count / shards, static_cast<long long>(tokens),
                   static_cast<double>(tokens) / seconds, isatty(2) ? "  " : "\n");
    }
  }
  note((isatty(2) ? "\n" : "") + std::to_string(answers) + " answers, " + std::to_string(left_out) +
       (o.prompts ? " prompts too long" : " prompts without an end"));
  return interrupted ? 130 : 0;
}

}  // namespace chimera
