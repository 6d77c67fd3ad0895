// The house: includes point one way, and files of one instruction set export nothing that another
// file could be linked to (an AVX-512 copy of an inline function is a crash on an older machine).
#include <regex>
#include <set>
#include <sstream>

#include "tests/support.h"

namespace chimera::test {
namespace {

namespace fs = std::filesystem;

const std::map<std::string, std::set<std::string>> kMayInclude = {
    {"engine", {"engine"}},
    {"tokenizer", {"tokenizer", "engine"}},
    {"loader", {"loader", "tokenizer", "engine"}},
    {"cuda", {"cuda", "engine"}},
    {"tools", {"tools", "loader", "tokenizer", "engine"}},
};

TEST(Structure, IncludesPointOneWay) {
  const std::regex include("^\\s*#\\s*include\\s+\"([a-z0-9_]+)/[^\"]*\"");
  int files = 0;
  for (const auto& [folder, allowed] : kMayInclude)
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      const std::string extension = entry.path().extension().string();
      if (extension != ".h" && extension != ".cc" && extension != ".cu" && extension != ".cuh")
        continue;
      ++files;
      std::ifstream file(entry.path());
      for (std::string line; std::getline(file, line);) {
        std::smatch match;
        const bool ours = std::regex_search(line, match, include);
        EXPECT_TRUE(!ours || allowed.count(match[1].str())) << entry.path() << ": " << line;
        EXPECT_EQ(line.find("nlohmann") != std::string::npos && folder == "engine", false)
            << entry.path() << ": the engine knows no JSON";
      }
    }
  EXPECT_GT(files, 40);
}

// A kernel that never did would read what the one before it is still writing, and only on a GPU.
// Nor may a block end before it has: the next kernel would take what is behind this one for done.
// (What a kernel touches before it waits is for its reader to see.)
TEST(Structure, EveryKernelWaitsForThePrevious) {
  int kernels = 0;
  for (const auto& entry : fs::directory_iterator("cuda")) {
    if (entry.path().extension() != ".cuh") continue;
    std::ifstream file(entry.path());
    bool waits = true;
    std::string kernel;
    for (std::string line; std::getline(file, line);) {
      if (line.rfind("KERNEL(", 0) == 0) {
        EXPECT_TRUE(waits) << entry.path() << ": " << kernel;
        ++kernels;
        waits = false;
        kernel = line;
      }
      waits = waits || line == "  wait_for_previous();" || line == "  wait_alone();";
      EXPECT_TRUE(waits || line.find("return;") == std::string::npos)
          << entry.path() << ": " << kernel;
    }
    EXPECT_TRUE(waits) << entry.path() << ": " << kernel;
  }
  EXPECT_GE(kernels, 40);
}

// Of what git keeps: anything else that lies about is not ours.
TEST(Structure, TheTopLevelIsWhatWeSay) {
  const std::set<std::string> expected = {"Makefile",  "README.md", "LICENSE", "engine", "cuda",
                                          "tokenizer", "loader",    "tests",   "tools",  "models"};
  std::set<std::string> found;
  std::istringstream files(run("git ls-files 2>/dev/null").out);
  for (std::string line; std::getline(files, line);)
    if (line[0] != '.') found.insert(line.substr(0, line.find('/')));
  if (found.empty()) GTEST_SKIP() << "needs git and a checkout";
  EXPECT_EQ(found, expected);
}

TEST(Structure, InstructionSetFilesExportNothingInline) {
  const char* build = std::getenv("CHIMERA_BUILD");
  const fs::path objects = fs::path(build ? build : "build") / "obj" / "engine";
  if (std::string(build ? build : "").find("build-") == 0)
    GTEST_SKIP() << "sanitizers and debug builds add symbols of their own";
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(objects)) {
    const std::string name = entry.path().filename().string();
    if (!std::regex_match(name, std::regex(".*_(avx2|avxvnni|avx512|avx512bf16|amx|neon)\\.o")))
      continue;
    ++files;
    std::istringstream lines(run("nm -C --defined-only " + entry.path().string()).out);
    for (std::string line; std::getline(lines, line);) {
      // W, V: weak (inline, template); u: unique. T: a function that others may call; only data may
      // leave.
      const bool weak = std::regex_search(line, std::regex("^[0-9a-f]+ [WVuT] "));
      EXPECT_FALSE(weak) << name << " exports " << line;
    }
  }
  EXPECT_GE(files, 8);
}

}  // namespace
}  // namespace chimera::test
