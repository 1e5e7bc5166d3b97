#pragma once
// The record of a point and of a run: plain data, gathered on rank 0, written by ResultWriter, printed by the report.
// docs/METRICS.md defines every number; docs/SCHEMA.md says where the result file holds it.

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "nsa/config/config.hpp"

namespace nsa {

/// Stages of a step in the order in which they run. `step` is the whole step.
enum class Stage : int {
  project,
  append,
  compress,
  attend_cmp,
  rank,
  attend_sel,
  attend_win,
  combine,
  output,
  comm,
  step
};
constexpr std::array stage_names = {"project",    "append",  "compress", "attend_cmp", "rank", "attend_sel",
                                    "attend_win", "combine", "output",   "comm",       "step"};
constexpr int stage_count = static_cast<int>(stage_names.size());

/// Raw samples: seconds[mode][stage][rank][rep], NaN where a mode does not time a stage.
/// Names of modes: "branches", "total", "ablation_cmp|sel|win" (that branch left out), "one_hot_cmp|sel|win".
struct TimeTable {
  std::vector<std::string> modes;
  std::int64_t ranks = 0, reps = 0;
  std::vector<double> seconds;
};

/// Tokens read, counted in the kernels at the load, summed over the rank's sequences, groups and layers:
/// counted[branch][rank][step]; expected[branch][rank][step] follows from the shape alone.
struct ReadTable {
  std::int64_t ranks = 0, steps = 0;
  std::vector<std::int64_t> counted, expected;
  std::vector<std::int64_t> nsa_vibe;  ///< [step]: nsa-vibe's formula cmp + n*l' + min(w, S), for one (b, g)
};

/// A tensor of the run, gathered over ranks, row-major.
struct TensorRecord {
  std::string name;  ///< "x", "weights/w_q", "q", ... (docs/SCHEMA.md, "Tensors")
  std::vector<std::int64_t> shape;
  std::vector<std::string> dims;  ///< "batch", "row", "head", ...
  std::vector<float> values;      ///< used unless integers is not empty
  std::vector<std::int32_t> integers;
};

/// Phases inside the one launch of a decode step whose ranks exchange by themselves: seconds[phase][rank][rep], means
/// over the work items of a rank. docs/METRICS.md, "Phases of one launch".
struct PhaseRecord {
  std::vector<std::string> phases;  ///< "attend_cmp", ..., "wait_lse": waiting for words of the other ranks
  std::int64_t ranks = 0, reps = 0;
  std::vector<double> seconds;
};

struct MemoryRecord {                                ///< bytes, by rank
  std::vector<std::string> kinds;                    ///< "weights", "caches", "activations", "workspace", "total"
  std::vector<std::int64_t> planned, measured_peak;  ///< [kind][rank]
  std::vector<std::int64_t> process_peak;            ///< [rank], growth of the resident set at its peak
};

/// kind = "kernels": implementations of one branch on one shape, measured in alternation, and the error of each against
/// attention in float64 over all of its outputs.
struct KernelRecord {
  std::vector<std::string>
      implementations;  ///< "fused", "sdpa" (gather, then attention), "sdpa_packed" (K and V packed before), ...
  std::int64_t ranks = 0, reps = 0;
  std::vector<double> seconds;                    ///< [implementation][rank][rep], of one execution
  std::vector<double> mean_abs_err, max_abs_err;  ///< [implementation]
  std::vector<double> mean_abs_err_se;            ///< [implementation], standard error of the mean over query rows
  std::vector<std::string> variants;              ///< [implementation], the backend's kernel; empty in files before 1.3
};

/// What may have disturbed each mode while it was measured, by [mode][rank]. docs/METRICS.md, "Noise".
struct NoiseRecord {
  std::vector<std::string> modes;  ///< those of the time table; kind = "kernels": one, "kernels"
  std::int64_t ranks = 0;
  std::vector<double> seconds;                                         ///< of its passes
  std::vector<std::int64_t> voluntary_switches, involuntary_switches;  ///< context switches
  std::vector<std::int64_t> minor_faults, major_faults;                ///< page faults
  std::vector<double> steal;                   ///< s, taken by other machines or the CPU quota, mean over cores
  std::vector<double> sm_clock_mhz;            ///< mean; 0: unknown
  std::vector<std::int64_t> throttle_reasons;  ///< at the mode's end, NVML's bits; -1: unknown
  std::vector<std::int64_t> throttled_passes;  ///< at a lowered clock, which were measured again; empty before 1.6
  std::vector<double> cv, outlier_share;       ///< of the rank's steps; NaN below two samples
  std::vector<double> sm_clock_max_mhz;        ///< [rank]; 0: unknown
  std::vector<std::int64_t> cache_bytes;       ///< [rank], last-level cache of the device; 0: unknown
};

/// A ragged batch (docs/METRICS.md, "Ragged batches").
struct BatchRecord {
  std::vector<std::int64_t> lengths;                ///< [sequence] tokens before the first step; empty: not ragged
  std::vector<std::int64_t> reads, reads_expected;  ///< [branch][sequence] at the last step, by all ranks
  double length_imbalance = 0;                      ///< the longest length over the mean
  double schedule_imbalance = -1;                   ///< most work of a CTA over the mean; < 0: the backend has none
};

/// Paged caches (docs/METRICS.md, "Paged caches"): a layer's, by [cache][rank].
struct PageRecord {
  std::vector<std::string> caches;  ///< "sel", "cmp"; empty: not paged
  std::int64_t ranks = 0;
  std::vector<std::int64_t> rows;     ///< of a page
  std::vector<std::int64_t> pages;    ///< in memory
  std::vector<std::int64_t> entries;  ///< of the page table that name a page: pages if none were shared
  std::vector<std::int64_t> shared;   ///< first entries of every sequence that name the same pages
  std::vector<std::int64_t> bytes;    ///< of the pages, K and V
};

/// What FP8 caches change in the recorded steps, against unquantised caches (docs/METRICS.md, "FP8 caches"); < 0: not
/// known.
struct QuantisationRecord {
  double selection_agreement = -1;      ///< share of the blocks that ranking chose on unquantised caches
  double importance_lost = -1;          ///< share of their importance that the blocks chosen instead lack
  double o_change = -1, y_change = -1;  ///< root mean square of the difference over that of the unquantised value
};

/// By branch: the implementation that ran, why it was chosen, and the backend's kernels that it ran: "tiled, rows".
struct RouteRecord {
  std::array<std::string, branches> routes, reasons, kernels;
};

struct PointRecord {
  std::int64_t index = 0;
  std::vector<Parameter> parameters;
  std::string fingerprint;  ///< hash of what decides the result: parameters, sharding, backend, input
  bool valid = true;
  std::string reason;       ///< why the point is not valid
  std::string stop_reason;  ///< "steps", "min_time", "min_interval", "interval_time" (or "interrupted")
  std::int64_t heads = 1, kv = 1, first_position = 0, warmup_reps = 0;
  TimeTable time;
  PhaseRecord phases;
  ReadTable reads;
  std::vector<std::int64_t> bytes;        ///< modelled bytes moved a step [stage][rank]
  std::vector<std::int64_t> tokens_kept;  ///< [step] query tokens kept, of all sequences; empty: one of each
  double copy_bandwidth = 0;              ///< bytes/s read + written, measured on the slowest rank
  MemoryRecord memory;
  std::array<std::string, branches> routes, route_reasons;  ///< the implementation that ran, and why it was chosen
  std::array<std::string, branches> route_kernels;          ///< the backend's kernels that it ran: "tiled, rows"
  std::string exchange;  ///< transport of small exchanges: "MPI", "NCCL", "peer memory"; "": one rank
  std::vector<std::string>
      fallbacks;              ///< "sel: fused -> sdpa: reason (12 calls)", "prefill sel: ..." in a decode point
  double max_abs_err = -1;    ///< against float64 at sampled rows; < 0: not checked
  double blocks_shared = -1;  ///< share of the selected blocks that neighbouring queries have in common; < 0: not known
  std::vector<TensorRecord> tensors;
  void fail(const std::string& why) {  ///< keeps the first reason; "" is no failure
    if (why.empty()) return;
    valid = false;
    if (reason.empty()) reason = why;
  }
  NoiseRecord noise;
  std::vector<std::string> noisy;                     ///< why the point is NOISY, a line each; empty: it is not
  std::map<std::string, std::vector<double>> needle;  ///< kind = "needle": depth, position, block, found, abs_err
  KernelRecord kernels;                               ///< kind = "kernels"
  BatchRecord batch;
  PageRecord pages;
  QuantisationRecord quantisation;  ///< decode with FP8 caches
  RouteRecord chunk;                ///< of the chunk, kind = "mixed"; the other routes are of its decode rows
};

struct RankSystem {
  std::string host, cpu, gpu, uuid, driver, cuda, nccl, mpi;
  double clock_mhz_before = 0, clock_mhz_after = 0;
  std::int64_t ecc_before = -1, ecc_after = -1;
  std::string environment;  ///< variables that affect times: "OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive"
  std::int64_t threads = 0, cores = 0, sharers = 0;  ///< host threads; cores they may use; ranks on these cores
};

struct RunRecord {
  std::string run_uuid, start, end, argv, input_toml, input_sha256, git_commit, compiler, backend, status;
  std::string config;                  ///< the effective input: every key, with --set; TOML
  std::string input_file_sha256;       ///< of the content of [input] file; empty without one
  std::string input_selection_sha256;  ///< the same of [input] selection
  std::int64_t resumed = 0;            ///< how often the run was resumed
  std::string program = "nsa";         ///< that ran the points: "nsa", "torch 2.11.0, cuDNN 9.13.0"
  std::vector<RankSystem> system;      ///< by rank
};

}  // namespace nsa
