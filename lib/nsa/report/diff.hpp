#pragma once
// `nsa diff A B`: whether two files hold the same result, and which stages got slower, with intervals.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include "nsa/report/statistics.hpp"

namespace nsa {

/// How B's time of a series compares with A's. docs/METRICS.md, "The comparison".
enum class Difference { same, faster, slower, unclear };
const char* word_of(Difference difference);  ///< "SAME", "FASTER", "SLOWER", "UNCLEAR"

/// All verdicts of two files hold together with a probability of at least 1 - family_error.
constexpr double family_error = 0.008;  // so that at most 1% of equal runs are called different
/// What is known of runs before any is compared; docs/METRICS.md says from which measurements.
struct RunVariation {
  double between_runs;  ///< standard deviation of the logarithm of a median from run to run
  double same_margin;   ///< a ratio whose whole interval is this close to 1 is SAME
};
/// Of whole steps and kernels on GPUs and on the host, and of stages that are launched and timed one by one.
constexpr RunVariation cuda_variation{0.005, 0.025}, host_variation{0.010, 0.05}, stage_variation{0.016, 0.05};
/// The same_margin of runs by turns, which measure what differs between runs.
constexpr double turns_same_margin = 0.02;

/// SLOWER: the whole interval is above 1; FASTER: below 1; SAME: within same_margin of 1 on both sides; else UNCLEAR.
Difference judge_ratio(const Ratio& ratio, double same_margin);

struct DiffOptions {
  std::string a, b;
  std::string csv;                                              ///< also write the times here; empty: nowhere
  double fail_above = std::numeric_limits<double>::infinity();  ///< largest slowdown that is accepted, 0.05: 5%
};

struct DiffResult {
  bool same = true;  ///< the results agree: parameters, reads, validity, outputs where both files hold them
  bool slower_than_allowed = false;  ///< a series is SLOWER by more than fail_above
};

/// Prints the comparison. Throws UserError for files that cannot be read or have no point in common.
DiffResult diff_results(std::ostream& out, const DiffOptions& options);

/// Files of the same input that programs A and B wrote by turns.
struct PairedFiles {
  std::string a, b;
};

/// Compares the medians pair by pair: of each series the median of the ratios B/A over pairs, with its order-statistic
/// interval. What changes between runs is in the interval. Throws UserError for files that cannot be read or hold other
/// points than the first pair.
DiffResult compare_pairs(std::ostream& out, const std::vector<PairedFiles>& pairs, double fail_above);

/// The number of pairs from which on compare_pairs has an interval for so many series.
std::int64_t pairs_needed(std::size_t series);

}  // namespace nsa
