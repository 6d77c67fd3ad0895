// chimera train fit: from texts that the target wrote to a draft model.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>

#include "engine/train/batch_gradient.h"
#include "engine/train/gemm.h"
#include "engine/train/optimizer.h"
#include "loader/draft_file.h"
#include "loader/load.h"
#include "loader/mapped_file.h"
#include "loader/safetensors.h"
#include "loader/text.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/output.h"
#include "tools/train/train.h"
#include "tools/train/training_texts.h"

namespace chimera {

namespace {

constexpr double kStepWeight = 0.8;  // of a step of the rollout, to the one before (EAGLE-3)
constexpr int kTargetsBest = 8;      // of the target's tokens are in the dynamic vocabulary

struct Options {
  std::optional<std::string> model, output, checkpoint, resume, init, licence;
  std::vector<std::string> data;
  int positions = 0, stop_after = 0, batch = 384, micro_batches = 2, steps = 4, vocabulary = 2048,
      ffn = 512, rank = 64, context = 1024;
  int save_seconds = 300;
  float rate = 2e-3f, minutes = 0;
  std::string device = "cpu", precision = "auto";
  uint64_t seed = 1;
  std::optional<int> threads;
};

Command command(Options* o) {
  return {
      "train fit",
      "-m MODEL --data SHARD[,SHARD...] -o DRAFT [FLAGS]",
      "Trains a draft model on texts that the target wrote (chimera train data). What the target\n"
      "says of each token is read from SHARD.features; what is not there is computed, and added.\n"
      "Ctrl-C saves and stops; --resume goes on.\n",
      {{'m', "model", "MODEL", "the target: a GGUF or llama2.c file", text(&o->model)},
       {0, "data", "FILES", "shards of texts, separated by commas", texts(&o->data)},
       {'o', "output", "DRAFT", "the draft: a safetensors file", text(&o->output)},
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
        "most frequent of the answers",
        integer(&o->vocabulary, 1, 1 << 24)},
       {0, "ffn", "N", "width of its feed-forward layer", integer(&o->ffn, 1, 1 << 18)},
       {0, "rank", "N", "of the heads' correction; 0: none", integer(&o->rank, 0, 1 << 14)},
       {0, "init", "DRAFT", "start from this draft; it says the configuration", text(&o->init)},
       {0, "licence", "TEXT", "to be noted in the file", text(&o->licence)},
       heading("Stopping and going on"),
       {0, "checkpoint", "FILE", "where to save (default: DRAFT.checkpoint)", text(&o->checkpoint)},
       {0, "save-every", "S", "seconds between two of them",
        integer(&o->save_seconds, 1, 1'000'000)},
       {0, "stop-after", "N", "save and stop at this position; 0: at the end",
        integer(&o->stop_after, 0, 2'000'000'000)},
       {0, "resume", "FILE",
        "go on from a checkpoint: the same bits as without a break\n(but for --minutes, or on "
        "another "
        "device)",
        text(&o->resume)},
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

// Where a run stands, besides its weights.
struct Position {
  int64_t texts = 0, starts = 0, seconds = 0;
};

// What has to be the same for a resumed run to give the same bits. A run that ends by the clock
// cannot promise that, and may be given more time and texts.
std::string run_settings(const Options& o, const DraftConfig& c, size_t n_texts, int64_t total,
                         const std::string& target) {
  if (o.minutes > 0) n_texts = 0, total = 0;
  return nlohmann::ordered_json{{"optimizer", "muon"},
                                {"target", target},
                                {"texts", n_texts},
                                {"positions", total},
                                {"rate", o.rate},
                                {"batch", o.batch},
                                {"micro_batches", o.micro_batches},
                                {"steps", o.steps},
                                {"seed", o.seed},
                                {"hidden_size", c.hidden_size},
                                {"ffn", c.ffn_size},
                                {"rank", c.head_rank},
                                {"ctx", o.context}}
      .dump();
}

void save_checkpoint(const std::string& path, training::Ops<float>* ops,
                     const training::OptimizerState& s, const Position& at,
                     const std::vector<int32_t>& vocabulary, const std::string& settings) {
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
                     {"settings", settings},
                     {"step", std::to_string(s.step)},
                     {"texts", std::to_string(at.texts)},
                     {"starts", std::to_string(at.starts)},
                     {"seconds", std::to_string(at.seconds)}});
}

void load_checkpoint(const std::string& path, const std::string& settings,
                     training::Ops<float>* ops, training::OptimizerState* s, Position* at,
                     std::vector<int32_t>* vocabulary) {
  const MappedFile file(path);
  SafeTensors st = parse_safetensors(file.bytes(), file.name());
  const auto meta = [&](const char* key) {
    const auto it = st.metadata.find(key);
    if (it == st.metadata.end())
      throw Error(file.name() + ": metadata", std::string("'") + key + "'", "none",
                  "this is no checkpoint of chimera train");
    return it->second;
  };
  if (meta("chimera_checkpoint") != "1")
    throw Error(file.name(), "version 1 of checkpoints",
                chimera::quoted(meta("chimera_checkpoint")));
  if (meta("settings") != settings) {
    throw Error(file.name(), "a checkpoint of this run, " + settings,
                printable(meta("settings"), 1000), "give the flags and data it was started with");
  }
  const auto number = [&](const char* key) {
    const std::string t = meta(key);
    if (t.empty() || t.size() > 15 || t.find_first_not_of("0123456789") != std::string::npos)
      throw Error(file.name() + ": " + key, "a number", chimera::quoted(t));
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
  const int64_t n = s->values.size();
  ops->put(take("values", SafeType::kF32, n).floats(), &s->values);
  ops->put(take("first", SafeType::kF32, n).floats(), &s->first);
  ops->put(take("second", SafeType::kF32, n).floats(), &s->second);
  ops->put(take("averaged", SafeType::kF32, n).floats(), &s->averaged);
  const SafeTensor& ids =
      take("vocabulary", SafeType::kI32, static_cast<int64_t>(vocabulary->size()));
  std::memcpy(vocabulary->data(), ids.data, ids.bytes);
  s->step = number("step");
  *at = {number("texts"), number("starts"), number("seconds")};
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
Batch read_batch(int starts, int micro_batches, TrainingTexts* source, TextFeatures* features) {
  Batch batch;
  for (int64_t i = 1; i <= micro_batches; ++i) {
    while (batch.starts < (starts * i + micro_batches - 1) / micro_batches) {
      batch.texts.push_back(features->read(source->next()));
      batch.starts += batch.texts.back().n_starts();
    }
    batch.ends.push_back(batch.texts.size());
  }
  return batch;
}

}  // namespace

int train_fit(const std::vector<std::string>& args) {
  Options o;
  if (!parse(command(&o), args)) return 0;
  const std::string see_help = "see chimera train fit --help";
  if (!o.model) throw UsageError("train fit", "-m MODEL", "none", see_help);
  if (o.data.empty()) throw UsageError("train fit", "--data FILES", "none", see_help);
  if (!o.output) throw UsageError("train fit", "-o DRAFT", "none", see_help);
  const bool on_gpu = o.device == "cuda" || (o.device == "auto" && cuda_available());
  const bool has_bf16 = on_gpu || training::machine_has(training::Precision::kBF16);
  const bool bf16 = o.precision == "auto" ? has_bf16 : o.precision == "bf16";
  if (bf16 && !has_bf16) throw Error("--precision", "f32, all that this processor has", "bf16");
  const auto precision = bf16 ? training::Precision::kBF16 : training::Precision::kF32;
  const std::string checkpoint = o.checkpoint.value_or(*o.output + ".checkpoint");
  for (const std::string& path : {*o.output, checkpoint}) expect_writable(path);

  // The target, and what the draft reads of it.
  const int threads = o.threads.value_or(cpu::physical_cores());
  const auto backend = make_backend(on_gpu ? "cuda" : "cpu", {.threads = threads});
  training::TrainingDevice device =
      on_gpu ? training::TrainingDevice{training::make_cuda_training_ops(precision), {}}
             : training::cpu_training_device(o.micro_batches, threads, precision);
  training::Ops<float>* ops = device.all.get();
  const ModelFile model = load_model(*o.model);
  for (const std::string& warning : model.warnings) note("warning: " + warning);
  const LlamaTensors& t = model.tensors;
  const std::string target_name = printable(t.name);
  const std::string target_fingerprint = fingerprint(t, model.vocabulary);
  const int vocab = t.config.vocab_size;
  const int context = std::min(o.context, t.config.max_context);
  TrainingTexts source(o.data, vocab, context, o.seed);
  const std::vector<Text>& texts = source.texts();
  const std::vector<Text>& held_out = source.held_out();
  int64_t available = 0;
  for (const Text& text : texts) available += text.n_starts();
  const int64_t total = o.positions > 0 ? o.positions : available;

  DraftTensors draft;
  if (o.init) {
    draft = load_draft(*o.init);
    if (draft.target_fingerprint != target_fingerprint) {
      throw Error(printable(*o.init, 4096), "a draft for " + target_name,
                  "one for " + printable(draft.target_name), "train one from scratch");
    }
    if (draft.vocabulary.size() > static_cast<size_t>(o.vocabulary))
      draft.vocabulary.resize(static_cast<size_t>(o.vocabulary));  // most frequent first
  } else {
    DraftConfig c;
    c.hidden_size = t.config.hidden_size;
    c.n_heads = t.config.n_heads;
    c.n_kv_heads = t.config.n_kv_heads;
    c.head_dim = t.config.head_dim;
    c.ffn_size = o.ffn;
    c.head_rank = o.rank;
    c.n_steps = o.steps;
    c.rope_base = t.config.rope_base;
    std::vector<float> norm(static_cast<size_t>(c.hidden_size));
    dequantize_row(t.output_norm.type, t.output_norm.data, t.output_norm.cols, norm.data());
    draft = training::initial_draft(c, norm, o.seed);
    draft.vocabulary = frequent_tokens(texts, vocab, o.vocabulary);
  }
  draft.target_name = target_name;
  draft.target_fingerprint = target_fingerprint;
  if (o.licence) draft.licence = *o.licence;
  check(draft, t.config);  // now, not after hours
  const training::ParameterLayout layout(draft.config);
  const std::string settings =
      run_settings(o, draft.config, texts.size(), total, target_fingerprint);

  training::OptimizerState state = training::start_optimizer(ops, training::pack_parameters(draft));
  Position at;
  if (o.resume) {
    load_checkpoint(*o.resume, settings, ops, &state, &at, &draft.vocabulary);
    check(draft, t.config);
  }

  const training::Buffer<float> embedding = rows_as_f32(ops, t.embedding),
                                head = t.head.empty() ? embedding : rows_as_f32(ops, t.head);
  const Llama llama(*backend, t, [&](std::span<const std::byte> bytes) { model.file.drop(bytes); });
  TextFeatures features(llama, target_fingerprint, o.data, context, threads);
  training::BatchGradient gradient_of(&device, draft.config, embedding.data(), head.data(), vocab,
                                      draft.vocabulary, kTargetsBest);

  note(draft.target_name + ": " + count_text(static_cast<int64_t>(texts.size()), "text") + ", " +
       std::to_string(available) + " positions, and " +
       count_text(static_cast<int64_t>(held_out.size()), "text") + " held out; a draft of " +
       fixed_text(static_cast<double>(layout.total) / 1e6, 1) + " M parameters, " +
       std::to_string(draft.vocabulary.size()) + " tokens to choose from");

  const Interrupt interrupt;
  std::vector<training::TrainingText> validation;
  for (const Text& text : held_out) {
    validation.push_back(features.read(text));
    interrupt.check();
  }

  for (int64_t i = 0; i < at.texts; ++i) source.next();
  const Clock::time_point begin = Clock::now();
  const int64_t seconds_before = at.seconds;
  const auto progress = [&] {
    return o.minutes > 0 ? (static_cast<double>(seconds_before) + seconds_since(begin)) /
                               (60 * static_cast<double>(o.minutes))
                         : static_cast<double>(at.starts) / static_cast<double>(total);
  };
  std::string validated;
  const auto save = [&] {
    std::vector<training::MicroBatch> each;
    for (const training::TrainingText& text : validation) each.push_back({&text});
    const training::Score score =
        gradient_of.run(state.averaged.data(), each, o.steps, kStepWeight, nullptr);
    validated = score_text(score, o.steps);
    at.seconds = seconds_before + static_cast<int64_t>(seconds_since(begin));
    save_checkpoint(checkpoint, ops, state, at, draft.vocabulary, settings);
    training::unpack_parameters(ops->get(state.averaged), &draft);
    draft.training = nlohmann::ordered_json{{"positions", at.starts},
                                            {"of", total},
                                            {"texts", at.texts},
                                            {"steps", state.step},
                                            {"seconds", at.seconds},
                                            {"held_out", validated},
                                            {"settings", nlohmann::ordered_json::parse(settings)}}
                         .dump();
    save_draft(draft, *o.output);
    note("held out: " + validated + "; saved at " + std::to_string(at.starts) + " positions");
  };

  training::OptimizerOptions options;
  options.rate = o.rate;
  training::Optimizer optimizer(options, layout, ops);
  training::Buffer<float> gradient;
  ops->need(&gradient, static_cast<int64_t>(layout.total));
  training::Score recent;
  Clock::time_point told = begin, saved = begin;
  int64_t starts_told = at.starts;
  const auto read = [&] {
    return read_batch(o.batch, on_gpu ? 1 : o.micro_batches, &source, &features);
  };
  std::future<Batch> next;
  while (progress() < 1 && !interrupt.asked() && (o.stop_after == 0 || at.starts < o.stop_after)) {
    const Batch batch = next.valid() ? next.get() : read();
    if (on_gpu) next = std::async(std::launch::async, read);  // which leaves the CPU idle
    const training::Score score =
        gradient_of.run(state.values.data(), batch.parts(), o.steps, kStepWeight, gradient.data());
    const double rate = training::learning_rate(options, progress());
    const double norm = optimizer.step(rate, gradient.data(), &state);
    if (!std::isfinite(norm) || !std::isfinite(score.weighted_loss(kStepWeight))) {
      throw Error(
          "training step " + std::to_string(state.step + 1), "a finite loss and gradient",
          "NaN or infinity",
          "resume from " + printable(checkpoint, 4096) + " or start again with a smaller --lr");
    }
    at.texts += static_cast<int64_t>(batch.texts.size());
    at.starts += batch.starts;
    recent += score;
    if (const double s = seconds_since(told); s >= 10) {
      const double speed = static_cast<double>(at.starts - starts_told) / s;
      const double left = o.minutes > 0 ? (1 - progress()) * 60 * static_cast<double>(o.minutes)
                                        : static_cast<double>(total - at.starts) / speed;
      note(std::to_string(at.starts) +
           (o.minutes > 0 ? " positions: " : " of " + std::to_string(total) + ": ") +
           score_text(recent, o.steps) + ", " + fixed_text(speed, 0) + " positions/s, " +
           duration_text(std::max(left, 0.0)) + " left");
      recent = {};
      told = Clock::now();
      starts_told = at.starts;
    }
    if (seconds_since(saved) >= o.save_seconds) {
      save();
      saved = Clock::now();
    }
  }
  save();
  if (progress() < 1) {
    note("Stopped; --resume " + printable(checkpoint, 4096) + " goes on.");
    return interrupt.exit_code();
  }
  return 0;
}

}  // namespace chimera
