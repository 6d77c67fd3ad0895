#include "tools/prompts.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "engine/error.h"
#include "tests/support.h"

namespace chimera {
namespace {

class PromptsTest : public testing::Test {
 protected:
  ~PromptsTest() override { std::filesystem::remove_all(folder_); }

  std::string write(const std::string& name, const std::string& content) {
    std::filesystem::create_directories(folder_);
    const std::string path = folder_ / name;
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }
  // The prompts of a file, each as "role: content" joined by " | ".
  std::vector<std::string> load(const std::string& name, const std::string& content) {
    std::vector<std::string> out;
    for (const Prompt& prompt : load_prompts(write(name, content))) {
      std::string text;
      for (const Message& message : prompt.messages) {
        text += (text.empty() ? "" : " | ") + message.role + ": " + message.content;
      }
      out.push_back(text);
    }
    return out;
  }
  // The error's text after the folder.
  std::string error(const std::string& name, const std::string& content,
                    const std::string& lines = "") {
    const std::string path = write(name, content);
    LineFilter where;
    if (!lines.empty()) where_flag(&where).value.set(lines);
    try {
      load_prompts(path, BrokenLines::kStop, where);
    } catch (const Error& e) {
      const std::string what = e.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_TRUE(what.starts_with(path)) << what;
      return what.substr(what.find(name));
    }
    return "no error";
  }

 private:
  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("chimera_prompts_" + std::to_string(getpid()));
};

using Texts = std::vector<std::string>;

TEST_F(PromptsTest, EveryFieldOfJsonl) {
  EXPECT_EQ(load("a.jsonl", R"({"id": 1, "turns": ["first", "second"]})"
                            "\n\n"
                            R"({"prompt": "caf\u00e9", "category": {"a": [1, 2]}})"
                            "\r\n"
                            R"({"text": "line\nline"})"
                            "\n"
                            R"({"messages": [{"role": "system", "content": "s"},)"
                            R"({"role": "user", "content": "u"},)"
                            R"({"role": "assistant", "content": "a"}]})"),
            (Texts{"user: first", "user: café", "user: line\nline", "system: s | user: u"}));
}

TEST_F(PromptsTest, PlainText) {
  EXPECT_EQ(load("a.txt", "one\r\n\n  two {\"prompt\": 1}\nthrée"),
            (Texts{"user: one", "user:   two {\"prompt\": 1}", "user: thrée"}));
}

TEST_F(PromptsTest, KindIsDetectedByContentOrName) {
  EXPECT_EQ(load("a.txt", " \n{\"prompt\": \"x\"}\n"), Texts{"user: x"});
  EXPECT_EQ(load("b.txt", "\xEF\xBB\xBF{\"prompt\": \"x\"}\n"), Texts{"user: x"});
  EXPECT_EQ(load("c.txt", "\xEF\xBB\xBFhello\n"), Texts{"user: hello"});
  EXPECT_EQ(error("d.jsonl", "hello\n"),
            "d.jsonl: line 1: expected a JSON object, found no valid JSON at byte 1; one object a "
            "line, or plain text in a file not named .jsonl");
}

TEST_F(PromptsTest, ErrorsNameFileAndLine) {
  const std::string good = "{\"prompt\": \"x\"}\n";
  const auto of = [&](const std::string& line) { return error("a.jsonl", good + "\n" + line); };
  EXPECT_TRUE(of("{\"prompt\": \"x\"").starts_with("a.jsonl: line 3: expected a JSON object"));
  EXPECT_TRUE(of("{\"prompt\": \"x\"} x").starts_with("a.jsonl: line 3: expected a JSON object"));
  EXPECT_TRUE(of("{\"prompt\": \"\\ud800\"}").starts_with("a.jsonl: line 3: expected a JSON"));
  EXPECT_EQ(of("[1]"), "a.jsonl: line 3: expected a JSON object, found JSON of type array");
  EXPECT_EQ(of("{\"prompt\": 1e999}"),
            "a.jsonl: line 3: expected a JSON object, found a number out of range");
  EXPECT_EQ(of("{}"),
            "a.jsonl: line 3: expected \"turns\", \"prompt\", \"text\" or \"messages\", "
            "found none of them");
  EXPECT_EQ(of("{\"prompt\": 5}"), "a.jsonl: line 3: \"prompt\": expected a string, found number");
  EXPECT_EQ(of("{\"text\": null}"), "a.jsonl: line 3: \"text\": expected a string, found null");
  EXPECT_EQ(of("{\"turns\": []}"),
            "a.jsonl: line 3: \"turns\": expected a list of strings, found '[]'");
  EXPECT_EQ(of("{\"turns\": [1]}"),
            "a.jsonl: line 3: \"turns\": expected a list of strings, found '[1]'");
  EXPECT_EQ(of("{\"prompt\": \"x\", \"prompt\": \"y\"}"),
            "a.jsonl: line 3: expected every field once, found 'prompt' twice");
}

TEST_F(PromptsTest, BadMessages) {
  const auto of = [&](const std::string& messages) {
    return error("a.jsonl", "{\"messages\": " + messages + "}");
  };
  const std::string where = "a.jsonl: line 1: \"messages\"";
  EXPECT_EQ(of("5"), where + ": expected a list of messages, found number");
  EXPECT_EQ(of("[]"), where + ": expected a message to answer, found none");
  EXPECT_EQ(of("[{\"role\": \"assistant\", \"content\": \"a\"}]"),
            where + ": expected a message to answer, found none");
  EXPECT_EQ(of("[\"hi\"]"), where + ": message 1: expected an object, found string");
  EXPECT_EQ(of("[{\"role\": \"user\"}]"),
            where + ": message 1: \"content\": expected a string, found no such field");
  EXPECT_EQ(of("[{\"role\": 1, \"content\": \"\"}]"),
            where + ": message 1: \"role\": expected a string, found number");
}

TEST_F(PromptsTest, BadFiles) {
  EXPECT_TRUE(error("a.txt", "").find("an empty file") != std::string::npos);
  EXPECT_EQ(error("b.txt", "\n \t\r\n"),
            "b.txt: expected at least one prompt, found only blank lines");
  EXPECT_EQ(error("c.txt", "fine\nb\xC3\xA9\xFF\n"),
            "c.txt: line 2: expected UTF-8, found other bytes at byte 4; convert it to UTF-8");
  EXPECT_EQ(error("d.jsonl", "{\"prompt\": \"\xC3\"}"),
            "d.jsonl: line 1: expected UTF-8, found other bytes at byte 13; convert it to UTF-8");
  EXPECT_THROW(load_prompts("/"), Error);
  EXPECT_THROW(load_prompts("/no/such/file"), Error);
}

// Lines of an archive are broken, but for those that happen to be text.
TEST_F(PromptsTest, FilesThatAreNoText) {
  using namespace std::literals;
  const auto of = [&](const std::string& start) {
    const std::string path = write("a.jsonl.x", start + "\nscraps\nof text\n");
    try {
      load_prompts(path, BrokenLines::kLeaveOut);
    } catch (const Error& e) {
      return std::string(e.what()).substr(path.size());
    }
    return "no error"s;
  };
  const std::string expected = ": expected JSONL or plain text, found ";
  EXPECT_EQ(of("\xFD\x37zXZ\0"s), expected + "an xz file; unpack it first: xz -dk FILE");
  EXPECT_EQ(of("\x1F\x8B\x08"), expected + "a gzip file; unpack it first: gunzip -k FILE");
  EXPECT_EQ(of("\x28\xB5\x2F\xFD"), expected + "a zstd file; unpack it first: zstd -d FILE");
  EXPECT_EQ(of("BZh91AY&SY"), expected + "a bzip2 file; unpack it first: bunzip2 -k FILE");
  EXPECT_EQ(of("PK\x03\x04"), expected + "a zip archive; unpack it first: unzip FILE");
  EXPECT_EQ(of("BZh is no word"), "no error");
  EXPECT_EQ(of("\x7F"
               "ELF\0"s),
            ": expected text, found a NUL byte at byte 5; give plain text in UTF-8, or JSONL");
}

TEST_F(PromptsTest, ThroughAPipe) {
  const std::string fifo = write("x", "") + ".fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  try {
    load_prompts(fifo);
    ADD_FAILURE() << "nobody writes to it";
  } catch (const Error& e) {
    EXPECT_EQ(e.what(),
              fifo + ": expected a file with prompts, found a FIFO that nobody writes to");
  }
  int ends[2];  // as of <(...)
  ASSERT_EQ(pipe(ends), 0);
  std::thread writer([&] {  // more than a pipe holds at once
    for (int i = 0; i < 30000; ++i) EXPECT_EQ(::write(ends[1], "{\"text\": \"x\"}\n", 14), 14);
    close(ends[1]);
  });
  EXPECT_EQ(load_prompts("/dev/fd/" + std::to_string(ends[0])).size(), 30000u);
  writer.join();
  close(ends[0]);
}

TEST_F(PromptsTest, LimitsOnSizeAndDepth) {
  const std::string longest(16 << 20, 'x');
  EXPECT_EQ(load("a.txt", longest + "\n").size(), 1u);
  EXPECT_EQ(error("a.txt", "x\n" + longest + "x\n"),
            "a.txt: line 2: expected at most 16 MB, found 16777217 bytes");
  const auto nested = [](size_t levels) {
    return "{\"prompt\": \"x\", \"a\": " + std::string(levels, '[') + std::string(levels, ']') +
           "}";
  };
  EXPECT_EQ(load("b.jsonl", nested(30)).size(), 1u);
  EXPECT_EQ(error("b.jsonl", nested(1000000)),
            "b.jsonl: line 1: expected JSON at most 32 levels deep, found more");
}

TEST_F(PromptsTest, SharedSets) {
  const std::string path = "../shared/data/prompts/mt_bench.jsonl";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "skipped: " << path << " is absent";
  const auto prompts = load_prompts(path);
  EXPECT_EQ(prompts.size(), 80u);
  EXPECT_TRUE(prompts[0].messages[0].content.starts_with("Compose an engaging travel blog post"));
}

TEST_F(PromptsTest, BrokenLinesAreNamedAndLeftOut) {
  const std::string path =
      write("a.jsonl",
            "{\"prompt\": \"one\"}\n{\"prompt\": 2}\n\n{\"prompt\": \"three\"\n"
            "\xff\n{\"prompt\": \"five\"}\n");
  testing::internal::CaptureStderr();
  const std::vector<Prompt> prompts = load_prompts(path, BrokenLines::kLeaveOut);
  const std::string said = testing::internal::GetCapturedStderr();
  ASSERT_EQ(prompts.size(), 2u);
  EXPECT_EQ(prompts[1].messages[0].content, "five");
  EXPECT_EQ(prompts[1].line, 6);
  EXPECT_NE(said.find("a.jsonl: 3 broken lines left out: 2, 4, 5; the first: "), std::string::npos)
      << said;
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  EXPECT_THROW(load_prompts(path, BrokenLines::kStop), Error);

  std::string many;
  for (int i = 0; i < 50; ++i) many += "{}\n";
  testing::internal::CaptureStderr();
  EXPECT_THROW(load_prompts(write("b.jsonl", many), BrokenLines::kLeaveOut), Error);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("50 broken lines left out: 1, 2, 3, "),
            std::string::npos);
  testing::internal::CaptureStderr();
  load_prompts(write("c.jsonl", "{\"prompt\": \"one\"}\n"), BrokenLines::kLeaveOut);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST_F(PromptsTest, LinesWithAFieldOfSomeValue) {
  const std::string path =
      write("a.jsonl",
            "{\"prompt\": \"one\", \"licence\": \"MIT\"}\n{\"prompt\": \"two\"}\n\n"
            "{\"prompt\": \"three\", \"licence\": \"MIT-0\"}\n{\"licence\": \"none\"}\n"
            "{\"prompt\": \"five\", \"licence\": \"CC0-1.0 (a=b)\", \"safe\": true}\n");
  const auto lines = [&](std::string_view text, std::string* said = nullptr) {
    LineFilter where;
    EXPECT_TRUE(where_flag(&where).value.set(text)) << text;
    testing::internal::CaptureStderr();
    std::vector<int> numbers;
    for (const Prompt& prompt : load_prompts(path, BrokenLines::kStop, where))
      numbers.push_back(prompt.line);
    const std::string noted = testing::internal::GetCapturedStderr();
    if (said != nullptr) *said = noted;
    return numbers;
  };
  std::string said;
  EXPECT_EQ(lines("licence=MIT", &said), std::vector<int>{1});
  EXPECT_TRUE(said.ends_with("a.jsonl: 4 lines without licence=MIT left out, 1 prompt kept\n"))
      << said;
  EXPECT_EQ(lines("licence=CC0-1.0 (a=b),MIT"), (std::vector<int>{1, 6}));
  EXPECT_EQ(lines("safe=true"), std::vector<int>{6});
  EXPECT_EQ(error("a.jsonl", test::read_text(path), "licence=mit"),
            "a.jsonl: expected a line with licence=mit, found none of 5 lines");
  EXPECT_EQ(error("a.txt", "one\n", "licence=MIT"),
            "a.txt: expected JSONL, whose lines have fields for --where, found plain text");
  LineFilter where;
  for (const char* text : {"", "licence", "=MIT", "licence=", "licence=MIT,"})
    EXPECT_FALSE(where_flag(&where).value.set(text)) << text;
}

}  // namespace
}  // namespace chimera
