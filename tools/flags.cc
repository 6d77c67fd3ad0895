#include "tools/flags.h"

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "tools/output.h"

namespace chimera {
namespace {

// The whole of `text` as a number, or nothing. Unlike strtol and its family: no white space in
// front, no locale, and overflow is no number.
template <typename T>
std::optional<T> parse_number(std::string_view text) {
  T value;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

template <typename T>
FlagValue integer_between(T* target, int min, int max) {
  FlagValue value;
  value.expected = "a whole number from " + std::to_string(min) + " to " + std::to_string(max);
  value.set = [=](std::string_view text) {
    const auto n = parse_number<int>(text);
    if (!n || *n < min || *n > max) return false;
    *target = *n;
    return true;
  };
  return value;
}

template <typename T>
FlagValue number_between(T* target, float min, float max) {
  FlagValue value;
  value.expected = "a number from " + number_text(min) + " to " + number_text(max);
  value.set = [=](std::string_view text) {
    const auto n = parse_number<double>(text);
    // Compared after rounding, and so that NaN fails.
    const float x = n ? static_cast<float>(*n) : 0;
    if (!n || !(x >= min && x <= max)) return false;
    *target = x;
    return true;
  };
  return value;
}

std::string synopsis(const Flag& flag) {
  std::string s = flag.letter ? std::string("-") + flag.letter + ", " : "    ";
  s += "--" + flag.name;
  return flag.value_name.empty() ? s : s + " " + flag.value_name;
}

std::string help(const Command& command) {
  size_t width = 0;
  for (const Flag& flag : command.flags) {
    if (flag.value.set) width = std::max(width, synopsis(flag).size());
  }

  std::string out = "usage: chimera " + command.name + " " + command.usage + "\n\n" + command.about;
  if (command.flags.front().value.set) out += "\nFlags\n";
  for (const Flag& flag : command.flags) {
    if (!flag.value.set) {
      out += "\n" + flag.name + "\n";
      continue;
    }
    std::string line = "  " + synopsis(flag);
    line.resize(width + 4, ' ');
    for (const char c : flag.help) {
      line += c;
      if (c == '\n') line.append(width + 4, ' ');
    }
    const std::string& standard = flag.value.default_text;
    out += line + (standard.empty() ? "" : " (default: " + standard + ")") + "\n";
  }
  return out;
}

const Flag* find(const Command& command, std::string_view arg) {
  for (const Flag& flag : command.flags) {
    if (!flag.value.set) continue;
    if (arg == "--" + flag.name || (flag.letter && arg == std::string("-") + flag.letter)) {
      return &flag;
    }
  }
  return nullptr;
}

}  // namespace

FlagValue text(std::optional<std::string>* target) {
  const auto set = [=](std::string_view text) {
    *target = text;
    return true;
  };
  return {set, "", ""};
}

FlagValue file(std::optional<std::string>* target) {
  const auto set = [=](std::string_view name) {
    *target = name;
    return !name.empty();
  };
  return {set, "", ""};
}

FlagValue files(std::vector<std::string>* target) {
  const auto set = [=](std::string_view names) {
    target->assign(1, "");
    for (const char c : names) {
      if (c == ',')
        target->emplace_back();
      else
        target->back() += c;
    }
    return std::find(target->begin(), target->end(), "") == target->end();
  };
  return {set, "", ""};
}

FlagValue choice(std::string* target, std::vector<std::string> choices) {
  std::string expected;
  for (size_t i = 0; i < choices.size(); ++i) {
    expected += (i == 0 ? "" : i + 1 == choices.size() ? " or " : ", ") + choices[i];
  }
  const auto set = [=](std::string_view text) {
    if (std::find(choices.begin(), choices.end(), text) == choices.end()) return false;
    *target = text;
    return true;
  };
  return {set, expected, *target};
}

FlagValue integer(int* target, int min, int max) {
  FlagValue value = integer_between(target, min, max);
  value.default_text = std::to_string(*target);
  return value;
}

FlagValue integer(std::optional<int>* target, int min, int max) {
  return integer_between(target, min, max);
}

FlagValue integer(uint64_t* target) {
  const auto set = [=](std::string_view text) {
    const auto n = parse_number<uint64_t>(text);
    if (n) *target = *n;
    return n.has_value();
  };
  return {set, "a whole number from 0 to 18446744073709551615", std::to_string(*target)};
}

FlagValue number(float* target, float min, float max) {
  FlagValue value = number_between(target, min, max);
  value.default_text = number_text(*target);
  return value;
}

FlagValue number(std::optional<float>* target, float min, float max) {
  return number_between(target, min, max);
}

FlagValue on(bool* target) {
  const auto set = [=](std::string_view) {
    *target = true;
    return true;
  };
  return {set, "", ""};
}

Flag threads_flag(std::optional<int>* target) {
  return {0, "threads", "N", "CPU threads (default: one for each physical core)",
          integer(target, 1, 256)};
}

bool parse(const Command& declared, const std::vector<std::string>& args,
           std::set<std::string>* given) {
  Command command = declared;
  bool wants_help = false;
  command.flags.push_back({'h', "help", "", "print this text", on(&wants_help)});
  const std::string see_help = "see chimera " + command.name + " --help";

  for (size_t i = 0; i < args.size() && !wants_help; ++i) {
    const std::string& arg = args[i];
    if (command.argument && !arg.starts_with("-")) {
      if (arg.empty()) throw UsageError(command.name, "an argument", "''", see_help);
      if (*command.argument) {
        throw UsageError(command.name, "one argument", in_quotes(arg) + " as well", see_help);
      }
      *command.argument = arg;
      continue;
    }
    const size_t equals = arg.starts_with("--") ? arg.find('=') : std::string::npos;
    const std::string name = arg.substr(0, equals);
    const Flag* flag = find(command, name);
    if (!flag) throw UsageError(command.name, "one of its flags", in_quotes(name), see_help);
    if (given) given->insert(flag->name);
    if (flag->value_name.empty()) {
      if (equals != std::string::npos) {
        throw UsageError(name, "no value", in_quotes(arg.substr(equals + 1)), see_help);
      }
      flag->value.set("");
      continue;
    }
    const std::string& expected =
        flag->value.expected.empty() ? flag->value_name : flag->value.expected;
    std::string value;
    if (equals != std::string::npos) {
      value = arg.substr(equals + 1);
    } else {
      if (i + 1 == args.size()) throw UsageError(name, expected, "nothing", see_help);
      value = args[++i];
      if (find(command, value)) {
        throw UsageError(name, expected, "the flag " + value,
                         "write --" + flag->name + "=" + value + " if that is the value");
      }
    }
    if (!flag->value.set(value)) {
      throw UsageError(name, expected, in_quotes(value), see_help);
    }
  }
  if (wants_help) print(help(command));
  return !wants_help;
}

void expect_given(const std::string& command,
                  std::initializer_list<std::pair<const char*, bool>> flags,
                  const std::string& help) {
  for (const auto& [flag, given] : flags)
    if (!given)
      throw UsageError(command, flag, "none",
                       "see chimera " + (help.empty() ? command : help) + " --help");
}

}  // namespace chimera
