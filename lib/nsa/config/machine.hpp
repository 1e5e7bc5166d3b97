#pragma once
// A machine, as `nsa run --dry-run --advise` needs to know it: the coefficients of the cost model (docs/METRICS.md).
// `nsa-analysis model --machine` writes such files from measured results; machines/ holds some.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/interface/backend.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

/// What an exchange takes.
struct ExchangeCost {
  double fixed = 0;      ///< s
  double rank = 0;       ///< s, for each of its ranks but one
  double bandwidth = 0;  ///< byte/s received
  bool known() const { return fixed > 0 || rank > 0 || bandwidth > 0; }
};

/// What a layer takes in a decode step, or in a whole prefill. A rate of 0 is no limit.
struct PhaseCost {
  double fixed = 0;                            ///< s
  double bandwidth = 0;                        ///< byte/s of modelled bytes
  double arithmetic = 0;                       ///< FLOP/s
  double block = 0;                            ///< s for each block of one sequence that a rank scores; decode
  ExchangeCost exchange;                       ///< of a fused decode step: inside one launch
  ExchangeCost launches;                       ///< of a fused decode step in several launches, with what they cost
  double error_median = -1, error_worst = -1;  ///< |predicted / measured - 1| on layouts not fitted; < 0: not known
  std::int64_t ranks = 0;                      ///< most ranks that shared a measured exchange; 0: none did
  bool fused = false;             ///< a decode step runs fused, so that its bytes are fewer (docs/METRICS.md)
  std::string measured;           ///< where the numbers are from
  std::string launches_measured;  ///< where those of `launches` are from
  /// Keys of the input and their values where they were measured. What differs has an unknown error.
  std::vector<Parameter> input;
};

struct Machine {
  std::string path, name;
  BackendKind backend = BackendKind::host;
  double memory = 0;              ///< bytes of a rank
  std::optional<PlannedGpu> gpu;  ///< whose workspace is planned
  std::int64_t node = 1;          ///< ranks of a node
  std::optional<PhaseCost> decode, prefill;
  double network_latency = 0, network_bandwidth = 0;  ///< between nodes: s of a message, byte/s of a rank's link
  std::string network;                                ///< what it is, and whether it was measured
};

/// Throws UserError with every problem of the text: path:line:column, what is wrong, what to write.
Machine parse_machine(std::string_view text, const std::string& path);

}  // namespace nsa
