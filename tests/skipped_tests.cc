// Says at the end how many tests had no data, or no instructions: a run that proves less must not
// look like one that proves all.
#include <gtest/gtest.h>

#include <cstdio>
#include <initializer_list>
#include <string>

namespace chimera::test {
namespace {

// Every skipped test says which path is missing, or what the machine has not.
bool skipped_for(const testing::TestInfo& test, std::initializer_list<const char*> reasons) {
  const testing::TestResult& result = *test.result();
  for (int i = 0; i < result.total_part_count(); ++i) {
    const testing::TestPartResult& part = result.GetTestPartResult(i);
    const std::string said = part.message();
    for (const char* reason : reasons)
      if (part.skipped() && said.find(reason) != std::string::npos) return true;
  }
  return false;
}

class SkippedTests : public testing::Environment {
  void TearDown() override {
    const testing::UnitTest& all = *testing::UnitTest::GetInstance();
    int data = 0, machine = 0;
    for (int s = 0; s < all.total_test_suite_count(); ++s) {
      const testing::TestSuite& suite = *all.GetTestSuite(s);
      for (int i = 0; i < suite.total_test_count(); ++i) {
        data += skipped_for(*suite.GetTestInfo(i), {"../shared/", "models/"});
        machine += skipped_for(*suite.GetTestInfo(i), {"this machine has no"});
      }
    }
    if (data > 0)
      std::printf("%d tests skipped: their data (models/, ../shared/data/) is not here\n", data);
    if (machine > 0)
      std::printf("%d tests skipped: this machine has not the instructions (AMX, AVX-VNNI ..)\n",
                  machine);
  }
};
const testing::Environment* const kSkippedTests =
    testing::AddGlobalTestEnvironment(new SkippedTests);

}  // namespace
}  // namespace chimera::test
