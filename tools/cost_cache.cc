#include "tools/cost_cache.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "loader/output_file.h"
#include "tools/machine.h"
#include "tools/output.h"

namespace chimera {
namespace {

namespace fs = std::filesystem;

// XDG base directories: a relative path is to be ignored.
fs::path cache_folder() {
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  if (xdg != nullptr && fs::path(xdg).is_absolute()) return fs::path(xdg) / "chimera";
  if (home != nullptr && fs::path(home).is_absolute()) return fs::path(home) / ".cache" / "chimera";
  return {};
}

int rows_of(const Session& session) {
  return std::min(session.options().max_nodes + 1, CostCurve::kMaxRows);
}
int context_of(const Session& session) {
  return std::min(session.options().context, Session::kMeasuredContext);
}

}  // namespace

CostCache::CostCache(const Model& model, const Llama& llama)
    : key_(cpu_model() + cpu_generation() + ", " + llama.backend().description() + ", contract " +
           std::to_string(llama.backend().contract_version()) + ", model " + model.fingerprint +
           ", " + std::to_string(llama.weight_bytes()) + " bytes a pass" +
           (model.mapped ? ", mapped" : "")) {
  const fs::path folder = cache_folder();
  if (!folder.empty()) path_ = (folder / ("cost-" + hash_text(key_) + ".json")).string();
}

// Whether the kept curve is still that of this machine: what it says of a single row, and of a
// small tree's price beside it, is compared with a few passes. (It may have been measured while
// something else was running.) Where passes are long the row has to do: each of the text's own will
// tell more.
bool CostCache::holds(Session* session) const {
  constexpr double kTolerance = 0.5, kPriceTolerance = 0.15, kLong = 0.05;
  const auto near = [](double found, double kept, double tolerance) {
    return std::abs(found / kept - 1) < tolerance;
  };
  const CostCurve& kept = session->cost();
  const double plain = session->time_pass(1);
  if (!near(plain, kept.seconds(1), kTolerance)) return false;
  if (plain > kLong) return true;
  const int rows = std::min(6, rows_of(*session));
  return near(session->time_pass(rows) / plain, kept.seconds(rows) / kept.seconds(1),
              kPriceTolerance);
}

void CostCache::tune(Session* session, bool again) const {
  if (!again && load(session) && holds(session)) return;
  session->set_cost({});
  session->measure_cost();
  keep(*session);
}

bool CostCache::load(Session* session) const {
  if (path_.empty()) return false;
  std::ifstream file(path_, std::ios::binary);
  std::string text(1 << 16, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  const auto kept = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  // A file that is not as keep() leaves it is measured over, whatever happened to it.
  if (!kept.is_object() || kept.value("for", nlohmann::json()) != key_) return false;
  const auto rows = kept.value("rows", nlohmann::json()),
             context = kept.value("context", nlohmann::json()),
             seconds = kept.value("seconds", nlohmann::json()),
             attention = kept.value("attention", nlohmann::json());
  if (!rows.is_number_integer() || rows < rows_of(*session) || !context.is_number_integer() ||
      context < (context_of(*session) + 1) / 2 || !seconds.is_array() ||
      seconds.size() != CostCurve::kMaxRows || !attention.is_number() || !(attention >= 0.0) ||
      !(attention < 1e6))
    return false;
  CostCurve curve;
  for (int i = 1; i <= CostCurve::kMaxRows; ++i) {
    const auto& value = seconds[static_cast<size_t>(i - 1)];
    if (!value.is_number() || !(value >= 0.0) || !(value < 1e6)) return false;
    if (value > 0.0) curve.set(i, value);
  }
  if (curve.measured(1) <= 0) return false;
  curve.set_attention(attention);
  session->set_cost(curve);
  return true;
}

void CostCache::keep(const Session& session) const {
  if (path_.empty() || !session.cost().known()) return;
  auto seconds = nlohmann::ordered_json::array();
  for (int i = 1; i <= CostCurve::kMaxRows; ++i) seconds.push_back(session.cost().measured(i));
  const nlohmann::ordered_json kept = {{"for", key_},
                                       {"rows", rows_of(session)},
                                       {"context", context_of(session)},
                                       {"seconds", seconds},
                                       {"attention", session.cost().attention()}};
  try {
    fs::create_directories(fs::path(path_).parent_path());
    OutputFile file(path_);
    file.write(kept.dump() + "\n");
    file.commit();
  } catch (const std::exception&) {  // no room, no permission: measured again next time
  }
}

}  // namespace chimera
