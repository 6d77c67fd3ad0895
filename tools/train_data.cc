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
  int n = 256, sequences = 96, threads = 0, max_prompt = 512, limit = 0;
  bool features = false, strict = false;
  uint64_t seed = 1;
  std::string device = "cpu";
};

// Half of the answers greedy, half sampled: a draft serves both.
constexpr float kTemperatures[] = {0.0f, 0.0f, 0.7f, 1.0f};

Sampling sampling_of(uint64_t seed, size_t prompt) {
  Sampling s;
  s.temperature = kTemperatures[prompt % std::size(kTemperatures)];
  s.seed = seed * 1000003 + prompt;
  return s;
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
      "-m MODEL --prompts FILE -o SHARD [FLAGS]",
      "Answers prompts in the model's chat format, many at once, and writes the token ids: what\n"
      "`chimera train fit` learns from. A run that was stopped goes on where it was.\n",
      {
          {'m', "model", "FILE", "the target: GGUF or llama2.c", text(&o.model)},
          {0, "prompts", "FILE", "JSONL or one prompt a line", text(&o.prompts)},
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
  if (!o.model || !o.prompts || !o.output)
    throw UsageError("train data", "-m MODEL, --prompts FILE and -o SHARD", "one missing",
                     "see chimera train data --help");
  const auto [shard, shards] = parse_shard(o.shard.value_or("0/1"));

  Model model(*o.model);
  const bool chat = model.chat_format != ChatFormat::kNone;
  const std::vector<Prompt> prompts =
      load_prompts(*o.prompts, o.strict ? BrokenLines::kStop : BrokenLines::kLeaveOut);
  const size_t count =
      o.limit > 0 ? std::min(prompts.size(), static_cast<size_t>(o.limit)) : prompts.size();
  ordered_json about{{"chimera_data", 1},
                     {"model", model.name()},
                     {"vocab_size", model.tokenizer.size()},
                     {"seed", o.seed},
                     {"max_tokens", o.n},
                     {"max_prompt", o.max_prompt},
                     {"temperatures", kTemperatures},
                     {"shard", o.shard.value_or("0/1")},
                     {"chat", chat}};
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

  std::vector<size_t> running(static_cast<size_t>(o.sequences),
                              SIZE_MAX);  // prompt of each sequence
  std::vector<size_t> prompt_len(static_cast<size_t>(o.sequences));
  size_t next = 0, answers = done.size(), left_out = 0;
  int64_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  auto last_note = start;
  std::signal(SIGINT, [](int) { interrupted = 1; });
  for (bool busy = true; busy && !interrupted;) {
    busy = false;
    for (int s = 0; s < o.sequences; ++s) {
      size_t& prompt = running[static_cast<size_t>(s)];
      while (prompt == SIZE_MAX && next < count) {
        const size_t candidate = next++;
        if (candidate % shards != shard || done.count(candidate)) continue;
        const std::vector<int32_t> ids = encode(model, prompts[candidate], chat);
        if (ids.size() > static_cast<size_t>(o.max_prompt)) {
          ++left_out;
          continue;
        }
        session.start(s, ids, sampling_of(o.seed, candidate));
        recorder.start(s, static_cast<int>(ids.size()));
        prompt = candidate;
        prompt_len[static_cast<size_t>(s)] = ids.size();
      }
      busy = busy || prompt != SIZE_MAX;
    }
    if (!busy || !session.step(features ? &recorder : nullptr)) break;
    for (int s = 0; s < o.sequences; ++s) {
      size_t& prompt = running[static_cast<size_t>(s)];
      if (prompt == SIZE_MAX || session.emitted(s) == 0) continue;
      ++tokens;
      const auto text = session.tokens(s);
      const size_t length = text.size() - prompt_len[static_cast<size_t>(s)];
      if (text.back() != eos && length < static_cast<size_t>(o.n)) continue;
      ordered_json record{{"prompt", prompt},
                          {"prompt_len", prompt_len[static_cast<size_t>(s)]},
                          {"temperature", sampling_of(o.seed, prompt).temperature},
                          {"ids", text}};
      out << record.dump() << "\n" << std::flush;
      if (!out)
        throw Error(*o.output, "room to write", "none", "free some and run the same command again");
      if (features && length >= 2)
        features->append(static_cast<int64_t>(answers), recorder.take(s, text));
      session.stop(s);
      prompt = SIZE_MAX;
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
       " prompts too long");
  return interrupted ? 130 : 0;
}

}  // namespace chimera
