#include "tools/bench/roofline.h"

#include <algorithm>
#include <cmath>

#include "loader/output_file.h"
#include "tools/output.h"

namespace chimera {
namespace {

constexpr double kWidth = 720, kHeight = 460, kLeft = 70, kRight = 30, kTop = 50, kBottom = 50;

// Logarithmic axes: multiply-adds a byte, and billions of them a second.
class Chart {
 public:
  Chart(double x_low, double x_high, double y_low, double y_high)
      : x_low_(x_low), x_high_(x_high), y_low_(y_low), y_high_(y_high) {}

  void line(double x0, double y0, double x1, double y1, const char* colour) {
    svg_ += "<line x1=\"" + px(x0) + "\" y1=\"" + py(y0) + "\" x2=\"" + px(x1) + "\" y2=\"" +
            py(y1) + "\" stroke=\"" + colour + "\" stroke-width=\"1.5\"/>\n";
  }
  void point(double x, double y) {
    svg_ += "<circle cx=\"" + px(x) + "\" cy=\"" + py(y) + "\" r=\"3.5\" fill=\"#2080c0\"/>\n";
  }
  void text(double x, double y, double dx, double dy, const char* anchor, const std::string& t) {
    svg_ += "<text x=\"" + px(x, dx) + "\" y=\"" + py(y, dy) + "\" text-anchor=\"" + anchor +
            "\">" + xml_text(t) + "</text>\n";
  }
  const std::string& svg() const { return svg_; }

 private:
  std::string px(double x, double shift = 0) const {
    const double part = std::log(x / x_low_) / std::log(x_high_ / x_low_);
    return fixed_text(kLeft + (kWidth - kLeft - kRight) * part + shift, 1);
  }
  std::string py(double y, double shift = 0) const {
    const double part = std::log(y / y_low_) / std::log(y_high_ / y_low_);
    return fixed_text(kHeight - kBottom - (kHeight - kTop - kBottom) * part + shift, 1);
  }

  double x_low_, x_high_, y_low_, y_high_;
  std::string svg_;
};

}  // namespace

void write_roofline(const Roofline& r, const std::string& path) {
  const double per_byte = r.multiply_adds / r.weight_bytes;  // of one row
  const double memory = r.bytes_per_second / 1e9, arithmetic = r.multiply_adds_per_second / 1e9;
  double lowest = memory * per_byte;
  for (const Roofline::Pass& p : r.passes)
    lowest = std::min(lowest, p.rows * r.multiply_adds / p.seconds / 1e9);
  const double x_low = per_byte / 1.5, x_high = per_byte * 100;
  const double y_low = lowest / 1.5, y_high = arithmetic * 1.8;

  Chart chart(x_low, x_high, y_low, y_high);
  chart.line(x_low, y_low, x_high, y_low, "#bbb");
  chart.line(x_low, y_low, x_low, y_high, "#bbb");
  for (double y = std::pow(10, std::ceil(std::log10(y_low))); y < y_high; y *= 10) {
    chart.line(x_low, y, x_high, y, "#eee");
    chart.text(x_low, y, -6, 4, "end", fixed_text(y, 0));
  }
  for (const Roofline::Pass& p : r.passes) {
    if ((p.rows & (p.rows - 1)) != 0) continue;
    chart.text(p.rows * per_byte, y_low, 0, 16, "middle", std::to_string(p.rows));
  }
  chart.text(x_high, y_low, 0, 34, "end",
             "rows of a pass; one is " + fixed_text(per_byte, 2) +
                 " multiply-adds for each byte of weights");

  const double ridge = std::clamp(arithmetic / memory, x_low, x_high);
  chart.line(x_low, memory * x_low, ridge, memory * ridge, "#c08020");
  chart.line(ridge, arithmetic, x_high, arithmetic, "#c02050");
  chart.text(x_low, memory * x_low, 14, -6, "start", "memory, " + fixed_text(memory, 1) + " GB/s");
  chart.text(x_high, arithmetic, 0, -6, "end",
             "arithmetic, weights in cache: " + fixed_text(arithmetic, 0) + " G multiply-adds/s");
  for (const Roofline::Pass& p : r.passes) {
    const double y = p.rows * r.multiply_adds / p.seconds / 1e9;
    const double roof = std::min(memory * p.rows * per_byte, arithmetic);
    chart.point(p.rows * per_byte, y);
    chart.text(p.rows * per_byte, y, 7, 14, "start", fixed_text(100 * y / roof, 0) + "%");
  }

  OutputFile file(path);
  file.write("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + fixed_text(kWidth, 0) +
             "\" height=\"" + fixed_text(kHeight, 0) +
             "\" font-family=\"sans-serif\" font-size=\"11\">\n"
             "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
             "<text x=\"" +
             fixed_text(kLeft, 0) + "\" y=\"24\" font-size=\"14\">" + xml_text(r.title) +
             "</text>\n" + chart.svg() + "</svg>\n");
  file.commit();
}

}  // namespace chimera
