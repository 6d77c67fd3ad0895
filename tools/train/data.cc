// chimera train data: the target answers prompts, many at once, to give a draft model something to
// learn from.
//
// The shard it writes is JSONL. The first line describes it:
//   {"chimera_data":1,"model":"...","fingerprint":"...","prompts":"...","seed":1,"max_tokens":256,
//   "temperatures":[0,0,0.7,1],"shard":"0/1",...}
// and each of the others is one answer:
//   {"prompt":17,"prompt_len":41,"temperature":0.7,"ids":[1,9690,...]}
// ids are the prompt's tokens and the answer's. fingerprint is the model's (draft_file.h), prompts
// a hash of all of them. An answer depends on the model, the prompts, the seed, the settings and
// the prompt's number alone - not on the batch, the shard or the machine. (GPUs have an arithmetic
// of their own: their shards say "device":"cuda".)
#include <algorithm>
#include <charconv>
#include <new>

#include "engine/session.h"
#include "engine/train/target_features.h"
#include "loader/feature_file.h"
#include "tokenizer/unicode.h"
#include "tools/commands.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/prompts.h"
#include "tools/train/shard.h"
#include "tools/train/train.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

struct Options {
  std::optional<std::string> model, prompts, output, shard;
  std::optional<int> threads, own_prompts;
  LineFilter where;
  int n = 256, sequences = 96, max_prompt = 512, limit = 0;
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

std::pair<size_t, size_t> parse_shard(const std::string& text) {
  size_t i = 0, n = 0;
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, i);  // takes no sign and no white space
  const bool slash = first.ec == std::errc() && first.ptr != end && *first.ptr == '/';
  const auto second = std::from_chars(slash ? first.ptr + 1 : end, end, n);
  if (second.ec != std::errc() || second.ptr != end || i >= n)
    throw UsageError("--shard", "i/n with 0 <= i < n, such as 0/4", in_quotes(text));
  return {i, n};
}

// All that the answers depend on but their prompts' numbers: a shard's first line.
ordered_json header_of(const Options& o, const Model& model, std::span<const Prompt> prompts) {
  ordered_json about{{"chimera_data", 1},
                     {"model", model.name()},
                     {"fingerprint", model.fingerprint},
                     {"vocab_size", model.tokenizer.size()},
                     {"seed", o.seed},
                     {"max_tokens", o.n},
                     {"max_prompt", o.max_prompt},
                     {"temperatures", kTemperatures},
                     {"shard", o.shard.value_or("0/1")},
                     {"chat", model.chat_format != ChatFormat::kNone}};
  if (o.prompts) about["prompts"] = hash_of(prompts);
  if (o.own_prompts) about["prompt_temperature"] = kPromptTemperature;
  if (o.device != "cpu") about["device"] = o.device;
  return about;
}

// Where the answers go. Opened before the work begins: what an earlier run left may be of another.
struct Output {
  ShardFile shard;
  std::optional<FeatureFile> features;

  Output(const Options& o, const Model& model, std::span<const Prompt> prompts)
      : shard(*o.output, header_of(o, model, prompts)) {
    if (o.features)
      features.emplace(features_path(*o.output), model.fingerprint,
                       model.file.tensors.config.hidden_size);
  }
};

// Answers the prompts of one shard.
class Answerer {
 public:
  Answerer(const Options& o, std::pair<size_t, size_t> shard, const Model& model,
           const Llama& llama, int context, std::vector<Prompt> prompts, Output* output)
      : o_(o),
        model_(model),
        chat_(model.chat_format != ChatFormat::kNone),
        prompts_(std::move(prompts)),
        shard_(shard.first),
        shards_(shard.second),
        output_(*output),
        session_(llama, {.context = context, .n_sequences = o.sequences, .prefill_rows = 128}),
        recorder_(llama.config(), o.sequences),
        jobs_(static_cast<size_t>(o.sequences)) {
    count_ = o.own_prompts ? static_cast<size_t>(*o.own_prompts) : prompts_.size();
    if (o.limit > 0) count_ = std::min(count_, static_cast<size_t>(o.limit));
    if (o.own_prompts) opening_ = encode_chat(model.tokenizer, model.chat_format, {}, "user");
    // A device's logits are too many for the host to read at each pass: there a finished text goes
    // through the target again, and only the likeliest tokens come back.
    if (output_.features && o.device != "cpu") read_again_.emplace(llama, context);
  }

  // One pass over all sequences; false: there is nothing left to do.
  bool step() {
    bool busy = false;
    for (int s = 0; s < o_.sequences; ++s) {
      while (job(s).prompt == Job::kNone && next_ < count_) begin(s, next_++);
      busy = busy || job(s).prompt != Job::kNone;
    }
    if (!busy || !session_.step(output_.features && !read_again_ ? &recorder_ : nullptr))
      return false;
    for (int s = 0; s < o_.sequences; ++s) {
      if (job(s).prompt == Job::kNone || session_.emitted(s) == 0) continue;
      ++tokens_;
      const auto text = session_.tokens(s);
      const bool ended = text.back() == model_.tokenizer.eos();
      const size_t room = job(s).asks ? static_cast<size_t>(o_.max_prompt)
                                      : job(s).given_tokens + static_cast<size_t>(o_.n);
      if (!ended && text.size() < room) continue;
      session_.stop(s);
      if (job(s).asks)
        take_prompt(s, ended);
      else
        take_answer(s);
    }
    return true;
  }

  std::string progress() const {
    // Prompts of this shard: numbers below count_ that are shard_ modulo shards_.
    const size_t prompts = (count_ + shards_ - 1 - shard_) / shards_;
    return std::to_string(output_.shard.answers() + left_out_) + " of " + std::to_string(prompts) +
           " prompts, " + std::to_string(tokens_) + " tokens, " +
           fixed_text(static_cast<double>(tokens_) / seconds_since(start_), 0) + " tokens/s";
  }
  bool any() const { return output_.shard.answers() > 0 || left_out_ == 0; }
  std::string summary() const {
    return count_text(static_cast<int64_t>(output_.shard.answers()), "answer") + ", " +
           count_text(static_cast<int64_t>(left_out_), "prompt") +
           (o_.own_prompts ? " without an end" : " too long");
  }

 private:
  Job& job(int sequence) { return jobs_[static_cast<size_t>(sequence)]; }

  void begin(int s, size_t prompt) {
    if (prompt % shards_ != shard_ || output_.shard.answered(prompt)) return;
    job(s).prompt = prompt;
    if (o_.own_prompts)
      write(s, /*asks=*/true, opening_);
    else
      answer(s, prompts_[prompt].messages);
  }

  void answer(int s, std::span<const Message> prompt) {
    const std::vector<int32_t> ids = encode(model_, prompt, chat_);
    if (ids.empty() || ids.size() > static_cast<size_t>(o_.max_prompt))
      leave_out(s);
    else
      write(s, /*asks=*/false, ids);
  }

  void leave_out(int s) {
    ++left_out_;
    job(s) = {};
  }

  void write(int s, bool asks, std::span<const int32_t> given) {
    Job& j = job(s);
    j.asks = asks;
    j.given_tokens = given.size();
    session_.start(
        s, given,
        asks ? sampling_of_own_prompt(o_.seed, j.prompt) : sampling_of(o_.seed, j.prompt));
    recorder_.start(s, static_cast<int>(given.size()));
  }

  // The target has written a prompt: it is answered as if a user had sent its text.
  void take_prompt(int s, bool ended) {
    const auto written = session_.tokens(s).subspan(job(s).given_tokens);
    const std::string text = model_.tokenizer.decode(written.first(written.size() - 1));
    const Message message{"user", std::string(trimmed(text))};
    if (!ended || message.content.empty())
      leave_out(s);
    else
      answer(s, {&message, 1});
  }

  void take_answer(int s) {
    Job& j = job(s);
    const auto text = session_.tokens(s);
    const ordered_json record{{"prompt", j.prompt},
                              {"prompt_len", j.given_tokens},
                              {"temperature", sampling_of(o_.seed, j.prompt).temperature},
                              {"ids", text}};
    const auto number = static_cast<int64_t>(output_.shard.answers());
    output_.shard.append(j.prompt, record);
    if (output_.features && text.size() >= j.given_tokens + 2)
      output_.features->append(
          number, read_again_ ? read_again_->read(text, static_cast<int64_t>(j.given_tokens) - 1)
                              : recorder_.take(s, text));
    j = {};
  }

  const Options& o_;
  const Model& model_;
  const bool chat_;
  const std::vector<Prompt> prompts_;  // none where the target writes them
  std::vector<int32_t> opening_;       // of a user's message
  const size_t shard_, shards_;
  size_t count_ = 0, next_ = 0;
  Output& output_;
  Session session_;
  training::FeatureRecorder recorder_;
  std::optional<training::TargetFeatures> read_again_;
  std::vector<Job> jobs_;  // by sequence
  size_t left_out_ = 0;
  int64_t tokens_ = 0;
  const Clock::time_point start_ = Clock::now();
};

// The advice that comes with other errors, a smaller context, cannot be followed here.
Error too_many(const Options& o) {
  return {"memory",
          "enough of it for " + count_text(o.sequences, "answer") + " at once (--sequences)",
          "none left", "try fewer of them, or shorter ones (-n)"};
}

int answer_all(const Options& o, std::pair<size_t, size_t> shard) {
  Model model(*o.model);
  if (o.own_prompts && model.chat_format == ChatFormat::kNone)
    throw Error(printable(*o.model, 4096), "a model with a known chat format for --own-prompts",
                "none", "give --prompts FILE");
  std::vector<Prompt> prompts;
  if (o.prompts)
    prompts =
        load_prompts(*o.prompts, o.strict ? BrokenLines::kStop : BrokenLines::kLeaveOut, o.where);
  const auto backend = make_backend(o.device, {.threads = o.threads.value_or(0)});
  Output output(o, model, prompts);
  const Interrupt interrupt;
  const int context = choose_context(model.file.tensors.config, o.max_prompt + o.n,
                                     {.tokens = static_cast<size_t>(o.max_prompt)}, o.n);
  const Llama llama = prepare_weights(*backend, &model);
  Answerer answerer(o, shard, model, llama, context, std::move(prompts), &output);

  {
    Progress progress;
    while (!interrupt.asked() && answerer.step()) progress.log(answerer.progress());
  }
  note(answerer.summary());
  if (interrupt.asked())
    note("Stopped; the same command goes on.");
  else if (!answerer.any())
    throw Error("train data", "an answer", "none",
                o.own_prompts ? "ask for more prompts"
                              : "give shorter prompts, or raise --max-prompt of train data");
  return interrupt.exit_code();
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
          {'m', "model", "MODEL", "the target: a GGUF or llama2.c file", file(&o.model)},
          {0, "prompts", "FILE", "JSONL or one prompt a line", file(&o.prompts)},
          {0, "own-prompts", "N", "instead: N prompts that the target writes itself, as a user",
           integer(&o.own_prompts, 1, 100000000)},
          where_flag(&o.where),
          {'o', "output", "FILE", "the shard to write or to go on with", file(&o.output)},
          {0, "features", "",
           "keep what the target said of each token beside the shard, in\nSHARD.features, so that "
           "fit need not run it again (1.4 KB a\ntoken for a hidden size of 576)",
           on(&o.features)},
          {'n', "tokens", "N", "tokens of an answer, at most", integer(&o.n, 1, 4096)},
          {0, "max-prompt", "N", "longer prompts are left out", integer(&o.max_prompt, 1, 4096)},
          {0, "strict", "", "stop at a broken line of the file instead of leaving it out",
           on(&o.strict)},
          {0, "limit", "N", "prompts of the file to use; 0: all", integer(&o.limit, 0, 100000000)},
          {0, "sequences", "N", "answers at once", integer(&o.sequences, 1, Step::kMaxSequences)},
          {0, "shard", "I/N", "only prompts whose number is I modulo N", text(&o.shard)},
          {0, "seed", "S", "of the sampled answers", integer(&o.seed)},
          threads_flag(&o.threads),
          {0, "device", "NAME", "cpu or cuda, whose answers differ a little",
           choice(&o.device, {"cpu", "cuda"})},
      }};
  std::set<std::string> given;
  if (!parse(command, args, &given)) return 0;
  expect_given("train data", {{"-m MODEL", o.model.has_value()},
                              {"-o SHARD", o.output.has_value()},
                              {"--prompts FILE or --own-prompts N",
                               o.prompts.has_value() || o.own_prompts.has_value()}});
  if (o.prompts && o.own_prompts)
    throw UsageError("train data", "--prompts FILE or --own-prompts N", "both",
                     "see chimera train data --help");
  if (given.contains("where") && !o.prompts)
    throw UsageError("--where", "--prompts FILE, whose lines it chooses", "none");
  const auto which = parse_shard(o.shard.value_or("0/1"));
  expect_other_file(*o.output, {o.model, o.prompts});

  try {
    return answer_all(o, which);
  } catch (const MemoryError&) {
    throw too_many(o);
  } catch (const std::bad_alloc&) {
    throw too_many(o);
  }
}

}  // namespace chimera
