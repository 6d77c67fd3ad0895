// chimera train fit: from texts that the target wrote to a draft model.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <future>
#include <set>

#include "engine/draft_state.h"
#include "engine/error.h"
#include "engine/train/batch_gradient.h"
#include "engine/train/gemm.h"
#include "engine/train/on_policy.h"
#include "engine/train/optimizer.h"
#include "loader/draft_file.h"
#include "loader/load.h"
#include "loader/mapped_file.h"
#include "loader/safetensors.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/output.h"
#include "tools/train/shard.h"
#include "tools/train/train.h"
#include "tools/train/training_texts.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

constexpr double kStepWeight = 0.8;  // of a step of the rollout, to the one before (EAGLE-3)
// Of the target's tokens that are in the dynamic vocabulary: as many as where the draft runs.
constexpr int kTargetsBest = DraftState::kBranch;
constexpr int kVocabulary = 2048;

struct Options {
  std::optional<std::string> model, output, checkpoint, resume, init, licence;
  std::vector<std::string> data;
  int positions = 0, stop_after = 0, batch = 384, micro_batches = 2, steps = 4, on_policy = 0,
      ffn = 512, rank = 64, context = 1024;
  std::optional<int> vocabulary;
  int save_seconds = 300;
  float rate = 2e-3f, minutes = 0;
  std::string device = "cpu", precision = "auto", encoder = "both", slots = "features";
  uint64_t seed = 1;
  std::optional<int> threads;
};

Command command(Options* o) {
  return {
      "train fit",
      "-m MODEL --data SHARD[,SHARD...] -o DRAFT [FLAGS]",
      "Trains a draft model on texts that the target wrote (chimera train data). What the target\n"
      "says of each token is read from SHARD.features; what is not there is computed, and added.\n"
      "Ctrl-C saves and stops; the same command goes on: the same bits as without a break (not\n"
      "with --minutes, or on another device). To begin anew, remove the checkpoint.\n",
      {{'m', "model", "MODEL", "the target: a GGUF or llama2.c file", file(&o->model)},
       {0, "data", "FILES", "shards of texts, separated by commas", files(&o->data)},
       {'o', "output", "DRAFT", "the draft: a safetensors file", file(&o->output)},
       heading("How long"),
       {0, "positions", "N", "positions to start a rollout from; 0: each once",
        integer(&o->positions, 0, 2'000'000'000)},
       {0, "minutes", "M", "end after this time instead, whatever was reached by then",
        number(&o->minutes, 0, 1e6f)},
       {0, "lr", "R", "learning rate after the warm-up", number(&o->rate, 1e-9f, 1)},
       {0, "batch", "N", "positions a step, at least: whole texts are taken",
        integer(&o->batch, 1, 100'000)},
       {0, "micro-batches", "N", "parts of a step, worked on side by side (a GPU has one)",
        integer(&o->micro_batches, 1, 1024)},
       {0, "steps", "K", "steps of a rollout", integer(&o->steps, 1, training::kMaxSteps)},
       {0, "on-policy", "N",
        "decode the texts with the draft, in trees of N nodes, and\n"
        "learn where the target rejects them as well; 0: do not",
        integer(&o->on_policy, 0, training::OnPolicyFeatures::kMostNodes)},
       {0, "device", "NAME", "cpu, cuda, or auto: cuda where it can be had",
        choice(&o->device, {"cpu", "cuda", "auto"})},
       {0, "precision", "P",
        "what products round their elements to; sums are f32. auto:\nbf16 where the device has it",
        choice(&o->precision, {"auto", "f32", "bf16"})},
       {0, "seed", "S", "of the start and of the order of texts", integer(&o->seed)},
       threads_flag(&o->threads),
       heading("The draft"),
       {0, "vocabulary", "N",
        "tokens to choose from besides those of the context and\nthe target's best: the "
        "most frequent of the answers (default: 2048, or those of\n--init)",
        integer(&o->vocabulary, 1, 1 << 24)},
       {0, "ffn", "N", "width of its feed-forward layer", integer(&o->ffn, 1, 1 << 18)},
       {0, "rank", "N", "of the heads' correction; 0: none", integer(&o->rank, 0, 1 << 14)},
       {0, "encoder", "FORM",
        "what it reads of the text: a trigram (the paper's form), the\nlast token alone, or both",
        choice(&o->encoder, {"both", "trigram", "token"})},
       {0, "slots", "FORM",
        "what it attends to: the target's states alone (the paper's\nform), or features of tokens "
        "as well",
        choice(&o->slots, {"features", "states"})},
       {0, "init", "DRAFT", "start from this draft; it says the configuration", file(&o->init)},
       {0, "licence", "TEXT", "to be noted in the file", text(&o->licence)},
       heading("Stopping and going on"),
       {0, "checkpoint", "FILE", "where to save and to go on from (default: DRAFT.checkpoint)",
        file(&o->checkpoint)},
       {0, "save-every", "S", "seconds between two of them",
        integer(&o->save_seconds, 1, 1'000'000)},
       {0, "stop-after", "N", "save and stop at this position; 0: at the end",
        integer(&o->stop_after, 0, 2'000'000'000)},
       {0, "resume", "FILE", "go on from this checkpoint instead", file(&o->resume)},
       {0, "ctx", "N", "longest text; the rest is cut off", integer(&o->context, 8, 1 << 20)}}};
}

// The most frequent tokens of the answers, most frequent first; then by id.
std::vector<int32_t> frequent_tokens(std::span<const Text> texts, int vocab, int n) {
  std::vector<int64_t> count(static_cast<size_t>(vocab));
  for (const Text& t : texts) {
    for (size_t i = static_cast<size_t>(t.prompt_len); i < t.ids.size(); ++i)
      ++count[static_cast<size_t>(t.ids[i])];
  }
  std::vector<int32_t> ids(static_cast<size_t>(vocab));
  for (int32_t i = 0; i < vocab; ++i) ids[static_cast<size_t>(i)] = i;
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
    return count[static_cast<size_t>(a)] > count[static_cast<size_t>(b)];
  });
  ids.resize(static_cast<size_t>(std::min(n, vocab)));
  return ids;
}

// ---- Checkpoints -------------------------------------------------------------------------------

bool all_finite(std::span<const float> values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

// Where a run stands, besides its weights.
struct Position {
  int64_t texts = 0, starts = 0, seconds = 0;
};

const char* encoder_of(const DraftConfig& c) {  // as --encoder says it
  if (!c.trigram) return "token";
  return c.skip ? "both" : "trigram";
}

// What has to be the same for a resumed run to give the same bits. A run that ends by the clock
// cannot promise that, and may be given more time and texts. "auto" stays "auto" on a device where
// it means something else: a run may go on there, though not with the same bits.
ordered_json run_settings(const Options& o, const DraftConfig& c, const TrainingTexts& texts,
                          int64_t total, const std::string& target) {
  const bool by_clock = o.minutes > 0;
  return {{"optimizer", "muon"},
          {"target", target},
          {"texts", by_clock ? 0 : texts.texts().size()},
          {"texts_hash", by_clock ? "" : texts.hash()},
          {"positions", by_clock ? 0 : total},
          {"init", o.init ? printable(std::filesystem::path(*o.init).filename().string()) : ""},
          {"rate", o.rate},
          {"batch", o.batch},
          {"micro_batches", o.micro_batches},
          {"steps", o.steps},
          {"on_policy", o.on_policy},
          {"seed", o.seed},
          {"hidden_size", c.hidden_size},
          {"ffn", c.ffn_size},
          {"rank", c.head_rank},
          {"encoder", encoder_of(c)},
          {"slots", c.slot_features ? "features" : "states"},
          {"ctx", o.context},
          {"precision", o.precision}};
}

void save_checkpoint(const std::string& path, training::Ops<float>* ops,
                     const training::OptimizerState& s, const Position& at,
                     const std::vector<int32_t>& vocabulary, const ordered_json& settings) {
  const int64_t n = s.values.size();
  const std::vector<float> values = ops->get(s.values), first = ops->get(s.first),
                           second = ops->get(s.second), averaged = ops->get(s.averaged);
  write_safetensors(path,
                    {{"values", {n}, SafeType::kF32, values.data()},
                     {"first", {n}, SafeType::kF32, first.data()},
                     {"second", {n}, SafeType::kF32, second.data()},
                     {"averaged", {n}, SafeType::kF32, averaged.data()},
                     {"vocabulary",
                      {static_cast<int64_t>(vocabulary.size())},
                      SafeType::kI32,
                      vocabulary.data()}},
                    {{"chimera_checkpoint", "1"},
                     {"settings", settings.dump()},
                     {"step", std::to_string(s.step)},
                     {"texts", std::to_string(at.texts)},
                     {"starts", std::to_string(at.starts)},
                     {"seconds", std::to_string(at.seconds)}});
}

void load_checkpoint(const std::string& path, const ordered_json& settings,
                     training::Ops<float>* ops, training::OptimizerState* s, Position* at,
                     std::vector<int32_t>* vocabulary) {
  const MappedFile file(path);
  refuse_pickle(file.bytes(), file.name(), "a checkpoint of chimera train fit",
                "the safetensors file that it saved");
  SafeTensors st = parse_safetensors(file.bytes(), file.name());
  const auto meta = [&](const char* key) {
    const auto it = st.metadata.find(key);
    if (it == st.metadata.end())
      throw Error(file.name() + ": metadata", std::string("'") + key + "'", "none",
                  "this is no checkpoint of chimera train");
    return it->second;
  };
  if (meta("chimera_checkpoint") != "1")
    throw Error(file.name(), "version 1 of checkpoints", in_quotes(meta("chimera_checkpoint")));
  ordered_json found = ordered_json::parse(meta("settings"), nullptr, false);
  // Older ones do not say: it was auto, unless somebody had asked for something else; any draft;
  // texts only by their number; there was one form of a draft, and nothing of its own was learnt.
  if (found.is_object() && !found.contains("precision")) found["precision"] = "auto";
  if (found.is_object() && !found.contains("init")) found["init"] = settings["init"];
  if (found.is_object() && !found.contains("texts_hash")) found["texts_hash"] = "";
  if (found.is_object() && !found.contains("encoder")) found["encoder"] = "both";
  if (found.is_object() && !found.contains("slots")) found["slots"] = "features";
  if (found.is_object() && !found.contains("on_policy")) found["on_policy"] = 0;
  expect_same_settings(file.name() + ": settings", settings, found,
                       "give the flags and data that the run was started with, or remove the "
                       "checkpoint to begin anew");
  const auto number = [&](const char* key) {
    const std::string t = meta(key);
    if (t.empty() || t.size() > 15 || t.find_first_not_of("0123456789") != std::string::npos)
      throw Error(file.name() + ": " + key, "a number", in_quotes(t));
    return static_cast<int64_t>(std::stoll(t));
  };
  const auto take = [&](const char* name, SafeType type, int64_t count) -> const SafeTensor& {
    const auto it = st.tensors.find(name);
    if (it == st.tensors.end() || it->second.type != type || it->second.count() != count) {
      throw Error(file.name() + ": " + name, std::to_string(count) + " values",
                  it == st.tensors.end() ? "none" : it->second.shape_text(),
                  "the checkpoint is of another shape");
    }
    return it->second;
  };
  for (const auto& [name, buffer] : {std::pair{"values", &s->values},
                                     {"first", &s->first},
                                     {"second", &s->second},
                                     {"averaged", &s->averaged}}) {
    const std::vector<float> values = take(name, SafeType::kF32, s->values.size()).floats();
    if (!all_finite(values))
      throw Error(file.name() + ": " + name, "finite numbers", "an infinity or NaN",
                  "the checkpoint is damaged");
    ops->put(values, buffer);
  }
  const SafeTensor& ids =
      take("vocabulary", SafeType::kI32, static_cast<int64_t>(vocabulary->size()));
  std::memcpy(vocabulary->data(), ids.data, ids.bytes);
  check_vocabulary(*vocabulary, file.name() + ": vocabulary", "the checkpoint is damaged");
  s->step = number("step");
  *at = {number("texts"), number("starts"), number("seconds")};
  if (at->texts > at->starts)
    throw Error(file.name() + ": texts",
                "at most " + std::to_string(at->starts) + ", one for each start",
                std::to_string(at->texts), "the checkpoint is damaged");
}

// ---- The run -----------------------------------------------------------------------------------

// "loss 3.21, right 38.1 27.0 20.2 15.9%": of each step of the rollout
std::string score_text(const training::Score& s, int steps) {
  std::string text = "loss " + fixed_text(s.weighted_loss(kStepWeight), 3) + ", right";
  for (int k = 0; k < steps; ++k) {
    const training::StepScore& step = s.step[static_cast<size_t>(k)];
    text += " " + percent_text(step.correct, step.rows);
  }
  return text + "%";
}

std::string duration_text(double seconds) {
  const auto s = static_cast<int64_t>(seconds);
  return s < 60     ? std::to_string(s) + " s"
         : s < 6000 ? std::to_string(s / 60) + " min"
                    : fixed_text(static_cast<double>(s) / 3600, 1) + " h";
}

training::Buffer<float> rows_as_f32(training::Ops<float>* ops, const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.rows * view.cols));
  for (int64_t r = 0; r < view.rows; ++r)
    dequantize_row(view.type, view.row(r), view.cols, values.data() + r * view.cols);
  training::Buffer<float> rows;
  ops->put(values, &rows);
  return rows;
}

// Whole texts, until there are `starts` of them; each micro-batch ends when it has its share.
struct Batch {
  std::vector<training::TrainingText> texts;
  std::vector<size_t> ends;  // of micro-batches
  int64_t starts = 0;

  std::vector<training::MicroBatch> parts() const {
    std::vector<training::MicroBatch> parts;
    for (size_t i = 0, begin = 0; i < ends.size(); begin = ends[i++]) {
      if (begin == ends[i]) continue;
      parts.emplace_back();
      for (size_t j = begin; j < ends[i]; ++j) parts.back().push_back(&texts[j]);
    }
    return parts;
  }
};
Batch read_batch(int starts, int micro_batches, TrainingTexts* source,
                 FunctionRef<training::TrainingText(const Text&)> read) {
  Batch batch;
  for (int64_t i = 1; i <= micro_batches; ++i) {
    while (batch.starts < (starts * i + micro_batches - 1) / micro_batches) {
      batch.texts.push_back(read(source->next()));
      batch.starts += batch.texts.back().n_starts();
    }
    batch.ends.push_back(batch.texts.size());
  }
  return batch;
}

// What the flags make of this machine.
struct Compute {
  bool on_gpu = false;
  training::Precision precision = training::Precision::kF32;
  int threads = 1;
};
Compute choose_compute(const Options& o) {
  Compute c;
  c.on_gpu = o.device == "cuda" || (o.device == "auto" && cuda_available());
  const bool has_bf16 = c.on_gpu || training::machine_has(training::Precision::kBF16);
  const bool bf16 = o.precision == "auto" ? has_bf16 : o.precision == "bf16";
  if (bf16 && !has_bf16) throw Error("--precision", "f32, all that this processor has", "bf16");
  if (bf16) c.precision = training::Precision::kBF16;
  c.threads = o.threads.value_or(cpu::physical_cores());
  return c;
}

void check_given(const Options& o, const std::set<std::string>& given) {
  const std::string see_help = "see chimera train fit --help";
  if (!o.model) throw UsageError("train fit", "-m MODEL", "none", see_help);
  if (o.data.empty()) throw UsageError("train fit", "--data FILES", "none", see_help);
  if (!o.output) throw UsageError("train fit", "-o DRAFT", "none", see_help);
  if (o.on_policy > 0 && o.steps < 2)
    throw UsageError("--steps", "2 at least, where --on-policy learns after the draft's tokens",
                     std::to_string(o.steps));
  for (const std::string flag : {"ffn", "rank", "encoder", "slots"})
    if (o.init && given.contains(flag))
      throw UsageError("--" + flag, "no --init, whose draft has its form already", "both");
}

// What the run starts from: a draft that was there, or random weights.
DraftTensors first_draft(const Options& o, const LlamaTensors& target,
                         const std::string& target_fingerprint, std::span<const Text> texts) {
  const std::string target_name = printable(target.name);
  DraftTensors draft;
  if (o.init) {
    draft = load_draft(*o.init);
    if (draft.target_fingerprint != target_fingerprint) {
      throw Error(printable(*o.init, 4096), "a draft for " + target_name,
                  "one for " + printable(draft.target_name), "train one from scratch");
    }
    // It was calibrated with the weights that it had.
    draft.config.greedy = draft.config.sampled = {};
    if (o.vocabulary && draft.vocabulary.size() > static_cast<size_t>(*o.vocabulary))
      draft.vocabulary.resize(static_cast<size_t>(*o.vocabulary));  // most frequent first
  } else {
    DraftConfig c = training::config_for(target.config);
    c.ffn_size = o.ffn;
    c.head_rank = o.rank;
    c.n_steps = o.steps;
    c.trigram = o.encoder != "token";
    c.skip = o.encoder != "trigram";
    c.slot_features = o.slots == "features";
    std::vector<float> norm(static_cast<size_t>(c.hidden_size));
    const TensorView& view = target.output_norm;
    dequantize_row(view.type, view.data, view.cols, norm.data());
    draft = training::initial_draft(c, norm, o.seed);
    draft.vocabulary =
        frequent_tokens(texts, target.config.vocab_size, o.vocabulary.value_or(kVocabulary));
  }
  draft.target_name = target_name;
  draft.target_fingerprint = target_fingerprint;
  if (o.licence) draft.licence = *o.licence;
  check(draft, target.config);  // now, not after hours
  return draft;
}

// Where a run stands, and what is saved of it.
struct Run {
  const Options& o;
  const std::string checkpoint;
  const ordered_json settings;
  const int64_t total;  // positions
  training::Ops<float>* const ops;
  training::BatchGradient* const gradient_of;
  const std::vector<training::TrainingText>& validation;
  DraftTensors draft;
  training::OptimizerState state;
  Position at;
  const int64_t seconds_before = at.seconds;
  const Clock::time_point begin = Clock::now();

  double progress() const {
    return o.minutes > 0 ? (static_cast<double>(seconds_before) + seconds_since(begin)) /
                               (60 * static_cast<double>(o.minutes))
                         : static_cast<double>(at.starts) / static_cast<double>(total);
  }
};

// The same bits would come again from a checkpoint: only another rate helps.
[[noreturn]] void refuse_not_finite(const Run& run, const std::string& where,
                                    const std::string& expected) {
  const bool saved =
      std::filesystem::exists(run.checkpoint) && std::filesystem::exists(*run.o.output);
  throw Error(where, expected, "NaN or infinity",
              "begin again with a smaller --lr" +
                  (saved ? " and --init " + printable(*run.o.output, 4096) +
                               ", the draft saved last; remove " + printable(run.checkpoint, 4096)
                         : ""));
}

void save(Run* run) {
  std::vector<training::MicroBatch> each;
  for (const training::TrainingText& text : run->validation) each.push_back({&text});
  const training::Score score =
      run->gradient_of->run(run->state.averaged.data(), each, run->o.steps, kStepWeight, nullptr);
  const std::vector<float> averaged = run->ops->get(run->state.averaged);
  if (!all_finite(averaged) || !std::isfinite(score.weighted_loss(kStepWeight)))
    refuse_not_finite(*run, "saving after step " + std::to_string(run->state.step),
                      "finite weights and a finite loss of the held out texts");
  const std::string validated = score_text(score, run->o.steps);
  run->at.seconds = run->seconds_before + static_cast<int64_t>(seconds_since(run->begin));
  save_checkpoint(run->checkpoint, run->ops, run->state, run->at, run->draft.vocabulary,
                  run->settings);
  training::unpack_parameters(averaged, &run->draft);
  ordered_json record{{"positions", run->at.starts}, {"texts", run->at.texts},
                      {"steps", run->state.step},    {"seconds", run->at.seconds},
                      {"held_out", validated},       {"settings", run->settings}};
  if (run->o.minutes == 0) record["of"] = run->total;
  run->draft.training = record.dump();
  save_draft(run->draft, *run->o.output);
  note("held out: " + validated + "; saved at " + std::to_string(run->at.starts) + " positions");
}

// Every ten seconds: how the steps since then went.
class Report {
 public:
  explicit Report(const Run& run) : run_(run), starts_(run.at.starts), told_(run.begin) {}

  void add(const training::Score& score) {
    recent_ += score;
    const double s = seconds_since(told_);
    if (s < 10) return;
    const Options& o = run_.o;
    const double speed = static_cast<double>(run_.at.starts - starts_) / s;
    const double left = o.minutes > 0 ? (1 - run_.progress()) * 60 * static_cast<double>(o.minutes)
                                      : static_cast<double>(run_.total - run_.at.starts) / speed;
    note(std::to_string(run_.at.starts) +
         (o.minutes > 0 ? " positions: " : " of " + std::to_string(run_.total) + ": ") +
         score_text(recent_, o.steps) + ", " + fixed_text(speed, 0) + " positions/s, " +
         duration_text(std::max(left, 0.0)) + " left");
    recent_ = {};
    told_ = Clock::now();
    starts_ = run_.at.starts;
  }

 private:
  const Run& run_;
  int64_t starts_;
  Clock::time_point told_;
  training::Score recent_;
};

// Steps until the end, --stop-after or Ctrl-C; saves now and then, and at last.
// ahead: reads a batch while the one before is learnt from.
void learn(Run* run, const std::function<Batch()>& read, bool ahead, const Interrupt& interrupt) {
  const Options& o = run->o;
  const training::ParameterLayout layout(run->draft.config);
  training::OptimizerOptions options;
  options.rate = o.rate;
  training::Optimizer optimizer(options, layout, run->ops);
  training::Buffer<float> gradient;
  run->ops->need(&gradient, static_cast<int64_t>(layout.total));
  Report report(*run);
  Clock::time_point saved = run->begin;
  std::future<Batch> next;
  while (run->progress() < 1 && !interrupt.asked() &&
         (o.stop_after == 0 || run->at.starts < o.stop_after)) {
    const Batch batch = next.valid() ? next.get() : read();
    if (ahead) next = std::async(std::launch::async, read);
    const training::Score score = run->gradient_of->run(run->state.values.data(), batch.parts(),
                                                        o.steps, kStepWeight, gradient.data());
    const double rate = training::learning_rate(options, run->progress());
    const double norm = optimizer.step(rate, gradient.data(), &run->state);
    if (!std::isfinite(norm) || !std::isfinite(score.weighted_loss(kStepWeight))) {
      refuse_not_finite(*run, "training step " + std::to_string(run->state.step + 1),
                        "a finite loss and gradient");
    }
    run->at.texts += static_cast<int64_t>(batch.texts.size());
    run->at.starts += batch.starts;
    report.add(score);
    if (seconds_since(saved) >= o.save_seconds) {
      save(run);
      saved = Clock::now();
    }
  }
  save(run);
}

}  // namespace

int train_fit(const std::vector<std::string>& args) {
  Options o;
  std::set<std::string> given;
  if (!parse(command(&o), args, &given)) return 0;
  check_given(o, given);
  const Compute compute = choose_compute(o);
  const std::string checkpoint = o.checkpoint.value_or(*o.output + ".checkpoint");
  for (const std::string& path : {*o.output, checkpoint}) {
    expect_other_file(path, o.data);
    expect_other_file(path, {o.model});
    expect_writable(path);
  }
  expect_other_file(checkpoint, {o.output, o.init});

  // The target, and what the draft reads of it. (On policy the draft is asked by the host.)
  const auto backend = make_backend(compute.on_gpu && o.on_policy == 0 ? "cuda" : "cpu",
                                    {.threads = compute.threads});
  training::TrainingDevice device =
      compute.on_gpu
          ? training::TrainingDevice{training::make_cuda_training_ops(compute.precision), {}}
          : training::cpu_training_device(o.micro_batches, compute.threads, compute.precision);
  training::Ops<float>* ops = device.all.get();
  const ModelFile model = load_model(*o.model);
  for (const std::string& warning : model.warnings) note("warning: " + warning);
  const LlamaTensors& t = model.tensors;
  const std::string target = fingerprint(t, model.vocabulary);
  const int context = std::min(o.context, t.config.max_context);
  TrainingTexts source(o.data, {t.name, target, t.config.vocab_size}, context, o.seed);
  const auto n_texts = source.texts().size();
  int64_t available = 0;
  for (const Text& text : source.texts()) available += text.n_starts();
  const int64_t total = o.positions > 0 ? o.positions : available;

  DraftTensors draft = first_draft(o, t, target, source.texts());
  const ordered_json settings = run_settings(o, draft.config, source, total, target);
  training::OptimizerState state = training::start_optimizer(ops, training::pack_parameters(draft));
  Position at;
  if (o.resume || std::filesystem::exists(checkpoint)) {
    const std::string& from = o.resume ? *o.resume : checkpoint;
    load_checkpoint(from, settings, ops, &state, &at, &draft.vocabulary);
    check(draft, t.config);
    note("Going on from " + printable(from, 4096) + ", at " + std::to_string(at.starts) +
         " positions" + (o.resume ? "" : "; remove it to begin anew"));
  }

  const training::Buffer<float> embedding = rows_as_f32(ops, t.embedding),
                                head = t.head.empty() ? embedding : rows_as_f32(ops, t.head);
  const Llama llama(*backend, t, [&](std::span<const std::byte> bytes) { model.file.drop(bytes); });
  const Interrupt interrupt;  // from here on something is written, which is to be whole
  TextFeatures features(llama, target, o.data, context);
  training::BatchGradient gradient_of(&device, draft.config, embedding.data(), head.data(),
                                      t.config.vocab_size, draft.vocabulary, kTargetsBest);
  note(draft.target_name + ": " + count_text(static_cast<int64_t>(n_texts), "text") + ", " +
       std::to_string(available) + " positions, and " +
       count_text(static_cast<int64_t>(source.held_out().size()), "text") +
       " held out; a draft of " +
       fixed_text(static_cast<double>(training::ParameterLayout(draft.config).total) / 1e6, 1) +
       " M parameters, " + std::to_string(draft.vocabulary.size()) + " tokens to choose from");

  std::vector<training::TrainingText> validation;
  for (const Text& text : source.held_out()) {
    validation.push_back(features.read(text));
    interrupt.check();
  }
  source.skip(at.texts);
  Run run{o,          checkpoint,       settings,         total, ops, &gradient_of,
          validation, std::move(draft), std::move(state), at};
  std::optional<training::OnPolicyFeatures> on_policy;
  if (o.on_policy > 0) on_policy.emplace(llama, context, o.on_policy, o.steps - 1);
  const auto read = [&] {
    if (on_policy) {
      training::unpack_parameters(ops->get(run.state.averaged), &run.draft);
      on_policy->use(run.draft);
    }
    return read_batch(
        o.batch, compute.on_gpu ? 1 : o.micro_batches, &source, [&](const Text& text) {
          return on_policy ? on_policy->read(text.ids, text.prompt_len - 1) : features.read(text);
        });
  };
  // A GPU leaves the CPU idle. (On policy a batch depends on what the one before taught.)
  learn(&run, read, /*ahead=*/compute.on_gpu && !on_policy, interrupt);
  if (run.progress() >= 1) return 0;
  const bool elsewhere = o.resume && *o.resume != checkpoint;
  note(std::string("Stopped; the same command ") + (elsewhere ? "without --resume " : "") +
       "goes on from " + printable(checkpoint, 4096) + ".");
  return interrupt.exit_code();
}

}  // namespace chimera
