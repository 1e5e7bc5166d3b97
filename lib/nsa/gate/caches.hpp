#pragma once
// Are FP8 caches worth it on this device? From decode points that differ in model.kv_precision and model.cmp_precision
// alone; docs/METRICS.md, "FP8 caches", has the rule and its reasons.

#include <ostream>
#include <string>
#include <vector>

#include "nsa/gate/gate.hpp"

namespace nsa {

/// Thresholds: speed of a step over that on unquantised caches; share of the blocks that ranking chose there too;
/// importance that the blocks chosen instead lack; root mean square of the change of o over that of o.
constexpr double caches_speedup = 1.2, caches_agreement = 0.95, caches_lost = 0.01, caches_change = 0.1;

/// One context and batch with FP8 caches.
struct CachesPoint {
  std::string name, caches;  ///< "context 65536, batch 32"; "fp8", "fp8 kv", "fp8 cmp"
  double bytes = 0;          ///< modelled, of a step, over those on unquantised caches
  std::vector<Condition> conditions;
  Verdict verdict = Verdict::inconclusive;
  std::string why;
};

struct CachesVerdict {
  std::string device, backend, git_commit, precision;
  std::vector<CachesPoint> points;
  Verdict verdict = Verdict::inconclusive;  ///< of the point that comes out best: caches are chosen by context
};

/// Whether a file has points with FP8 caches: these are judged here and not by the M4 gate.
bool has_fp8_caches(const GateFile& file);
/// One verdict for each device. Throws UserError where the files of a device have different commits.
std::vector<CachesVerdict> judge_caches(const std::vector<GateFile>& files);
void print_caches(std::ostream& out, const CachesVerdict& verdict);

}  // namespace nsa
