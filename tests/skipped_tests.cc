// Says at the end how many tests had no data: a run that proves less must not look like one that
// proves all.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>

namespace chimera::test {
namespace {

// Every such test says which path is missing.
bool wants_data(const testing::TestInfo& test) {
  const testing::TestResult& result = *test.result();
  for (int i = 0; i < result.total_part_count(); ++i) {
    const testing::TestPartResult& part = result.GetTestPartResult(i);
    const std::string reason = part.message();
    if (part.skipped() && (reason.find("../shared/") != std::string::npos ||
                           reason.find("models/") != std::string::npos))
      return true;
  }
  return false;
}

class SkippedTests : public testing::Environment {
  void TearDown() override {
    const testing::UnitTest& all = *testing::UnitTest::GetInstance();
    int count = 0;
    for (int s = 0; s < all.total_test_suite_count(); ++s) {
      const testing::TestSuite& suite = *all.GetTestSuite(s);
      for (int i = 0; i < suite.total_test_count(); ++i) count += wants_data(*suite.GetTestInfo(i));
    }
    if (count > 0)
      std::printf("%d tests skipped: their data (models/, ../shared/data/) is not here\n", count);
  }
};
const testing::Environment* const kSkippedTests =
    testing::AddGlobalTestEnvironment(new SkippedTests);

}  // namespace
}  // namespace chimera::test
