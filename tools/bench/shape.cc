#include "tools/bench/shape.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "engine/chimera/chimera_drafter.h"
#include "engine/error.h"
#include "engine/model_shapes.h"
#include "engine/resident_drafter.h"
#include "engine/session.h"
#include "engine/train/parameters.h"
#include "tools/bench/series.h"
#include "tools/bench/timed_backend.h"
#include "tools/machine.h"
#include "tools/output.h"

namespace chimera {
namespace {

constexpr DType kTypes[] = {DType::kBF16, DType::kF16,  DType::kF32,  DType::kQ8_0,
                            DType::kQ4_0, DType::kQ4_1, DType::kQ4_K, DType::kQ6_K};

std::string name_of(DType type) {
  std::string name = dtype_info(type).name;
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

// Random weights, of sizes that a model may have: all tensors share its bytes.
std::vector<std::byte> random_weights(DType type, int64_t weights) {
  const DTypeInfo& info = dtype_info(type);
  std::vector<std::byte> bytes(row_bytes(type, weights));
  uint64_t state = 1;
  const auto random = [&] {
    return (state = state * 6364136223846793005u + 1442695040888963407u) >> 32;
  };
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  const uint16_t scale = f32_to_f16(0x1p-10f);
  for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(info.block_bytes)) {
    std::byte* block = bytes.data() + at;
    // Floats keep their sign and fraction; 2^-7 is their exponent.
    switch (type) {
      case DType::kF32:
        block[3] = (block[3] & std::byte{0x80}) | std::byte{0x3c}, block[2] &= std::byte{0x7f};
        break;
      case DType::kBF16:
        block[1] = (block[1] & std::byte{0x80}) | std::byte{0x3c}, block[0] &= std::byte{0x7f};
        break;
      case DType::kF16: block[1] = (block[1] & std::byte{0x83}) | std::byte{0x20}; break;
      case DType::kQ6_K: std::memcpy(block + 208, &scale, 2); break;
      case DType::kQ4_1:
      case DType::kQ4_K: std::memcpy(block + 2, &scale, 2); [[fallthrough]];
      default: std::memcpy(block, &scale, 2);
    }
  }
  return bytes;
}

LlamaTensors random_model(const ModelShape& s, DType type, const std::vector<std::byte>& weights,
                          const std::vector<float>& norm) {
  LlamaTensors t;
  t.name = s.name;
  t.config.vocab_size = s.vocab;
  t.config.hidden_size = s.hidden;
  t.config.n_layers = s.layers;
  t.config.n_heads = s.heads;
  t.config.n_kv_heads = s.kv_heads;
  t.config.head_dim = s.head_dim();
  t.config.ffn_size = s.ffn;
  t.config.max_context = 4096;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    return TensorView{"random", type, rows, cols, weights.data(), 0};
  };
  const TensorView norms{
      "norm", DType::kF32, 1, s.hidden, reinterpret_cast<const std::byte*>(norm.data()), 0};
  t.embedding = matrix(s.vocab, s.hidden);
  if (!s.tied) t.head = matrix(s.vocab, s.hidden);
  t.output_norm = norms;
  const LlamaConfig& c = t.config;
  const LlamaLayerTensors layer{norms,
                                matrix(c.q_size(), s.hidden),
                                matrix(c.kv_size(), s.hidden),
                                matrix(c.kv_size(), s.hidden),
                                matrix(s.hidden, c.q_size()),
                                norms,
                                matrix(s.ffn, s.hidden),
                                matrix(s.ffn, s.hidden),
                                matrix(s.hidden, s.ffn)};
  t.layers.assign(static_cast<size_t>(s.layers), layer);
  return t;
}

using Part = TimedBackend::Part;
constexpr Part kParts[] = {Part::kAll, Part::kProducts, Part::kAttention, Part::kRest};

struct Tree {
  int rows;
  Series seconds[std::size(kParts)];
};

struct Report {
  ShapeBenchOptions options;
  const Backend& backend;
  size_t weight_bytes;
  Tree trees[3] = {{1, {}}, {25, {}}, {64, {}}};
  Series plain{}, drafting{};  // seconds of a whole step of decoding
  Series bandwidth{};          // GB/s

  double share(const Tree& tree) const {
    return static_cast<double>(weight_bytes) / tree.seconds[0].median() / 1e9 / bandwidth.median();
  }
};

// One pass over a root and a binary tree of candidates below it.
double pass_seconds(Session* session, int context, int rows) {
  Step& step = session->edit_step();
  step.clear();
  step.sequences[0].committed = context;
  step.begin_sequence(0);
  step.set_root(step.add_row(1, -1, true));
  for (int node = 1; node < rows; ++node) step.add_row(1 + node % 2, (node - 1) / 2, true);
  const auto start = std::chrono::steady_clock::now();
  session->pass();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

constexpr int kDraftNodes = 24, kDraftDepth = 8, kDraftWidth = 4;

// A draft model of random weights, as `train fit` would begin with for this target.
DraftTensors random_draft(const LlamaConfig& target, const std::vector<float>& norm) {
  DraftConfig c = training::config_for(target);
  c.ffn_size = 512;
  DraftTensors draft = training::initial_draft(c, norm, 1);
  draft.vocabulary.resize(static_cast<size_t>(std::min(target.vocab_size, 2048)));
  std::iota(draft.vocabulary.begin(), draft.vocabulary.end(), 0);
  return draft;
}

// As `run` would make it: on the device where that can draft. draft: nullptr: plain decoding.
std::unique_ptr<Drafter> drafter_for(const Llama& llama, const DraftTensors* draft, int context) {
  if (llama.backend().tree_ops() != nullptr)
    return make_resident_drafter(
        llama, draft,
        {.nodes = draft ? kDraftNodes : 0, .depth = kDraftDepth, .width = kDraftWidth}, context);
  if (draft == nullptr) return nullptr;
  return make_chimera_drafter(
      llama, *draft,
      {.nodes = kDraftNodes, .depth = kDraftDepth, .width = kDraftWidth, .ngrams = false}, 1,
      context);
}

// The median of a few whole steps behind a text, drafting included.
double decoding_seconds(Session* session, Drafter* drafter, int context) {
  session->start(0, std::vector<int32_t>(static_cast<size_t>(context), 1), {});
  while (session->emitted(0) == 0) session->step(drafter);
  session->step(drafter);  // on a device: is under way already
  Series seconds;
  for (int i = 0; i < 12 && !session->full(0); ++i) {
    const auto start = std::chrono::steady_clock::now();
    session->step(drafter);
    seconds.add(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds.median();
}

void measure(const Llama& llama, TimedBackend* backend, const DraftTensors& draft, Report* report) {
  const ShapeBenchOptions& o = report->options;
  const int context = o.context + 256;
  Session session(llama, {.context = context, .max_nodes = 63});
  const auto plain = drafter_for(llama, nullptr, context),
             drafting = drafter_for(llama, &draft, context);
  for (int round = -1; round < o.rounds; ++round) {  // the first one warms up
    const auto add = [&](Series* series, double value) {
      if (round >= 0) series->add(value);
    };
    add(&report->bandwidth, read_bandwidth(*backend, llama.weight_bytes(), o.threads));
    for (Tree& tree : report->trees)
      for (size_t part = 0; part < std::size(kParts); ++part) {
        backend->only(kParts[part]);
        double seconds = pass_seconds(&session, o.context, tree.rows);
        for (int i = 0; i < 2; ++i)
          seconds = std::min(seconds, pass_seconds(&session, o.context, tree.rows));
        add(&tree.seconds[part], seconds);
      }
    backend->only(Part::kAll);
    add(&report->plain, decoding_seconds(&session, plain.get(), o.context));
    add(&report->drafting, decoding_seconds(&session, drafting.get(), o.context));
  }
}

nlohmann::ordered_json json_of(const Report& r) {
  auto steps = nlohmann::ordered_json::array();
  for (const Tree& tree : r.trees)
    steps.push_back({{"rows", tree.rows},
                     {"seconds", tree.seconds[0].median()},
                     {"seconds_spread", tree.seconds[0].spread()},
                     {"products", tree.seconds[1].median()},
                     {"attention", tree.seconds[2].median()},
                     {"rest", tree.seconds[3].median()},
                     {"bandwidth_share", r.share(tree)}});
  return {{"shape", r.options.shape},
          {"type", r.options.type},
          {"device", r.backend.name()},
          {"isa", r.backend.isa()},
          {"machine", r.backend.description()},
          {"context", r.options.context},
          {"rounds", r.options.rounds},
          {"weight_bytes", r.weight_bytes},
          {"read_bandwidth_gb_s", r.bandwidth.median()},
          {"steps", steps},
          {"decoding",
           {{"plain_seconds", r.plain.median()},
            {"draft_nodes", kDraftNodes},
            {"draft_depth", kDraftDepth},
            {"drafting_seconds", r.drafting.median()}}}};
}

std::string table_of(const Report& r) {
  std::string table;
  for (const Tree& tree : r.trees) {
    const Series& seconds = tree.seconds[0];
    Series ms;
    for (const double s : {seconds.spread()[0], seconds.median(), seconds.spread()[1]})
      ms.add(1e3 * s);
    char line[200];
    std::snprintf(line, sizeof line, "%4d  %-25s %9.3f %10.3f %9.3f %7.2f %7.2f\n", tree.rows,
                  ms.text(3).c_str(), 1e3 * tree.seconds[1].median(),
                  1e3 * tree.seconds[2].median(), 1e3 * tree.seconds[3].median(), r.share(tree),
                  seconds.median() / r.trees[0].seconds[0].median());
    table += line;
  }
  return r.options.shape + " in " + r.options.type + ", random weights, on " +
         r.backend.description() + "\nafter " + std::to_string(r.options.context) +
         " tokens; median (lowest..highest) of " + count_text(r.options.rounds, "round") +
         "\n\nrows  ms a step                  products  attention      rest   share  times the "
         "first\n" +
         table + "\nshare: of reading the " + bytes_text(r.weight_bytes) + " of weights once at " +
         r.bandwidth.text(1) + " GB/s, measured between the steps. Parts are run by themselves.\n" +
         "decoding, whole steps: plain " + fixed_text(1e3 * r.plain.median(), 3) +
         " ms; with a draft model, " + std::to_string(kDraftNodes) + " nodes, " +
         std::to_string(kDraftDepth) + " deep: " + fixed_text(1e3 * r.drafting.median(), 3) +
         " ms\n";
}

}  // namespace

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (const ModelShape& s : kModelShapes) names.emplace_back(s.name);
  return names;
}
std::vector<std::string> shape_types() {
  std::vector<std::string> names;
  for (const DType type : kTypes) names.push_back(name_of(type));
  return names;
}

int bench_shape(std::unique_ptr<Backend> device, const ShapeBenchOptions& o) {
  const ModelShape& shape = *std::find_if(std::begin(kModelShapes), std::end(kModelShapes),
                                          [&](const ModelShape& s) { return s.name == o.shape; });
  const DType type = *std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](DType t) { return name_of(t) == o.type; });
  const int block = dtype_info(type).block_weights;
  if (shape.hidden % block != 0 || shape.ffn % block != 0)
    throw Error("--type " + o.type, "rows of whole blocks of " + std::to_string(block) + " weights",
                "rows of " + std::to_string(shape.hidden) + " and " + std::to_string(shape.ffn),
                "use another type");
  TimedBackend backend(std::move(device));
  const int64_t largest = int64_t{shape.hidden} * std::max(shape.vocab, shape.ffn);
  const std::vector<float> norm(static_cast<size_t>(shape.hidden), 1.0f);
  std::vector<std::byte> weights = random_weights(type, largest);
  const Llama llama(backend, random_model(shape, type, weights, norm));
  weights = {};

  Report report{o, backend, llama.weight_bytes()};
  measure(llama, &backend, random_draft(llama.config(), norm), &report);
  if (o.json)
    print_json(json_of(report));
  else
    print(table_of(report));
  return 0;
}

}  // namespace chimera
