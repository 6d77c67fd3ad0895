// Command lines. The flags of a sub-command are declared once, in a table from which parsing, error
// messages and --help are made:
//
//   int nodes = 8;          // what the variable holds is the default that --help shows
//   bool json = false;
//   const Command command{"try", "[--nodes N]", "Tries something.\n", {
//       {'n', "nodes", "N", "candidates a step, at most", integer(&nodes, 1, 255)},
//       {0, "json", "", "print one JSON object", on(&json)},
//   }};
//   if (!parse(command, args)) return 0;  // --help
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"

namespace chimera {

// A command line that cannot be obeyed: exit code 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

// Where a flag's value goes. One without a default is a std::optional.
struct FlagValue {
  std::function<bool(std::string_view)> set;  // false: not what was expected
  std::string expected;                       // "a whole number from 1 to 255"; empty: anything
  std::string default_text;                   // empty: --help shows none
};
FlagValue text(std::optional<std::string>* target);
FlagValue file(std::optional<std::string>* target);  // a name, so not empty
FlagValue files(std::vector<std::string>* target);   // names, separated by commas
FlagValue choice(std::string* target, std::vector<std::string> choices);
FlagValue integer(int* target, int min, int max);
FlagValue integer(std::optional<int>* target, int min, int max);
FlagValue integer(uint64_t* target);
FlagValue number(float* target, float min, float max);
FlagValue number(std::optional<float>* target, float min, float max);
FlagValue on(bool* target);

struct Flag {
  char letter;             // 'n' for -n; 0: none
  std::string name;        // "nodes" for --nodes
  std::string value_name;  // "N"; empty: a switch
  std::string help;        // may have several lines
  FlagValue value;         // without a `set`: `name` is a heading in --help
};
inline Flag heading(const std::string& name) {
  return {0, name, "", "", {}};
}

// The same in all commands that compute. Not given: one for each physical core.
Flag threads_flag(std::optional<int>* target);

struct Command {
  std::string name;   // "run"
  std::string usage;  // what follows it
  std::string about;  // lines for --help
  std::vector<Flag> flags;
  std::optional<std::string>* argument =
      nullptr;  // the one word that is no flag, if it may have one
};

// Sets the flags' targets; the last of two wins. Returns false after --help, which it prints.
// given: the names of the flags that were. Throws UsageError.
bool parse(const Command& command, const std::vector<std::string>& args,
           std::set<std::string>* given = nullptr);

// What a command cannot do without, as it is written ("-m MODEL"), and whether it was given. Throws
// UsageError for the first that was not. help: the command whose --help tells more.
void expect_given(const std::string& command,
                  std::initializer_list<std::pair<const char*, bool>> flags,
                  const std::string& help = "");

}  // namespace chimera
