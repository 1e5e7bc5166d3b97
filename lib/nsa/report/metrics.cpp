#include "nsa/report/metrics.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace nsa {
namespace {

constexpr double not_measured = std::numeric_limits<double>::quiet_NaN();

/// The samples of one mode: at(stage, rank, rep), NaN where not timed.
struct ModeTable {
  const TimeTable& table;
  std::int64_t mode;
  double at(Stage stage, std::int64_t rank, std::int64_t rep) const {
    const std::int64_t row = (mode * stage_count + static_cast<int>(stage)) * table.ranks + rank;
    return table.seconds[static_cast<std::size_t>(row * table.reps + rep)];
  }
};

/// -1: the mode was not run.
std::int64_t find_mode(const TimeTable& table, std::string_view mode) {
  const auto at = std::find(table.modes.begin(), table.modes.end(), mode);
  return at == table.modes.end() ? -1 : at - table.modes.begin();
}

std::int64_t sum_at_last_step(const ReadTable& reads, const std::vector<std::int64_t>& values) {
  std::int64_t sum = 0;
  for (std::int64_t row = 1; row <= branches * reads.ranks; ++row)
    sum += values[static_cast<std::size_t>(row * reads.steps - 1)];
  return sum;
}

template <class T>
const T* find_parameter(const PointRecord& point, std::string_view key) {
  for (const Parameter& parameter : point.parameters) {
    if (parameter.first == key) return std::get_if<T>(&parameter.second);
  }
  return nullptr;
}

/// Whether mode total ran as this kernel: "step", fused; "sharded_step", sharded in one launch; "shard", in several.
bool ran_as(const PointRecord& point, std::string_view kernel) {
  return text_parameter(point, "task.kind") == "decode" &&
         fmt::format(", {}, ", point.route_kernels[cmp]).find(fmt::format(", {}, ", kernel)) != std::string::npos;
}

/// Whether a fused step scores blocks by tiles of 32 tokens (lib/kernels/cuda/attention/block_sums.cuh).
bool scores_by_tile(const PointRecord& point) {
  const auto value = [&](const char* key) { return integer_parameter(point, key, 0); };
  const std::int64_t d = value("nsa.d"), l_sel = value("nsa.l_sel");
  return d > 0 && value("nsa.l") == 2 * d && l_sel == 4 * d && value("nsa.n_sel") <= 16 &&
         value("model.n_heads") <= 16 * value("model.n_kv_groups") &&
         integer_parameter(point, "parallel.kv_chunk_blocks", 16) * (l_sel / d) % 32 == 0;
}

double modelled(const PointRecord& point, Stage stage, std::size_t rank) {
  return static_cast<double>(point.bytes[static_cast<std::size_t>(stage) * (point.bytes.size() / stage_count) + rank]);
}

/// Modelled bytes of a step that runs stage by stage, without comm.
double staged_step_bytes(const PointRecord& point, std::size_t rank) {
  return modelled(point, Stage::step, rank) - modelled(point, Stage::comm, rank);
}

/// Bytes of raw scores that do not go through memory where that part of them is handed over as other numbers.
double scores_kept(const PointRecord& point, std::size_t rank, double handed_over) {
  return scores_by_tile(point) ? 2 * modelled(point, Stage::rank, rank) * (1 - handed_over) : 0;
}

}  // namespace

std::vector<double> slowest_samples(const PointRecord& point, std::string_view mode, Stage stage) {
  const TimeTable& table = point.time;
  const ModeTable samples{table, find_mode(table, mode)};
  std::vector<double> slowest;
  if (samples.mode < 0) return slowest;
  for (std::int64_t rep = point.warmup_reps; rep < table.reps; ++rep) {
    double maximum = not_measured;
    for (std::int64_t rank = 0; rank < table.ranks; ++rank) maximum = std::fmax(maximum, samples.at(stage, rank, rep));
    if (!std::isnan(maximum)) slowest.push_back(maximum);
  }
  return slowest;
}

std::vector<double> rank_samples(const PointRecord& point, std::string_view mode, Stage stage, std::int64_t rank) {
  const ModeTable samples{point.time, find_mode(point.time, mode)};
  std::vector<double> own;
  for (std::int64_t rep = point.warmup_reps; samples.mode >= 0 && rep < point.time.reps; ++rep)
    if (const double seconds = samples.at(stage, rank, rep); !std::isnan(seconds)) own.push_back(seconds);
  return own;
}

std::vector<double> kernel_samples(const PointRecord& point, std::string_view implementation) {
  const KernelRecord& k = point.kernels;
  const auto at = std::find(k.implementations.begin(), k.implementations.end(), implementation);
  std::vector<double> slowest;
  if (at == k.implementations.end()) return slowest;
  const std::int64_t first = (at - k.implementations.begin()) * k.ranks;
  for (std::int64_t rep = point.warmup_reps; rep < k.reps; ++rep) {
    double maximum = not_measured;
    for (std::int64_t rank = 0; rank < k.ranks; ++rank)
      maximum = std::fmax(maximum, k.seconds[static_cast<std::size_t>((first + rank) * k.reps + rep)]);
    slowest.push_back(maximum);
  }
  return slowest;
}

Summary kernel_ratio(const PointRecord& point, std::string_view of, std::string_view to, double alpha) {
  std::vector<double> ratio = kernel_samples(point, of);
  const std::vector<double> below = kernel_samples(point, to);
  ratio.resize(std::min(ratio.size(), below.size()));
  for (std::size_t i = 0; i < ratio.size(); ++i) ratio[i] = below[i] > 0 ? ratio[i] / below[i] : not_measured;
  return summarise(std::move(ratio), alpha);
}

std::string kernel_variant(const PointRecord& point, std::string_view implementation) {
  const KernelRecord& k = point.kernels;
  const auto at = std::find(k.implementations.begin(), k.implementations.end(), implementation);
  const std::size_t i = static_cast<std::size_t>(at - k.implementations.begin());
  return i < k.variants.size() ? k.variants[i] : "";
}

const char* fastest_packed(const PointRecord& point) {
  const double sdpa = summarise(kernel_samples(point, "sdpa_packed")).median;
  const double flash = summarise(kernel_samples(point, "flash_packed")).median;
  return std::isnan(sdpa) || flash < sdpa ? "flash_packed" : "sdpa_packed";
}

Summary stage_time(const PointRecord& point, std::string_view mode, Stage stage) {
  return summarise(slowest_samples(point, mode, stage));
}

Summary step_time(const PointRecord& point) {
  const bool has_total = find_mode(point.time, "total") >= 0;
  return stage_time(point, has_total ? "total" : "branches", Stage::step);
}

double launch_overhead(const PointRecord& point) {
  return stage_time(point, "total", Stage::step).median - stage_time(point, "device", Stage::step).median;
}

double launch_gap(const PointRecord& point) {
  return stage_time(point, "queued", Stage::step).median - stage_time(point, "device", Stage::step).median;
}

double selection_share(const PointRecord& point) {
  double selection = 0, all = 0;
  for (int i = 0; i < static_cast<int>(Stage::step); ++i) {
    const Stage stage = static_cast<Stage>(i);
    const double median = stage_time(point, "branches", stage).median;
    if (std::isnan(median)) continue;
    all += median;
    if (stage == Stage::rank || stage == Stage::attend_sel) selection += median;
  }
  return all > 0 ? selection / all : not_measured;
}

std::vector<double> rank_work(const PointRecord& point) {
  const TimeTable& table = point.time;
  const std::int64_t stages = find_mode(table, "branches"), whole = find_mode(table, "total");
  std::vector<double> work;
  if (stages < 0 && whole < 0) return work;
  for (std::int64_t rank = 0; rank < table.ranks; ++rank) {
    std::vector<double> reps;
    for (std::int64_t rep = point.warmup_reps; rep < table.reps; ++rep) {
      if (stages < 0) {
        reps.push_back(ModeTable{table, whole}.at(Stage::step, rank, rep));
        continue;
      }
      double sum = not_measured;
      for (int i = 0; i < static_cast<int>(Stage::comm); ++i) {
        const double seconds = ModeTable{table, stages}.at(static_cast<Stage>(i), rank, rep);
        if (!std::isnan(seconds)) sum = (std::isnan(sum) ? 0 : sum) + seconds;
      }
      reps.push_back(sum);
    }
    work.push_back(summarise(reps).median);
  }
  return work;
}

double fused_step_bytes(const PointRecord& point, std::size_t rank) {
  const auto value = [&](const char* key) { return integer_parameter(point, key, 0); };
  const std::int64_t tokens = value("model.layers") * value("run.batch"),
                     rows = tokens * value("model.n_heads") / point.heads;
  const std::int64_t storage = text_parameter(point, "model.precision") == "fp32" ? 4 : 2;
  const double q = static_cast<double>(rows * value("model.d_k") * storage),
               branch = static_cast<double>(rows * value("model.d_v") * 4), kv = static_cast<double>(point.kv);
  const double o = static_cast<double>(rows * value("model.d_v") * storage),
               y = static_cast<double>(tokens * value("model.dim") * 4),
               projected = std::max(0.0, modelled(point, Stage::output, rank) - y);
  return staged_step_bytes(point, rank) - scores_kept(point, rank, 9.0 / 32) - 2 * q - 3 * (1 + kv) * branch -
         (o + projected) * (1 - 1 / kv);
}

double sharded_step_bytes(const PointRecord& point, std::size_t rank) {
  return staged_step_bytes(point, rank) - scores_kept(point, rank, 10.0 / 32);
}

double step_bytes(const PointRecord& point, std::size_t rank) {
  if (find_mode(point.time, "total") < 0) return staged_step_bytes(point, rank);
  if (ran_as(point, "step") || ran_as(point, "sharded_step")) return fused_step_bytes(point, rank);
  return ran_as(point, "shard") || ran_as(point, "tokens") ? sharded_step_bytes(point, rank)
                                                           : staged_step_bytes(point, rank);
}

double busiest_bytes(const PointRecord& point) {
  double maximum = 0;
  for (std::size_t rank = 0; rank < point.bytes.size() / stage_count; ++rank)
    maximum = std::max(maximum, step_bytes(point, rank));
  return maximum;
}

double copy_rate_fraction(const PointRecord& point) {
  if (point.copy_bandwidth <= 0 || point.bytes.empty()) return not_measured;
  const double seconds = step_time(point).median;
  return seconds > 0 ? busiest_bytes(point) / seconds / point.copy_bandwidth : not_measured;
}

ReadCounts last_reads(const PointRecord& point) {
  const ReadTable& reads = point.reads;
  if (reads.steps == 0 || reads.counted.empty()) return {not_measured, not_measured, not_measured};
  // The sequences of a mixed step read differently much: their reads stay together.
  const bool mixed = text_parameter(point, "task.kind") == "mixed";
  const double divisor = static_cast<double>((mixed ? 1 : integer_parameter(point, "run.batch", 1)) *
                                             integer_parameter(point, "model.n_kv_groups", 1) *
                                             integer_parameter(point, "model.layers", 1));
  return {static_cast<double>(sum_at_last_step(reads, reads.counted)) / divisor,
          static_cast<double>(sum_at_last_step(reads, reads.expected)) / divisor,
          reads.nsa_vibe.empty() || text_parameter(point, "task.kind") == "prefill"
              ? not_measured
              : static_cast<double>(reads.nsa_vibe.back())};
}

std::int64_t integer_parameter(const PointRecord& point, std::string_view key, std::int64_t fallback) {
  const auto* value = find_parameter<std::int64_t>(point, key);
  return value ? *value : fallback;
}

double real_parameter(const PointRecord& point, std::string_view key, double fallback) {
  const auto* value = find_parameter<double>(point, key);
  return value ? *value : fallback;
}

std::string text_parameter(const PointRecord& point, std::string_view key, const std::string& fallback) {
  const auto* value = find_parameter<std::string>(point, key);
  return value ? *value : fallback;
}

std::string caches_text(const PointRecord& point) {
  const bool kv = text_parameter(point, "model.kv_precision", "same") != "same",
             cmp = text_parameter(point, "model.cmp_precision", "same") != "same";
  return kv && cmp ? "fp8" : kv ? "fp8 kv" : cmp ? "fp8 cmp" : "same";
}

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  int unit = 0;
  for (; bytes >= 999.5 && unit < 5; ++unit) bytes /= 1000;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 || bytes >= 99.95 ? 0 : bytes >= 9.995 ? 1 : 2, units[unit]);
}

std::string time_text(double seconds) {
  if (std::isnan(seconds)) return "-";
  const auto [scale, unit] = seconds < 0.99995e-3 ? std::pair(1e6, "us")
                             : seconds < 0.99995  ? std::pair(1e3, "ms")
                                                  : std::pair(1.0, "s");
  const double value = seconds * scale;
  const int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return fmt::format("{:.{}f} {}", value, decimals, unit);
}

}  // namespace nsa
