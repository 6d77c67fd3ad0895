// What the READMEs say: commands are understood, targets and files are there, the example runs,
// JSON has the fields that are named.
#include <regex>
#include <set>
#include <sstream>

#include "tests/support.h"
#include "tokenizer/stream_decoder.h"

namespace chimera::test {
namespace {

const char* const kReadmes[] = {"README.md", "models/README.md", "tools/train/README.md"};

std::string build() {
  const char* folder = std::getenv("CHIMERA_BUILD");
  return folder != nullptr ? folder : "build";
}

// Every match of the pattern's first group.
std::vector<std::string> all(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  std::vector<std::string> found;
  for (std::sregex_iterator m(text.begin(), text.end(), regex), end; m != end; ++m)
    found.push_back((*m)[1]);
  return found;
}

// Each with --help at its end, which is read after all that stands before it has been checked.
TEST(Readme, TheProgramUnderstandsItsCommands) {
  size_t commands = 0;
  for (const std::string readme : kReadmes) {
    const std::string text = read_text(readme);
    // Words that a shell would put in: D="--flags", then $D.
    std::string variables;
    for (const std::string& line : all(text, "\n    ([A-Z]+=\"[^\"]*\")(?=\n)"))
      variables += line + "; ";
    std::vector<std::string> lines = all(text, "\n    build/chimera ([^#\n]*)");
    for (const std::string& inlined : all(text, "`build/chimera ([^`]*)`"))
      lines.push_back(std::regex_replace(inlined, std::regex("\n"), " "));
    for (const std::string& line : lines) {
      ++commands;
      const Ran ran = run(variables + build() + "/chimera " + line + " --help 2>&1");
      EXPECT_EQ(ran.code, 0) << readme << ": " << line << "\n" << ran.out;
      EXPECT_EQ(ran.out.find("usage: chimera "), 0u) << readme << ": " << line << "\n" << ran.out;
    }
  }
  EXPECT_GE(commands, 10u);
}

TEST(Readme, TargetsOfMakeAreThere) {
  std::set<std::string> targets;
  for (const std::string& line : all(read_text("Makefile"), "\n\\.PHONY: ([a-z -]*)\n")) {
    std::istringstream words(line);
    for (std::string word; words >> word;) targets.insert(word);
  }
  const std::string text = read_text("README.md");
  std::vector<std::string> named = all(text, "\n    (?:\\$ )?make ([a-z-]+)");
  for (const std::string& inlined : all(text, "`make ([a-z-]+)[^`]*`")) named.push_back(inlined);
  for (const std::string& target : named) EXPECT_TRUE(targets.count(target)) << "make " << target;
  EXPECT_GE(named.size(), 8u);
}

TEST(Readme, FilesAreThere) {
  size_t files = 0;
  for (const std::string readme : kReadmes)
    for (const std::string& path :
         all(read_text(readme),
             "((?:engine|cuda|tokenizer|loader|tests|tools)/[a-z0-9_/]+\\.[a-z]+)")) {
      ++files;
      EXPECT_TRUE(std::filesystem::exists(path)) << readme << ": " << path;
    }
  EXPECT_GE(files, 10u);
}

// The row of the table of fields for a command, against what it prints.
void expect_fields(const std::string& row, const std::string& command) {
  const Ran ran = run(build() + "/chimera " + command + " --json 2>/dev/null");
  ASSERT_EQ(ran.code, 0) << command;
  const std::string text = read_text("README.md");
  const std::vector<std::string> rows = all(text, "\n\\| `" + row + "` \\| ([^\n]*) \\|\n");
  ASSERT_EQ(rows.size(), 1u) << row;
  // What stands in brackets says more about the field before it.
  const std::vector<std::string> named =
      all(std::regex_replace(rows[0], std::regex("\\([^)]*\\)"), ""), "`([a-z_]+)`");
  std::set<std::string> expected(named.begin(), named.end()), found;
  const nlohmann::json object = nlohmann::json::parse(ran.out);
  for (const auto& [key, value] : object.items())
    if (!key.ends_with("_spread")) found.insert(key);
  EXPECT_EQ(found, expected) << command;
}
TEST(Readme, JsonHasTheFieldsItNames) {
  const std::string model = tiny("q4_0");
  expect_fields("run", "run -m " + model + " -p a -n 2 --drafter none");
  expect_fields("info", "info " + model);
  expect_fields("bench", "bench -m " + model + " -n 2 --rounds 1 --limit 1 --nodes 4");
  expect_fields("bench --shape", "bench --shape tiny --ctx 32 --rounds 1");
}

// tools/hello.cc, against plain decoding.
TEST(Readme, TheExampleSaysWhatPlainDecodingSays) {
  const Loaded l = load(tiny("q8_0"), isas().back(), 1);
  const Tokenizer tokenizer(l.file.vocabulary);
  std::vector<int32_t> prompt = tokenizer.encode("hello", false);
  prompt.insert(prompt.begin(), tokenizer.bos());
  Session session(*l.model, {.context = static_cast<int>(prompt.size()) + 64});
  const Generation plain = generate(session, nullptr, prompt, {-1, {tokenizer.eos()}, {}});
  StreamDecoder decoder(tokenizer, false);
  std::string text;
  for (const int32_t id : plain.ids) text += decoder.push(id);
  const Ran ran = run(build() + "/hello " + tiny("q8_0") + " hello 2>/dev/null");
  EXPECT_EQ(ran.code, 0);
  EXPECT_EQ(ran.out, text + decoder.finish() + "\n");
  EXPECT_GT(text.size(), 20u);

  const Ran none = run(build() + "/hello /no/such/file hello 2>&1");
  EXPECT_EQ(none.code, 1);
  EXPECT_EQ(none.out.find("hello: /no/such/file: expected a readable file"), 0u) << none.out;
}

}  // namespace
}  // namespace chimera::test
