// A session: the texts of one or more sequences, and everything that changes while they grow - KV
// cache, activations, the Step. The weights (Llama) are shared; nothing is global. Sessions over
// one backend take turns: see Backend.
//
// One function advances it. Tokens that are known but not yet in the KV cache are the sequence's
// pending tokens: a prompt, or the one token sampled last. step() runs as many of them as fit;
// where it reaches the last one, that is the root of a tree for the drafter, and new tokens come
// out. So prefill, plain decoding and verification are the same code with other contents.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/drafter.h"
#include "engine/error.h"
#include "engine/llama.h"
#include "engine/memory_plan.h"

namespace chimera {

struct SessionOptions {
  int context = 2048;  // tokens of a sequence at most
  int n_sequences = 1;
  int max_nodes = 0;      // candidates a sequence and step at most, without the root
  int prefill_rows = 64;  // prompt tokens a step; changes speed and memory, never a bit
  DType kv_type = DType::kF16;
};

class Session {
 public:
  // Allocates everything it will ever need. Throws Error if an option is out of range.
  Session(const Llama& model, const SessionOptions& options);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  // Waits for the pass that a resident drafter may have launched ahead.
  ~Session() {
    try {
      model_.backend().submit(0, [] {});
    } catch (const Error&) {  // the device has failed: whoever waited for it has been told
    }
  }

  // What the constructor will allocate, weights and the backend's scratch apart, and ...
  static MemoryPlan plan(const LlamaConfig& config, const Backend& backend,
                         const SessionOptions& options);
  // ... what it asks of the backend, see Backend::reserve().
  static void reserve(const LlamaConfig& config, Backend& backend, const SessionOptions& options);

  const SessionOptions& options() const { return options_; }
  const Llama& model() const { return model_; }

  // Starts a sequence over with a text. Throws Error if it is empty, longer than the context, or
  // holds an id outside the vocabulary.
  void start(int sequence, std::span<const int32_t> prompt, const Sampling& sampling);
  // Cuts a text to its first n tokens, n >= 1; decoding goes on from there.
  void truncate(int sequence, int n);
  // Takes a sequence out of the following steps until it is started again.
  void stop(int sequence) { texts_[static_cast<size_t>(sequence)].active = false; }

  // One pass. drafter: nullptr for plain decoding. Returns false if there was nothing to do. With a
  // resident drafter (of one sequence) the tokens are those of the pass before the one that is
  // launched.
  bool step(Drafter* drafter);

  std::span<const int32_t> tokens(int sequence) const {
    return texts_[static_cast<size_t>(sequence)].tokens;
  }
  // Tokens that the last step added to the text, the sampled one included: 0 inside a prompt.
  int emitted(int sequence) const { return texts_[static_cast<size_t>(sequence)].emitted; }
  // Nodes drafted for it in the last step.
  int drafted(int sequence) const { return texts_[static_cast<size_t>(sequence)].drafted; }
  bool full(int sequence) const {
    return static_cast<int>(tokens(sequence).size()) >= options_.context;
  }

  // Measures what passes of 1 .. max_nodes + 1 rows (64 at most) cost on this machine, some sizes
  // between; once that has taken 0.4 s and ten plain passes, no further ones. And before that,
  // unless a plain pass takes more than 50 ms, what attention adds in a long text. Drafters then
  // choose the size of their trees by it. (Where trees are drafted on the device: what passes over
  // its own Step cost.) To be called before the first start(). set_cost(): the same from a curve
  // that was measured before. From then on the curve learns from every step. Without one trees have
  // max_nodes nodes if there are as many candidates, and a run can be repeated step by step.
  void measure_cost();
  static constexpr int kMeasuredContext = 520;  // a longer one is measured as this
  // Seconds of a pass over so many rows behind so many others (of nothing, if they were never
  // computed), the best of a few. As above.
  double time_pass(int rows, int context = 0);
  void set_cost(const CostCurve& cost) { cost_ = cost; }
  const CostCurve& cost() const { return cost_; }
  // Seconds of a plain step at the end of the text: its last token, which must have been decoded,
  // is decoded again and again for 0.1 s, and the median taken. It comes out the same each time.
  // For a session of one sequence and a text no longer than the context.
  double plain_seconds();

  // The last step and what it computed; the rows kept are the first n_kept of each sequence in
  // states(). (Not with a resident drafter, whose next pass is under way.)
  const Step& last_step() const { return *step_; }
  const float* states() const { return activations_.states; }
  const float* logits() const { return activations_.logits; }

  // For tests and for the trainer: runs one forward pass over rows that the caller has put into the
  // step (clear(), begin_sequence(), add_row()), without accepting anything.
  Step& edit_step() { return *step_; }
  void forward() { model_.forward(step_, kv_, activations_); }
  // ... and accepts and keeps, advancing the committed length but not the text.
  void accept_and_keep() { accept_and_keep(step_); }
  // Both, as step() does it: one list of ops, the same for every Step.
  void pass();

 private:
  void accept_and_keep(Step* step);
  void measure_attention();
  struct Text {
    std::vector<int32_t> tokens;
    int64_t number = 0;
    bool active = false;
    int emitted = 0, drafted = 0;
  };
  static constexpr int kPlainEvery = 48, kFirstPlain = 8;  // steps

  // Tokens of the text that are not in the KV cache; 0: nothing to do.
  int pending(int sequence) const;
  // The rows of the next pass, candidates included; of prompts most_rows at most.
  void fill_step(Drafter* drafter, int most_rows);
  void read_back(int sequence);
  bool step_resident(ResidentDrafter& drafter);

  const Llama& model_;
  SessionOptions options_;
  int max_rows_ = 0;
  CostCurve cost_;
  int until_plain_ = kFirstPlain;
  std::vector<Text> texts_;
  std::shared_ptr<void> device_memory_, shared_memory_;
  std::shared_ptr<Step> step_memory_;
  Step* step_ = nullptr;
  std::shared_ptr<Step> timed_step_;  // on the device, if time_pass() wanted one; its list's key
  uint64_t timed_key_ = 0;
  KvCache kv_;
  Activations activations_;
};

}  // namespace chimera
