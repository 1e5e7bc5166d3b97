#pragma once
// The M4 gate: is a custom selection kernel worth shipping on this device? It reads result files and needs no device.
// It checks three conditions, each by the interval of its measured value; docs/METRICS.md has the rule and its reasons.

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "nsa/gate/csv_audit.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {

/// Thresholds of the M4 plan and of the decode benchmark guide.
constexpr double gate_share = 0.25, gate_share_high = 0.30, gate_speedup = 1.2, gate_error = 1e-3;

/// A value and its interval: all NaN where nothing was measured, the interval NaN where n is too small.
struct Measured {
  double value, low, high;
  std::int64_t n = 0;
};

enum class Outcome { met, not_met, open };
enum class Verdict { proceed, stay, inconclusive };

/// What the number of a condition is: a share (of times), a ratio of times, a mean error.
enum class Unit { share, ratio, error };

struct Condition {
  std::string name;
  Unit unit = Unit::share;
  double threshold = 0;
  bool at_least = true;  ///< false: at most
  Measured measured;
  Outcome outcome = Outcome::open;
  std::string why;  ///< explanation, where the numbers need one
};

/// The cost of a branch in seconds, measured in two ways: by its stages in mode branches, and as the step minus the
/// step without the branch. For "step": the sum of all stages, and the step in mode total.
struct CostBreakdown {
  std::string name;  ///< "cmp", "sel", "win", "step"
  Measured stages, step;
  bool agree = true;  ///< the intervals overlap
  std::string why;    ///< a possible reason for a difference
};

struct ContextVerdict {
  std::int64_t context = 0, batch = 1;
  Condition share, share_high;  ///< of the whole step at 25 and 30%, by mode branches
  Measured share_ablation;      ///< of the whole step, by leaving the branch out
  Measured one_hot;             ///< time of a step with gates forced to sel over that of a step
  Measured share_attention;     ///< of cmp, rank, sel, win, combine
  std::vector<CostBreakdown> costs;
  Verdict verdict = Verdict::inconclusive;
  std::string why;
};

/// Speed of `fused` over the fastest of several baselines.
struct Speed {
  Measured measured;     ///< value and bounds are the smallest of all baselines
  std::string baseline;  ///< the one of the smallest value: "sdpa", "torch_cudnn_sdpa"; "" without any
};

struct ShapeResult {
  std::string name;    ///< "N=256 H=4 D=64 n=8 scattered"
  std::string kernel;  ///< the backend's kernel that `fused` ran; "" where the file does not say
  Speed with_gather, packed;
  Measured error;
  std::string noisy;  ///< why its times decide nothing; empty: they do
};

struct DeviceVerdict {
  std::string device, backend, git_commit, precision;
  std::string measured;  ///< end of the last run, UTC
  std::vector<std::string> files, commands;
  std::vector<ContextVerdict> contexts;
  std::vector<ShapeResult> shapes;
  Condition speedup, speedup_packed, error;  ///< of the worst shape; speedup and error decide
  std::string guards;                        ///< flash against sdpa (report/report.hpp), where the files hold it
  std::vector<std::string> peers;            ///< the libraries among the baselines: "torch 2.11.0 (peers.h5)"
  std::vector<std::string> missing;          ///< decode points that an input asks for and that no file measured whole
  std::vector<std::string> notes;            ///< points that were left out, and other remarks
  Verdict verdict = Verdict::inconclusive;
  std::string why;
};

struct GateFile {
  std::string path;
  ResultFile result;
};

/// The verdict of each device, by backend and name; the order of the files changes nothing. `contexts`: the contexts
/// that count; empty: all.
/// Throws UserError when files of one device have different commits or inputs or hold the same point twice (the message
/// names them), or when a file has no point.
std::vector<DeviceVerdict> judge(const std::vector<GateFile>& files, const std::vector<std::int64_t>& contexts = {});

void print_gate(std::ostream& out, const DeviceVerdict& device);
/// The decision as a Markdown record with the page and all shapes; docs/adr/ holds such records.
void print_adr(std::ostream& out, const DeviceVerdict& device);
/// Verdicts and audits as one JSON document: docs/METRICS.md.
void print_gate_json(std::ostream& out, const std::vector<DeviceVerdict>& devices, const std::vector<CsvAudit>& audits);

const char* word_of(Verdict verdict);  ///< "PROCEED", "STAY", "INCONCLUSIVE"
const char* word_of(Outcome outcome);  ///< "met", "not met", "open"

}  // namespace nsa
