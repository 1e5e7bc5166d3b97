#pragma once
// Names in the result file: one list for writer and reader. docs/SCHEMA.md says what they mean.

#include <cstdint>
#include <string>

#include "nsa/results/records.hpp"

namespace nsa {

/// A reader refuses another major version. A new minor version only adds names.
constexpr int schema_major = 1;
constexpr const char* schema_version = "1.9";

/// A field of a record under its name in the file.
template <class Record, class T>
struct Named {
  const char* name;
  T Record::*field;
  const char* units = "1";
  const char* long_name = "";
};

/// Attributes of "/", besides schema_version and status.
constexpr Named<RunRecord, std::string> run_attributes[] = {
    {"run_uuid", &RunRecord::run_uuid},
    {"start", &RunRecord::start},
    {"end", &RunRecord::end},
    {"argv", &RunRecord::argv},
    {"input_toml", &RunRecord::input_toml},
    {"input_sha256", &RunRecord::input_sha256},
    {"git_commit", &RunRecord::git_commit},
    {"compiler", &RunRecord::compiler},
    {"backend", &RunRecord::backend},
};

/// Added by schema 1.1: a file of 1.0 lacks them.
constexpr Named<RunRecord, std::string> run_attributes_1_1[] = {
    {"config", &RunRecord::config},
    {"input_file_sha256", &RunRecord::input_file_sha256},
};
constexpr Named<RunRecord, std::int64_t> run_integers_1_1[] = {
    {"resumed", &RunRecord::resumed},
};

/// Added by schema 1.5: a file without it is of nsa.
constexpr Named<RunRecord, std::string> run_attributes_1_5[] = {
    {"program", &RunRecord::program},
};

/// Added by schema 1.6: a file of an earlier one lacks it.
constexpr Named<RunRecord, std::string> run_attributes_1_6[] = {
    {"input_selection_sha256", &RunRecord::input_selection_sha256},
};

/// Datasets of /system over rank.
constexpr Named<RankSystem, std::string> system_texts[] = {
    {"host", &RankSystem::host, "1", "name of the host"},
    {"cpu", &RankSystem::cpu, "1", "processor"},
    {"gpu", &RankSystem::gpu, "1", "GPU, empty without one"},
    {"uuid", &RankSystem::uuid, "1", "UUID of the GPU"},
    {"driver", &RankSystem::driver, "1", "GPU driver"},
    {"cuda", &RankSystem::cuda, "1", "CUDA runtime"},
    {"nccl", &RankSystem::nccl, "1", "NCCL"},
    {"mpi", &RankSystem::mpi, "1", "MPI library"},
};
constexpr Named<RankSystem, double> system_clocks[] = {
    {"clock_mhz_before", &RankSystem::clock_mhz_before, "MHz", "clock before the first point, 0 if unknown"},
    {"clock_mhz_after", &RankSystem::clock_mhz_after, "MHz", "clock after the last point, 0 if unknown"},
};
constexpr Named<RankSystem, std::int64_t> system_counts[] = {
    {"ecc_before", &RankSystem::ecc_before, "1", "uncorrected memory errors before the first point, -1 if unknown"},
    {"ecc_after", &RankSystem::ecc_after, "1", "uncorrected memory errors after the last point, -1 if unknown"},
};

/// Added by schema 1.2: a file of 1.0 or 1.1 lacks them.
constexpr Named<RankSystem, std::string> system_texts_1_2[] = {
    {"environment", &RankSystem::environment, "1", "environment variables that change times"},
};
constexpr Named<RankSystem, std::int64_t> system_counts_1_2[] = {
    {"threads", &RankSystem::threads, "1", "threads of the host backend"},
    {"cores", &RankSystem::cores, "1", "cores the rank may use"},
    {"sharers", &RankSystem::sharers, "1", "ranks that may use the same cores, itself among them"},
};

/// Datasets of a point's group noise over mode and rank, since schema 1.5.
constexpr Named<NoiseRecord, std::vector<double>> noise_reals[] = {
    {"seconds", &NoiseRecord::seconds, "s", "duration of the passes"},
    {"steal", &NoiseRecord::steal, "s", "time taken by other machines or the CPU quota, mean over cores"},
    {"sm_clock", &NoiseRecord::sm_clock_mhz, "MHz", "mean clock of an SM, 0 if unknown"},
    {"cv", &NoiseRecord::cv, "1", "coefficient of variation of the steps"},
    {"outlier_share", &NoiseRecord::outlier_share, "1", "share of the time of the steps that outliers took"},
};
constexpr Named<NoiseRecord, std::vector<std::int64_t>> noise_counts[] = {
    {"voluntary_switches", &NoiseRecord::voluntary_switches, "1", "context switches of threads that waited"},
    {"involuntary_switches", &NoiseRecord::involuntary_switches, "1", "context switches of threads that lost the core"},
    {"minor_faults", &NoiseRecord::minor_faults, "1", "page faults without a read from the disk"},
    {"major_faults", &NoiseRecord::major_faults, "1", "page faults with a read from the disk"},
    {"throttle_reasons", &NoiseRecord::throttle_reasons, "1", "why the clock is lowered, bits of NVML, -1 if unknown"},
};

/// Added by schema 1.6.
constexpr Named<NoiseRecord, std::vector<std::int64_t>> noise_counts_1_6[] = {
    {"throttled_passes", &NoiseRecord::throttled_passes, "1", "passes at a lowered clock, which were measured again"},
};

/// Datasets of a point's group pages over cache and rank, since schema 1.7.
constexpr Named<PageRecord, std::vector<std::int64_t>> page_columns[] = {
    {"rows", &PageRecord::rows, "1", "rows of a page"},
    {"pages", &PageRecord::pages, "1", "pages in memory, of a layer"},
    {"entries", &PageRecord::entries, "1", "entries of the page table that name a page"},
    {"shared", &PageRecord::shared, "1", "first entries of every sequence that name the same pages"},
    {"bytes", &PageRecord::bytes, "B", "bytes of the pages, K and V of a layer"},
};

/// Attributes of a point of kind = "mixed", of its chunk, one name a branch. Added by schema 1.9.
constexpr Named<RouteRecord, std::array<std::string, branches>> chunk_texts[] = {
    {"chunk_routes", &RouteRecord::routes},
    {"chunk_route_reasons", &RouteRecord::reasons},
    {"chunk_route_kernels", &RouteRecord::kernels},
};

/// Attributes of a point, besides its parameters, validity, routes and fallbacks.
constexpr Named<PointRecord, std::string> point_texts[] = {
    {"fingerprint", &PointRecord::fingerprint},
    {"reason", &PointRecord::reason},
    {"stop_reason", &PointRecord::stop_reason},
};
constexpr Named<PointRecord, std::int64_t> point_integers[] = {
    {"heads", &PointRecord::heads},
    {"kv", &PointRecord::kv},
    {"first_position", &PointRecord::first_position},
    {"warmup_reps", &PointRecord::warmup_reps},
};
constexpr Named<PointRecord, double> point_reals[] = {
    {"copy_bandwidth", &PointRecord::copy_bandwidth},
    {"max_abs_err", &PointRecord::max_abs_err},
};

/// Added by schema 1.5: a file of an earlier one lacks it.
constexpr Named<PointRecord, double> point_reals_1_5[] = {
    {"blocks_shared", &PointRecord::blocks_shared},
};

/// Added by schema 1.8: a point without FP8 caches lacks them.
constexpr Named<QuantisationRecord, double> quantisation_reals[] = {
    {"selection_agreement", &QuantisationRecord::selection_agreement},
    {"importance_lost", &QuantisationRecord::importance_lost},
    {"o_change", &QuantisationRecord::o_change},
    {"y_change", &QuantisationRecord::y_change},
};

}  // namespace nsa
