#include "tools/train/eval_chart.h"

#include <algorithm>
#include <cmath>

#include "loader/output_file.h"
#include "tools/output.h"

namespace chimera {
namespace {

constexpr double kSide = 220, kGap = 70, kTop = 50, kRowHeight = kSide + 100;
constexpr const char* kColours[] = {"#888888", "#c08020", "#2080c0", "#209050", "#c02050"};

std::string at(double x, double y) {
  return fixed_text(x, 1) + "," + fixed_text(y, 1) + " ";
}

// A square with its axes; data runs from 0 to 1 in both directions.
class Panel {
 public:
  Panel(double left, double top, const std::string& title, const std::string& axis)
      : left_(left), top_(top) {
    svg_ = "<rect x=\"" + fixed_text(left, 1) + "\" y=\"" + fixed_text(top, 1) +
           "\" width=\"220\" height=\"220\" fill=\"none\" stroke=\"#bbb\"/>\n";
    label(0.5, 1.05, title, "middle");
    label(0.5, -0.16, axis, "middle");
  }
  void label(double x, double y, const std::string& text, const char* anchor,
             const std::string& colour = "#333") {
    svg_ += "<text x=\"" + fixed_text(px(x), 1) + "\" y=\"" + fixed_text(py(y), 1) +
            "\" text-anchor=\"" + anchor + "\" fill=\"" + colour + "\">" + xml_text(text) +
            "</text>\n";
  }
  void tick_x(double x, const std::string& text) { label(x, -0.08, text, "middle"); }
  void tick_y(double y, const std::string& text) { label(-0.02, y - 0.02, text, "end"); }
  void line(const std::vector<std::pair<double, double>>& points, const std::string& colour) {
    svg_ += "<polyline fill=\"none\" stroke-width=\"1.5\" stroke=\"" + colour + "\" points=\"";
    for (const auto& [x, y] : points) svg_ += at(px(x), py(y));
    svg_ += "\"/>\n";
    for (const auto& [x, y] : points)
      svg_ += "<circle r=\"2.5\" cx=\"" + fixed_text(px(x), 1) + "\" cy=\"" + fixed_text(py(y), 1) +
              "\" fill=\"" + colour + "\"/>\n";
  }
  const std::string& svg() const { return svg_; }

 private:
  double px(double x) const { return left_ + kSide * x; }
  double py(double y) const { return top_ + kSide * (1 - y); }

  double left_, top_;
  std::string svg_;
};

std::string draw_trees(const EvalRow& row, double top) {
  Panel panel(kGap, top, "tokens a pass", "nodes");
  double most = 2;
  for (const TreeCurve& curve : row.curves)
    for (const double tau : curve.tokens_per_pass) most = std::max(most, std::ceil(tau));
  const auto x = [](int nodes) { return std::log2(nodes / 3.0) / std::log2(80 / 3.0); };
  for (const int nodes : kTreeSizes) panel.tick_x(x(nodes), std::to_string(nodes));
  for (int tau = 1; tau <= static_cast<int>(most); ++tau)
    panel.tick_y((tau - 1) / (most - 1), std::to_string(tau));
  for (size_t c = 0; c < row.curves.size(); ++c) {
    std::vector<std::pair<double, double>> points;
    const TreeCurve& curve = row.curves[c];
    for (size_t i = 0; i < curve.tokens_per_pass.size(); ++i)
      points.push_back({x(kTreeSizes[i]), (curve.tokens_per_pass[i] - 1) / (most - 1)});
    panel.line(points, kColours[c]);
    panel.label(0.03, 0.94 - 0.06 * static_cast<double>(c), curve.tree, "start", kColours[c]);
  }
  return panel.svg();
}

std::string draw_accuracy(const EvalRow& row, double top) {
  Panel panel(2 * kGap + kSide, top, "right guesses: the first, the first two, four, eight",
              "depth");
  const auto& depths = row.measurement.depths;
  const auto x = [&](size_t d) {
    return (static_cast<double>(d) + 0.5) / static_cast<double>(depths.size());
  };
  for (const int tenth : {0, 2, 4, 6, 8, 10})
    panel.tick_y(tenth / 10.0, std::to_string(10 * tenth) + "%");
  for (size_t d = 0; d < depths.size(); ++d) panel.tick_x(x(d), std::to_string(d + 1));
  for (size_t c = 0; c < 4; ++c) {
    std::vector<std::pair<double, double>> points;
    for (size_t d = 0; d < depths.size(); ++d) {
      double right = 0;
      for (size_t r = 0; r < (size_t{1} << c); ++r)
        right += static_cast<double>(depths[d].at_rank[r]);
      if (depths[d].n > 0) points.push_back({x(d), right / static_cast<double>(depths[d].n)});
    }
    panel.line(points, kColours[c + 1]);
  }
  return panel.svg();
}

std::string draw_reliability(const EvalRow& row, double top) {
  Panel panel(3 * kGap + 2 * kSide, top, "how often a candidate is right",
              "probability given to its path");
  for (const int tenth : {0, 2, 4, 6, 8, 10}) {
    panel.tick_x(tenth / 10.0, fixed_text(tenth / 10.0, 1));
    panel.tick_y(tenth / 10.0, fixed_text(tenth / 10.0, 1));
  }
  panel.line({{0, 0}, {1, 1}}, "#dddddd");
  const std::pair<TreeSource, size_t> kinds[] = {
      {kNgramTree, 0}, {kDraftTree, 3}, {kHybridTree, 4}};
  for (const auto& [source, colour] : kinds) {
    std::vector<std::pair<double, double>> points;
    for (const Reliability::Bin& bin : row.measurement.reliability[source].bins)
      if (bin.n > 0)
        points.push_back({bin.probability / static_cast<double>(bin.n),
                          static_cast<double>(bin.came_true) / static_cast<double>(bin.n)});
    panel.line(points, kColours[colour]);
  }
  return panel.svg();
}

}  // namespace

void write_eval_chart(const std::vector<EvalRow>& rows, const std::string& path) {
  const double width = 4 * kGap + 3 * kSide,
               height = kTop + kRowHeight * static_cast<double>(rows.size());
  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + fixed_text(width, 0) +
                    "\" height=\"" + fixed_text(height, 0) +
                    "\" font-family=\"sans-serif\" font-size=\"11\">\n"
                    "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n";
  for (size_t i = 0; i < rows.size(); ++i) {
    const double top = kTop + kRowHeight * static_cast<double>(i);
    svg += "<text x=\"" + fixed_text(kGap, 0) + "\" y=\"" + fixed_text(top - 30, 0) +
           "\" font-size=\"14\">" + xml_text(rows[i].title) + "</text>\n";
    svg += draw_trees(rows[i], top) + draw_accuracy(rows[i], top) + draw_reliability(rows[i], top);
  }
  OutputFile file(path);
  file.write(svg + "</svg>\n");
  file.commit();
}

}  // namespace chimera
