#pragma once
// `nsa run --dry-run --advise MACHINE`: the heads x kv layouts of the given ranks, ranked by the cost model.

#include <ostream>
#include <string>
#include <vector>

#include "nsa/config/machine.hpp"
#include "nsa/experiment/cost_model.hpp"

namespace nsa {

struct LayoutAdvice {
  std::int32_t heads = 1, kv = 1;
  PredictedTime time;
  double memory = 0;      ///< bytes of the first rank
  std::int32_t idle = 0;  ///< kv ranks that own no block
  std::string why;        ///< why it is not the first, or what makes it the first
};

struct PointAdvice {
  Point point;
  std::vector<LayoutAdvice> layouts;  ///< those that fit, the fastest first; then the others
  std::size_t fitting = 0;
};

struct Advice {
  std::vector<std::string> notes;  ///< the error of the times, and what makes it unknown
  std::vector<PointAdvice> points;
};

/// The input as it runs on the machine: run.backend = "auto" is the machine's. Throws UserError for the other backend.
Config on_machine(Config config, const Machine& machine);

/// Of such an input, with the sizes of `backend`. Throws UserError where the machine says nothing of the input's task.
Advice make_advice(const Config& config, const Machine& machine, const Backend& backend, int ranks);

void print_advice(std::ostream& out, const Advice& advice, const Machine& machine, int ranks);

/// {"machine": ..., "notes": [...], "points": [...]} (docs/METRICS.md).
std::string advice_json(const Advice& advice, const Machine& machine);

}  // namespace nsa
