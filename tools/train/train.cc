// chimera train: the stages that make a draft model, each a sub-command of its own.
#include "tools/train/train.h"

#include "tools/commands.h"
#include "tools/flags.h"
#include "tools/output.h"

namespace chimera {
namespace {

constexpr char kHelp[] =
    "usage: chimera train STAGE [FLAGS]\n"
    "       chimera train -m MODEL --prompts FILE -o DRAFT [FLAGS]   every stage in turn\n"
    "\n"
    "Makes a draft model for a target, from nothing but the target and a file of prompts.\n"
    "\n"
    "  data     the target answers the prompts; its answers are what there is to learn\n"
    "  merge    joins answers that several machines made\n"
    "  fit      the draft learns from the answers\n"
    "  average  the mean of several drafts, which is better than each\n"
    "  eval     how good the draft is\n"
    "\n"
    "  chimera train STAGE --help      the flags of a stage\n"
    "  chimera train -m MODEL --help   those of all in turn\n";

}  // namespace

int train(const std::vector<std::string>& args) {
  const std::string stage = args.empty() ? "--help" : args.front();
  const std::vector<std::string> rest(args.begin() + (args.empty() ? 0 : 1), args.end());
  if (stage == "data") return train_data(rest);
  if (stage == "merge") return train_merge(rest);
  if (stage == "fit") return train_fit(rest);
  if (stage == "average") return train_average(rest);
  if (stage == "eval") return train_eval(rest);
  if (stage == "--help" || stage == "-h") return print(kHelp), 0;
  if (stage.starts_with('-')) return train_all(args);
  throw UsageError("train", "data, merge, fit, average or eval", in_quotes(stage),
                   "see chimera train --help");
}

}  // namespace chimera
