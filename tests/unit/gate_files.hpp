#pragma once
// Result files made up for the tests of the gate, with known answers.

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/gate.hpp"

namespace nsa::test {

inline constexpr std::int64_t reps = 41;  // odd, so that the median is the middle of a spread

/// `middle` with a spread of +-`spread`, in no order.
inline std::vector<double> around(double middle, double spread) {
  std::vector<double> samples;
  for (std::int64_t i = 0; i < reps; ++i)
    samples.push_back(middle + spread * (static_cast<double>((i * 17) % reps) / ((reps - 1) / 2.0) - 1));
  return samples;
}

struct Shares {
  double selection = 40, total = 100, without_selection = 60;  ///< us; the stages add up to 100
  double spread = 0.5;                                         ///< of the selection, us
};

inline PointRecord decode_point(std::int64_t context, const Shares& shares = {}) {
  PointRecord p;
  p.parameters = {{"task.kind", "decode"},         {"model.precision", "bf16"}, {"model.d_k", std::int64_t{64}},
                  {"nsa.l_sel", std::int64_t{64}}, {"run.context", context},    {"run.batch", std::int64_t{1}},
                  {"run.force_branch", "none"}};
  p.routes = {"sdpa", "sdpa", "sdpa"};
  p.time.modes = {"branches", "total", "ablation_cmp", "ablation_sel", "ablation_win"};
  p.time.ranks = 1;
  p.time.reps = reps;
  const std::vector<double> selection = around(shares.selection, shares.spread);
  const auto set = [&](int mode, Stage stage, auto&& at) {
    for (std::int64_t rep = 0; rep < reps; ++rep)
      p.time.seconds[static_cast<std::size_t>((mode * stage_count + static_cast<int>(stage)) * reps + rep)] =
          1e-6 * at(rep);
  };
  p.time.seconds.assign(p.time.modes.size() * stage_count * reps, std::nan(""));
  set(0, Stage::rank, [&](auto rep) { return selection[rep] / 4; });
  set(0, Stage::attend_sel, [&](auto rep) { return selection[rep] * 3 / 4; });
  set(0, Stage::attend_cmp, [&](auto rep) { return (100 - selection[rep]) / 2; });
  set(0, Stage::attend_win, [&](auto rep) { return (100 - selection[rep]) / 4; });
  set(0, Stage::output, [&](auto rep) { return (100 - selection[rep]) / 4; });
  set(0, Stage::step, [](auto) { return 100; });
  set(1, Stage::step, [&](auto rep) { return shares.total + 0.01 * static_cast<double>(rep % 3); });
  set(2, Stage::step, [&](auto) { return shares.total - 30; });
  set(3, Stage::step, [&](auto rep) { return shares.without_selection + 0.01 * static_cast<double>(rep % 3); });
  set(4, Stage::step, [&](auto) { return shares.total - 15; });
  return p;
}

struct Speeds {
  double sdpa = 30, packed = 11, fused = 10, spread = 0.1;  ///< us
  double error = 2e-4, error_se = 1e-6;
};

inline PointRecord kernels_point(std::int64_t n, const Speeds& speeds = {}) {
  PointRecord p;
  p.parameters = {{"task.kind", "kernels"},
                  {"model.precision", "bf16"},
                  {"nsa.l_sel", std::int64_t{64}},
                  {"kernels.branch", "sel"},
                  {"kernels.rows", std::int64_t{256}},
                  {"kernels.heads", std::int64_t{4}},
                  {"kernels.head_size", std::int64_t{64}},
                  {"kernels.blocks", n},
                  {"kernels.spans", "scattered"}};
  KernelRecord& k = p.kernels;
  k.implementations = {"fused", "sdpa", "sdpa_packed"};
  k.ranks = 1;
  k.reps = reps;
  for (const double middle : {speeds.fused, speeds.sdpa, speeds.packed})
    for (const double us : around(middle, middle == speeds.fused ? 0 : speeds.spread)) k.seconds.push_back(us * 1e-6);
  k.variants = {"rows", "sdpa", "sdpa"};
  k.mean_abs_err = {speeds.error, 1e-4, 1e-4};
  k.mean_abs_err_se = {speeds.error_se, 1e-6, 1e-6};
  k.max_abs_err = {3e-3, 2e-3, 2e-3};
  return p;
}

inline GateFile file(const std::string& path, std::vector<PointRecord> points, const std::string& gpu = "NVIDIA H200") {
  GateFile f{path, {}};
  f.result.run.backend = "cuda";
  f.result.run.git_commit = "abc";
  f.result.run.status = "complete";
  f.result.run.system.resize(1);
  f.result.run.system[0].gpu = gpu;
  f.result.points = std::move(points);
  return f;
}

inline DeviceVerdict verdict(const Shares& shares, const Speeds& speeds) {
  return judge(
             {file("d.h5", {decode_point(1024, shares)}), file("k.h5", {kernels_point(8), kernels_point(16, speeds)})})
      .at(0);
}

inline std::string refusal(const std::vector<GateFile>& files) {
  try {
    judge(files);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

inline bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  UNSCOPED_INFO("'" << text << "' lacks '" << part << "'");
  return false;
}

}  // namespace nsa::test
