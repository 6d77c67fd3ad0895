// What a step costs, by the things it depends on: rows of a pass, tokens of context, op.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "engine/session.h"
#include "tools/bench/series.h"
#include "tools/bench/timed_backend.h"

namespace chimera {

// Measured on a text of its own, in a session of its own; every figure once a round. Steps are
// whole ones: sampling and moving keys and values are part of them.
class StepCosts {
 public:
  struct Point {
    int at;                 // rows, or tokens of context
    Series seconds, ratio;  // of a step; to the first point of the same round
  };
  struct Op {
    std::string name;
    TimedBackend::Part part;
    int calls;                    // a step
    size_t weight_bytes;          // a step
    std::vector<Series> seconds;  // a step, for each of op_rows()
  };

  // The model's backend must be `backend`; `threads`: its own, where it is the CPU's.
  StepCosts(const Llama& model, TimedBackend* backend, int threads);

  void measure_round();

  const std::vector<Point>& by_rows() const { return by_rows_; }        // after 32 tokens
  const std::vector<Point>& by_context() const { return by_context_; }  // one row
  const std::vector<Op>& by_op() const { return by_op_; }               // after 128 tokens
  static std::span<const int> op_rows();
  // Share of a plain step in which threads wait for each other though all come at the same time:
  // meeting_seconds() as often as they meet in a step. Empty on a device, whose step is one graph.
  const Series& waiting_share() const { return waiting_; }
  int prefill_tokens() const { return prefill_tokens_; }
  const Series& prefill_tokens_per_second() const { return prefill_; }

 private:
  double step_seconds(int context, int rows);
  void time_ops();

  TimedBackend* backend_;
  const int threads_;
  Session session_;
  std::vector<int32_t> text_;
  std::vector<Point> by_rows_, by_context_;
  std::vector<Op> by_op_;
  int prefill_tokens_ = 0;
  Series prefill_, waiting_;
};

}  // namespace chimera
