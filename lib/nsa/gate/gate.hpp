#pragma once
// The M4 gate: is a custom selection kernel worth shipping on this device? Reads result files, needs no device.
// Three conditions, each with the interval of what was measured; the rule and its reasons are in docs/METRICS.md.

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "nsa/gate/csv_audit.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {

/// Thresholds of the M4 plan and of the decode benchmark guide.
constexpr double gate_share = 0.25, gate_share_high = 0.30, gate_speedup = 1.2, gate_error = 1e-3;

/// A value and its interval; all NaN where nothing was measured, the interval NaN where n is too small for one.
struct Measured {
  double value, low, high;
  std::int64_t n = 0;
};

enum class Outcome { met, not_met, open };
enum class Verdict { proceed, stay, inconclusive };

struct Condition {
  std::string name;
  double threshold = 0;
  bool at_least = true;  ///< else at most
  Measured measured;
  Outcome outcome = Outcome::open;
  std::string why;  ///< where that needs more than the numbers
};

/// What the ways of measuring say a branch costs, seconds: its stages in mode branches, the step less the step without
/// it. And the whole: all stages, mode total.
struct Account {
  std::string name;  ///< "cmp", "sel", "win", "step"
  Measured stages, step;
  bool agree = true;  ///< the intervals overlap
  std::string why;    ///< what may keep them apart
};

struct ContextVerdict {
  std::int64_t context = 0, batch = 1;
  Condition share, share_high;  ///< of the whole step at 25 and 30%, by mode branches
  Measured share_ablation;      ///< of the whole step, by leaving the branch out
  Measured one_hot;             ///< a step with gates forced to sel, over a step
  Measured share_attention;     ///< of cmp, rank, sel, win, combine
  std::vector<Account> accounts;
  Verdict verdict = Verdict::inconclusive;
  std::string why;
};

struct ShapeResult {
  std::string name;    ///< "N=256 H=4 D=64 n=8 scattered"
  std::string kernel;  ///< that `fused` ran as; "" where the file does not say
  Measured with_gather, packed, error;
};

struct DeviceVerdict {
  std::string device, backend, git_commit, precision;
  std::string measured;  ///< when the last of its runs ended, UTC
  std::vector<std::string> files, commands;
  std::vector<ContextVerdict> contexts;
  std::vector<ShapeResult> shapes;
  Condition speedup, speedup_packed, error;  ///< of the worst shape; the first and the last decide
  std::string guards;                        ///< flash against sdpa (report/report.hpp), where files hold it
  std::vector<std::string> notes;            ///< what was left out, and what a reader should know
  Verdict verdict = Verdict::inconclusive;
  std::string why;
};

struct GateFile {
  std::string path;
  ResultFile result;
};

/// The page of each device, in the order in which the files name them. `contexts`: those that count, empty for all.
/// Throws UserError when files of one device are of different commits or inputs or hold the same point twice, saying
/// which; or when a file has no point.
std::vector<DeviceVerdict> judge(const std::vector<GateFile>& files, const std::vector<std::int64_t>& contexts = {});

void print_gate(std::ostream& out, const DeviceVerdict& device);
/// The decision as a record in Markdown, with the page and all shapes: what docs/adr/ holds.
void print_adr(std::ostream& out, const DeviceVerdict& device);
/// Both as one JSON document: docs/METRICS.md.
void print_gate_json(std::ostream& out, const std::vector<DeviceVerdict>& devices, const std::vector<CsvAudit>& audits);

const char* word_of(Verdict verdict);  ///< "PROCEED", "STAY", "INCONCLUSIVE"
const char* word_of(Outcome outcome);  ///< "met", "not met", "open"

}  // namespace nsa
