#include "nsa/experiment/experiment.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>

#include "comm/process_id.hpp"
#include "kernels/diagnostics/out_of_memory.hpp"
#include "nsa/config/parts.hpp"
#include "nsa/experiment/resume.hpp"
#include "nsa/experiment/sha256.hpp"
#include "nsa/forward/decode.hpp"
#include "nsa/forward/prefill.hpp"
#include "nsa/model/traffic.hpp"
#include "nsa/report/noise.hpp"
#include "nsa/results/files.hpp"
#include "nsa/routing/router.hpp"
#include "nsa/tasks/kernel_bench.hpp"
#include "nsa/tasks/measure.hpp"
#include "nsa/tasks/needle_task.hpp"
#include "nsa/tasks/task.hpp"

namespace nsa {

namespace {

std::string utc_now() {
  char text[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) return line.substr(std::min(line.size(), line.find(':') + 2));
  return "unknown";
}

// A line of /proc/self/status in bytes; 0 where there is none.
std::int64_t status_bytes(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  return 0;
}

// The input file may be large: rank 0 reads it, once. A file that cannot be read is an error where it is used.
std::string hash_of(const std::string& path, const ControlComm& world) {
  std::ifstream file;
  if (world.rank() == 0 && why_no_file(path).empty()) file.open(path, std::ios::binary);
  return file.is_open() ? sha256(file) : "";
}

/// Ranks that share the memory of this rank's device.
std::int64_t sharers(const Session& session) {
  return session.backend.kind == BackendKind::host ? session.world.local_size() : 1;
}

/// Ranks of one host share one memory, and Linux kills a process instead of refusing an allocation: this checks first
/// whether the point fits on all ranks.
void check_memory(const Session& session, const MemoryAccount& planned) {
  const DeviceInfo info = session.backend.device->info();
  const std::int64_t ranks = sharers(session), needed = static_cast<std::int64_t>(planned.total_peak);
  const auto megabytes = [](std::int64_t bytes) { return std::to_string(bytes / 1000000) + " MB"; };
  const std::string problem = "the point needs " + megabytes(needed) + " a rank (";
  agreed(session.world, [&] {
    if (info.memory_free > 0 && needed > info.memory_free / ranks)
      throw UserError(problem + megabytes(info.memory_free) + " are free for " + std::to_string(ranks) +
                          " ranks here); use more hosts or a smaller context or batch",
                      ExitCode::device);
    if (info.process_free >= 0 && needed > info.process_free)
      throw UserError(problem + megabytes(info.process_free) + " are left to this process); " + memory_advice(),
                      ExitCode::device);
  });
}

/// The numbers of a GPU that failed or counted new memory errors cannot be trusted: the point is not kept. The
/// synchronisation also reports the pending error of a kernel.
void check_device(const Session& session, std::int64_t errors_before) {
  agreed(session.world, [&] {
    session.backend.device->synchronize(nullptr);
    const DeviceInfo info = session.backend.device->info();
    const std::int64_t errors = info.ecc_errors - errors_before;
    if (errors_before >= 0 && errors > 0)  // below 0: the device does not count them
      throw UserError("rank " + std::to_string(session.world.rank()) + " (" + host_name() + ", " + info.name + " " +
                          info.uuid + ") has " + std::to_string(errors) +
                          " new uncorrected memory errors (ECC); take the device out of service and run again",
                      ExitCode::device);
  });
}

MemoryRecord gather_memory(const Session& session, const MemoryAccount& planned, const MemoryAccount& used,
                           std::int64_t process) {
  MemoryRecord record;
  std::vector<std::int64_t> own;
  for (std::size_t kind = 0; kind < memory_kind_names.size(); ++kind) {
    record.kinds.push_back(memory_kind_names[kind]);
    own.push_back(static_cast<std::int64_t>(planned.peak[kind]));
  }
  record.kinds.push_back("total");
  own.push_back(static_cast<std::int64_t>(planned.total_peak));
  for (const std::size_t bytes : used.peak) own.push_back(static_cast<std::int64_t>(bytes));
  own.push_back(static_cast<std::int64_t>(used.total_peak));
  own.push_back(process);
  const std::vector<std::int64_t> all = session.world.gather(own);
  const std::int64_t kinds = std::ssize(record.kinds), width = std::ssize(own), ranks = std::ssize(all) / width;
  for (std::int64_t i = 0; i < width; ++i)
    for (std::int64_t r = 0; r < ranks; ++r)
      (i < kinds       ? record.planned
       : i < 2 * kinds ? record.measured_peak
                       : record.process_peak)
          .push_back(all[r * width + i]);
  return record;
}

/// Whether earlier files lack the key and it has its default: it is then no part of a fingerprint, so that those of
/// such files hold.
bool is_later_default(const std::string& name, const decltype(Parameter::second)& value) {
  for (const char* later :
       {"run.min_interval",    "run.interval_time", "run.steps_per_graph", "run.overlap",      "run.throttle_threshold",
        "run.recovery_delay",  "run.prefix",        "run.prefill_chunk",   "output.selection", "batch.context",
        "batch.distribution",  "batch.min",         "batch.max",           "batch.sigma",      "batch.exponent",
        "batch.seed",          "batch.file",        "cache.layout",        "cache.page",       "cache.order",
        "cache.shared_prefix", "run.query_tokens",  "run.accept",          "run.copy_bytes",   "model.kv_precision",
        "model.cmp_precision"}) {
    if (name != later) continue;
    const std::vector<Parameter> defaults = parameters(Config(), Point());
    return std::ranges::count(defaults, Parameter(name, value)) == 1;
  }
  return false;
}

}  // namespace

Session open_session(const Config& config, const ControlComm& world, std::function<bool()> asked_to_stop) {
  BackendKind kind = config.run.backend == BackendChoice::cuda ? BackendKind::cuda : BackendKind::host;
  if (config.run.backend == BackendChoice::automatic && cuda_built()) {
    bool here = true;
    try {
      open_backend(BackendKind::cuda, world.local_rank());
    } catch (const UserError&) {
      here = false;
    }
    if (world.max(std::int64_t{!here}) == 0) kind = BackendKind::cuda;
  }
  Backend backend{};
  agreed(world, [&] { backend = open_backend(kind, world.local_rank()); });
  backend.capability = static_cast<int>(-world.max(-std::int64_t{backend.capability}));  // all ranks choose alike
  Session session{world,
                  backend,
                  std::make_shared<ProcessGrid>(backend, world),
                  std::make_shared<StopPoll>(world, std::move(asked_to_stop)),
                  hash_of(config.input_file, world),
                  hash_of(config.input_selection, world)};
  session.copy_bytes = copy_bytes_of(config.run.copy_bytes, backend.device->info().memory_free, sharers(session));
  return session;
}

std::string fingerprint(const Session& session, const Config& config, const Point& point) {
  std::string text;
  for (const auto& [name, value] : parameters(config, point)) {
    if (!decides_point(name) || is_later_default(name, value)) continue;
    text += name + "=" +
            std::visit(
                [](const auto& v) {
                  if constexpr (std::is_same_v<std::decay_t<decltype(v)>, std::string>)
                    return v;
                  else
                    return std::to_string(v);
                },
                value) +
            "\n";
  }
  for (const std::int64_t length : point.lengths) text += "length=" + std::to_string(length) + "\n";
  const RouteEnvironment routes = route_environment();
  for (const Branch branch : kv_column_order)
    if (!routes.implementation[branch].empty())
      text += branch_names[branch] + ("=" + routes.implementation[branch] + "\n");
  const Partition partition = make_partition(config, point, session.world.size(), session.world.rank());
  text += "heads=" + std::to_string(partition.heads) + "\nkv=" + std::to_string(partition.kv) + "\n";
  text += "device=" + session.backend.device->info().name + "\n";
  text += "input_file=" + session.input_hash + "\n";
  if (replays(config)) text += "input_selection=" + session.selection_hash + "\n";
  return sha256(text);
}

namespace {

void plan_exchange_memory(ModelShard& shard) {
  for (const int group : {shard.partition.heads, shard.partition.kv})
    if (group > 1) shard.account.add(MemoryKind::workspace, shard.kernels().max_exchange_memory);
}

// The caches of both parts, what fills them and is freed, and the buffers of both.
MemoryAccount planned_mixed(const Backend& backend, const Config& config, const Partition& partition,
                            const Point& point) {
  const Part rows = decode_rows_of(config, point), chunk = prefill_chunk_of(config, point);
  const bool prefills = config.run.fill == CacheFill::prefill;
  ModelShard shard(Backend{backend.kind, backend.kernels, &dry_device(), backend.capability}, rows.config, rows.point,
                   partition);
  const int ranks = partition.heads * partition.kv, rank = partition.head_shard * partition.kv + partition.kv_rank;
  ModelShard beside(shard, chunk.config, chunk.point, make_partition(chunk.config, chunk.point, ranks, rank));
  plan_exchange_memory(shard);
  if (prefills) PrefillRunner(shard, {0, point.longest()}, false);
  if (prefills && config.run.prefix > 0) PrefillRunner(beside, {0, config.run.prefix}, false);
  DecodeRunner decode(shard, nullptr, config.records());
  PrefillRunner prefill(beside, prefill_range(chunk.config, chunk.point), config.records());
  return shard.account;
}

}  // namespace

MemoryAccount planned_memory(const Backend& backend, const Config& config, const Partition& partition,
                             const Point& point) {
  const KernelTable& kernels = *backend.kernels;
  if (config.kind == TaskKind::kernels) {
    MemoryAccount account;
    KernelBench(Allocator{dry_device(), account}, kernels, config, point);
    return account;
  }
  if (config.kind == TaskKind::mixed) return planned_mixed(backend, config, partition, point);
  const bool needle = config.kind == TaskKind::needle;
  const Config planned = needle ? needle_config(config) : config;
  const Point at = needle ? needle_point(point) : point;
  const bool record = needle || planned.records();
  ModelShard e(Backend{backend.kind, &kernels, &dry_device(), backend.capability}, planned, at, partition);
  plan_exchange_memory(e);
  if (planned.kind == TaskKind::prefill) {
    const PrefillRange range = prefill_range(planned, at);
    if (range.first > 0 && planned.run.fill == CacheFill::prefill) {
      PrefillRunner prefix(e, {0, range.first}, false);  // freed before the measured prefill allocates its buffers
    }
    PrefillRunner prefill(e, range, record);
  } else if (needle) {
    PrefillRunner prefill(e, {0, at.context}, false);
    DecodeRunner decode(e, nullptr, true);
  } else {
    if (planned.run.fill == CacheFill::prefill) {
      PrefillRunner prefill(e, {0, at.longest()}, false);  // freed before decode allocates its buffers
    }
    DecodeRunner decode(e, nullptr, record);
  }
  return e.account;
}

namespace {

// Modelled bytes of this rank, by stage.
std::vector<std::int64_t> bytes_of_parts(const Session& session, const Config& config, const Point& point) {
  std::vector<std::int64_t> sum(stage_count, 0);
  for (const Part& part : parts_of(config, point)) {
    const Partition share = make_partition(part.config, part.point, session.world.size(), session.world.rank());
    const std::vector<std::int64_t> bytes =
        modelled_bytes(part.config, stored_by(*session.backend.kernels, part.config, part.point, share), part.point);
    for (int stage = 0; stage < stage_count; ++stage) sum[stage] += bytes[stage];
  }
  return sum;
}

}  // namespace

PointRecord run_point(const Session& session, const Config& config, const Point& point, std::int64_t index,
                      const Progress& progress) {
  PointRecord record;
  record.index = index;
  record.parameters = parameters(config, point);
  const Partition partition = stored_by(*session.backend.kernels, config, point,
                                        make_partition(config, point, session.world.size(), session.world.rank()));
  record.heads = partition.heads;
  record.kv = partition.kv;
  record.fingerprint = fingerprint(session, config, point);

  const std::int64_t errors_before = session.backend.device->info().ecc_errors;
  MemoryAccount planned;
  agreed(session.world, [&] { planned = planned_memory(session.backend, config, partition, point); });
  check_memory(session, planned);
  record.copy_bandwidth = copy_bandwidth(session);
  std::ofstream("/proc/self/clear_refs") << "5";  // resets the peak of the resident set, where Linux allows it
  const std::int64_t resident = status_bytes("VmRSS");
  MemoryAccount used;
  if (config.kind == TaskKind::needle) {
    used = run_needles(session, config, point, record, progress);
  } else if (config.kind == TaskKind::kernels) {
    used = run_kernels(session, config, point, record, progress);
  } else {
    std::unique_ptr<TensorSource> source;
    agreed(session.world, [&] { source = std::make_unique<TensorSource>(config, config.input_file); });
    const auto run = config.kind == TaskKind::decode    ? run_decode
                     : config.kind == TaskKind::prefill ? run_prefill
                                                        : run_mixed;
    used = run(session, config, point, *source, record, progress);
  }
  check_device(session, errors_before);
  record.memory = gather_memory(session, planned, used, status_bytes("VmHWM") - resident);
  if (session.strict && !record.fallbacks.empty()) record.fail("--strict and a fallback: " + record.fallbacks.front());
  const std::vector<std::int64_t> bytes = config.kind == TaskKind::kernels
                                              ? std::vector<std::int64_t>{}
                                              : session.world.gather(bytes_of_parts(session, config, point));
  const std::int64_t ranks = session.world.size();
  for (int stage = 0; stage < stage_count && !bytes.empty(); ++stage)
    for (std::int64_t r = 0; r < ranks; ++r) record.bytes.push_back(bytes[r * stage_count + stage]);
  if (session.world.rank() == 0) judge_noise(record);
  record.reason = session.world.broadcast(record.reason);
  record.valid = session.world.max(std::int64_t{!record.valid}) == 0;
  return record;
}

RunRecord describe_run(const Session& session, const Config& config, const std::string& input_toml,
                       const std::string& argv) {
  RunRecord run;
  run.run_uuid = first_line("/proc/sys/kernel/random/uuid");
  run.start = utc_now();
  run.argv = argv;
  run.input_toml = input_toml;
  run.input_sha256 = sha256(input_toml);
  run.input_file_sha256 = session.input_hash;
  run.input_selection_sha256 = session.selection_hash;
  run.config = to_toml(config);
  run.backend = session.backend.kind == BackendKind::cuda ? "cuda" : "host";
  run.status = "running";
  const DeviceInfo info = session.backend.device->info();
  const bool gpu = session.backend.kind == BackendKind::cuda;
  const auto gather = [&](const std::string& text, std::string RankSystem::*field) {
    const std::vector<std::string> all = session.world.gather(text);
    run.system.resize(all.size());
    for (std::size_t r = 0; r < all.size(); ++r) run.system[r].*field = all[r];
  };
  gather(host_name(), &RankSystem::host);
  gather(cpu_name(), &RankSystem::cpu);
  gather(gpu ? info.name : "", &RankSystem::gpu);
  gather(info.uuid, &RankSystem::uuid);
  gather(info.driver, &RankSystem::driver);
  gather(info.runtime, &RankSystem::cuda);
  gather(gpu ? Communicator::library_version() : "", &RankSystem::nccl);
  gather(MpiSession::library_version(), &RankSystem::mpi);
  const std::vector<double> clocks =
      session.world.gather(std::vector<double>{info.clock_mhz, static_cast<double>(info.ecc_errors)});
  for (std::size_t r = 0; r < run.system.size(); ++r) {
    run.system[r].clock_mhz_before = clocks[2 * r];
    run.system[r].ecc_before = static_cast<std::int64_t>(clocks[2 * r + 1]);
  }
  return run;
}

void close_run(const Session& session, RunRecord& run) {
  run.end = std::max(utc_now(), run.start);  // the clock of the day may have been set back
  const DeviceInfo info = session.backend.device->info();
  const std::vector<double> after =
      session.world.gather(std::vector<double>{info.clock_mhz, static_cast<double>(info.ecc_errors)});
  for (std::size_t r = 0; r < run.system.size(); ++r) {
    run.system[r].clock_mhz_after = after[2 * r];
    run.system[r].ecc_after = static_cast<std::int64_t>(after[2 * r + 1]);
  }
}

}  // namespace nsa
