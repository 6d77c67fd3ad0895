// chimera train without a stage: all of them, one after another, each going on where an earlier run
// was stopped. What a stage leaves lies beside the draft:
//   DRAFT.held-out.jsonl    prompts that nothing is learnt from
//   DRAFT.answers.jsonl     the target's answers to the others
//   *.checkpoint            of the two fits
#include <algorithm>
#include <filesystem>
#include <fstream>

#include "engine/error.h"
#include "engine/step.h"
#include "loader/mapped_file.h"
#include "loader/output_file.h"
#include "tools/commands.h"
#include "tools/flags.h"
#include "tools/model.h"
#include "tools/output.h"
#include "tools/prompts.h"
#include "tools/train/shard.h"
#include "tools/train/train.h"

namespace chimera {
namespace {

struct Options {
  std::optional<std::string> model, prompts, output;
  std::optional<int> threads;
  LineFilter where;
  int positions = 0, n = 256, sequences = 96;
  float minutes = 0;
  bool on_policy = false, strict = false;
};

// Answers that an earlier run left are to the same prompts: others would be measured on what the
// draft has learnt from.
void expect_same_prompts(const std::string& answers, std::span<const Prompt> prompts,
                         const std::string& name) {
  std::ifstream file(answers, std::ios::binary);
  std::string line;
  std::getline(file, line);
  const auto header = nlohmann::ordered_json::parse(line, nullptr, false);
  if (header.is_object() && header.contains("prompts") && header["prompts"] != hash_of(prompts))
    throw Error(printable(answers, 4096), "answers to the prompts of " + printable(name, 4096),
                "answers to others", "name another --output, or remove what lies beside this one");
}

// The last tenth of the prompts, 40 at most: to measure the draft with. Those that the model's
// context cannot hold are of no use there.
size_t hold_out(const std::vector<Prompt>& prompts, const Options& o, const std::string& path) {
  const Model model(*o.model);
  const auto room = static_cast<size_t>(model.file.tensors.config.max_context);
  const size_t n = std::clamp<size_t>(prompts.size() / 10, 1, 40);
  OutputFile file(path);
  bool any = false;
  for (const Prompt& prompt : std::span(prompts).last(n)) {
    if (encode(model, prompt.messages, model.chat_format != ChatFormat::kNone).size() >= room)
      continue;
    any = true;
    nlohmann::ordered_json messages = nlohmann::ordered_json::array();
    for (const Message& m : prompt.messages)
      messages.push_back({{"role", m.role}, {"content", m.content}});
    file.write(nlohmann::ordered_json{{"messages", messages}}.dump() + "\n");
  }
  if (!any)
    throw Error(
        printable(*o.prompts, 4096) + ": the last " + count_text(static_cast<int64_t>(n), "prompt"),
        "one of fewer than " + std::to_string(room) +
            " tokens (the model's context), to measure with",
        "none", "put shorter ones there");
  file.commit();
  return n;
}

}  // namespace

int train_all(const std::vector<std::string>& args) {
  Options o;
  const Command command{
      "train -m MODEL",  // with --help it lists these flags, and without -m the stages
      "--prompts FILE -o DRAFT [FLAGS]",
      "Makes a draft model for a target, from nothing but the target and a file of prompts: data,\n"
      "fit, eval. Stopped with Ctrl-C, the same command goes on where it was.\n",
      {
          {'m', "model", "MODEL", "the target: a GGUF or llama2.c file", file(&o.model)},
          {0, "prompts", "FILE", "JSONL or one prompt a line, two at least", file(&o.prompts)},
          where_flag(&o.where),
          {'o', "output", "DRAFT", "the draft; answers and checkpoints lie beside it",
           file(&o.output)},
          {0, "positions", "N", "positions to learn from; 0: each once",
           integer(&o.positions, 0, 2'000'000'000)},
          {0, "minutes", "M", "end learning after this time instead", number(&o.minutes, 0, 1e6f)},
          {0, "on-policy", "",
           "then learn from the draft's own trees, for a third of\n--positions or --minutes",
           on(&o.on_policy)},
          {0, "strict", "", "stop at a broken line of the file instead of leaving it out",
           on(&o.strict)},
          {'n', "tokens", "N", "tokens of an answer, at most", integer(&o.n, 2, 4096)},
          {0, "sequences", "N", "answers at once", integer(&o.sequences, 1, Step::kMaxSequences)},
          threads_flag(&o.threads),
      }};
  if (!parse(command, args)) return 0;
  expect_given("train",
               {{"-m MODEL", o.model.has_value()},
                {"--prompts FILE", o.prompts.has_value()},
                {"-o DRAFT", o.output.has_value()}},
               "train -m MODEL");
  if (o.output->find(',') != std::string::npos)
    throw UsageError("--output", "a name without a comma", in_quotes(*o.output));
  const std::string &draft = *o.output, held_out = draft + ".held-out.jsonl",
                    answers = draft + ".answers.jsonl", first = draft + ".checkpoint",
                    second = draft + ".on-policy.checkpoint";
  if (!o.on_policy && std::filesystem::exists(second))
    throw UsageError("train", "--on-policy, with which an earlier run was stopped", "none",
                     "give it, or remove " + printable(second, 4096) + " and " +
                         printable(first, 4096) + " to begin anew");
  if (const std::string special = special_file(*o.prompts); !special.empty())
    throw Error(printable(*o.prompts, 4096), "a regular file, which is read more than once",
                special);
  const std::vector<Prompt> prompts =
      load_prompts(*o.prompts, o.strict ? BrokenLines::kStop : BrokenLines::kLeaveOut, o.where);
  if (prompts.size() < 2)
    throw Error(printable(*o.prompts, 4096),
                "two prompts at least, one to learn from and one to measure with",
                std::to_string(prompts.size()));
  for (const std::string& path : {draft, held_out, answers}) {
    expect_other_file(path, {o.model, o.prompts});
    expect_writable(path);
  }
  expect_same_prompts(answers, prompts, *o.prompts);
  const size_t learnt = prompts.size() - hold_out(prompts, o, held_out);

  const auto stage = [&](int (*run)(const std::vector<std::string>&), const std::string& title,
                         std::vector<std::string> flags) {
    note("== " + title);
    flags.insert(flags.begin(), {"-m", *o.model});
    if (o.threads) flags.insert(flags.end(), {"--threads", std::to_string(*o.threads)});
    return run(flags);
  };
  // share: of the length that was asked for.
  const auto fit = [&](const std::string& title, const std::string& checkpoint, int share,
                       std::vector<std::string> more) {
    more.insert(more.end(), {"--data", answers, "-o", draft, "--checkpoint", checkpoint});
    if (o.minutes > 0)
      more.insert(more.end(), {"--minutes", number_text(o.minutes / static_cast<float>(share))});
    else if (o.positions > 0)
      more.insert(more.end(), {"--positions", std::to_string(std::max(1, o.positions / share))});
    if (std::filesystem::exists(checkpoint)) more.insert(more.end(), {"--resume", checkpoint});
    const int code = stage(train_fit, title, more);
    if (code != 0) note("The same command, chimera train, does that.");
    return code;
  };

  int code = 0;
  if (!std::filesystem::exists(second)) {
    std::vector<std::string> flags = {"--prompts",   *o.prompts,
                                      "--limit",     std::to_string(learnt),
                                      "-n",          std::to_string(o.n),
                                      "--sequences", std::to_string(o.sequences),
                                      "-o",          answers,
                                      "--features"};
    if (o.strict) flags.push_back("--strict");
    if (!o.where.text.empty()) flags.insert(flags.end(), {"--where", o.where.text});
    code = stage(train_data,
                 "the target answers " + count_text(static_cast<int64_t>(learnt), "prompt"), flags);
    if (code == 0) code = fit("the draft learns", first, 1, {});
  }
  if (code == 0 && o.on_policy)
    code = fit("the draft learns from its own trees", second, 3,
               {"--init", draft, "--lr", "0.0005", "--on-policy", "8"});
  if (code == 0)
    code = stage(train_eval, "how good it is, and how its probabilities are to be read",
                 {"--draft", draft, "--prompts", held_out, "-n", std::to_string(std::min(o.n, 96)),
                  "--calibrate", draft});
  return code;
}

}  // namespace chimera
