// chimera: runs a sub-command and turns exceptions into one line and an exit code.
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>

#include "tools/commands.h"
#include "tools/flags.h"
#include "tools/interrupt.h"
#include "tools/output.h"

namespace chimera {
namespace {

constexpr char kVersion[] = "chimera 0.1.0\n";

constexpr char kHelp[] =
    "usage: chimera COMMAND [FLAGS]\n"
    "\n"
    "Runs LLaMA models. Several tokens are guessed and checked in one pass, and the\n"
    "text is the same, bit for bit, as with one token at a time.\n"
    "\n"
    "  run        answer a prompt\n"
    "  info       what is in a model file, and the memory it will need\n"
    "  bench      how fast this machine decodes, and how fast it could\n"
    "  train      make a draft model for another model\n"
    "  tune-tree  the best static tree for a draft model on this machine\n"
    "\n"
    "  chimera help COMMAND     the flags of a command, as chimera COMMAND --help\n"
    "  chimera --version\n"
    "\n"
    "for example:\n"
    "  chimera run -m models/SmolLM2-135M-Instruct.Q4_1.gguf -p \"Why is the sky blue?\"\n";

int dispatch(const std::vector<std::string>& args) {
  const std::string command = args.empty() ? "--help" : args.front();
  std::vector<std::string> rest(args.begin() + (args.empty() ? 0 : 1), args.end());
  if (command == "help") {
    rest.push_back("--help");
    return dispatch(rest);
  }
  if (command == "run") return run(rest);
  if (command == "info") return info(rest);
  if (command == "bench") return bench(rest);
  if (command == "train") return train(rest);
  if (command == "tune-tree") return tune_tree(rest);
  if (command == "--help" || command == "-h") return print(kHelp), 0;
  if (command == "--version") return print(kVersion), 0;
  throw UsageError("command", "run, info, bench, train or tune-tree", in_quotes(command),
                   "see chimera --help");
}

int guarded(const std::vector<std::string>& args) {
  try {
    return dispatch(args);
  } catch (const OutputClosed&) {
    return 1;
  } catch (const Interrupted& e) {
    return e.exit_code;
  } catch (const UsageError& e) {
    note(std::string("chimera: ") + e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    note("chimera: memory: expected enough of it, found none left; try a smaller --ctx");
  } catch (const std::exception& e) {
    note(std::string("chimera: ") + e.what());
  }
  return 1;
}

}  // namespace
}  // namespace chimera

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // writing fails instead, and print() says so
  return chimera::guarded({argv + std::min(argc, 1), argv + argc});
}
