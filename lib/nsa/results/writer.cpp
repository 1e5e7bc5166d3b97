// Writes the result file: docs/SCHEMA.md.
//
// A file under its final name is always complete. Every point is written to a copy in the same folder (the first point
// to a new file), which is flushed, closed, synced to disk and renamed over the file: a reader, or a run killed at any
// moment, sees the points before or the points after. HDF5 rewrites metadata in place, so nothing less than a copy is
// safe. The copy costs one write of the file. Where the file is large, points wait for each other: for as many as make
// the cost of each 20 ms, but not until a kill would lose more than ten times the work of sealing. A point with tensors
// does not wait.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <numeric>
#include <set>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/hdf5/h5.hpp"
#include "nsa/results/result_file.hpp"
#include "nsa/results/schema.hpp"
#include "nsa/results/temporary_file.hpp"

namespace nsa {
namespace {

/// `target`: the path with links followed.
void check_writable(const std::string& path, const std::string& target, std::size_t expected_bytes, bool resume) {
  const std::string folder = parent_of(target), problem = "cannot write " + path;
  constexpr const char* advice = "choose another --output";
  if (const PathStatus status = status_of(target);
      status.error != 0 && status.error != ENOENT && status.error != ENOTDIR)
    file_error(problem, std::strerror(status.error), advice);
  if (status_of(target).kind == PathStatus::folder) file_error(problem, "it is a folder", advice);
  if (status_of(target).kind == PathStatus::other) file_error(problem, "not a plain file", advice);
  if (!resume && (status_of(target).kind != PathStatus::missing || target != path))
    file_error(path + " exists", "results are never overwritten",
               "choose another --output, remove it, or go on with --resume");
  if (const std::string why = why_not_writable(folder); !why.empty())
    file_error(problem, why,
               status_of(folder).kind == PathStatus::missing ? "make the folder or choose another --output" : advice);
  struct statvfs disk {};
  if (statvfs(folder.c_str(), &disk) != 0) file_error(problem, folder + ": " + std::strerror(errno), advice);
  const double available = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
  const double needed = 2.0 * static_cast<double>(expected_bytes);  // the file and the copy that replaces it
  if (available < needed)
    file_error(
        problem,
        fmt::format("{:.1f} MB are needed while it is sealed, {:.1f} MB are free", needed / 1e6, available / 1e6),
        "make room, choose another --output or set output.tensors=false");
}

/// Checks that a file of this name can be created, with the reason that the system gives.
void check_creatable(const std::string& path, const std::string& temporary) {
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file < 0) file_error("cannot write " + path, std::strerror(errno), "choose another --output");
  close(file);
  unlink(temporary.c_str());
}

std::vector<std::int64_t> indices(std::int64_t n) {
  std::vector<std::int64_t> result(static_cast<std::size_t>(n));
  std::iota(result.begin(), result.end(), 0);
  return result;
}

template <class Record, class T, std::size_t n>
void write_attributes(const h5::Handle& at, const Record& record, const Named<Record, T> (&list)[n]) {
  for (const auto& entry : list) h5::write_attribute(at, entry.name, record.*entry.field);
}

template <class T, std::size_t n>
void write_system_columns(const h5::Handle& group, const RunRecord& run, const Named<RankSystem, T> (&list)[n]) {
  for (const auto& entry : list) {
    std::vector<T> values;
    for (const RankSystem& rank : run.system) values.push_back(rank.*entry.field);
    h5::write(group, entry.name, values, {"rank"}, {entry.units, entry.long_name});
  }
}

void write_run(const h5::Handle& file, const RunRecord& run, const std::string& status) {
  h5::write_attribute(file, "schema_version", schema_version);
  h5::write_attribute(file, "status", status);
  write_attributes(file, run, run_attributes);
  write_attributes(file, run, run_attributes_1_1);
  write_attributes(file, run, run_integers_1_1);
  write_attributes(file, run, run_attributes_1_5);
  write_attributes(file, run, run_attributes_1_6);
  if (h5::has(file, "system")) h5::remove(file, "system");
  const h5::Handle system = h5::create_group(file, "system");
  h5::write_scale(system, "rank", indices(static_cast<std::int64_t>(run.system.size())), {"1", "rank"});
  write_system_columns(system, run, system_texts);
  write_system_columns(system, run, system_clocks);
  write_system_columns(system, run, system_counts);
  write_system_columns(system, run, system_texts_1_2);
  write_system_columns(system, run, system_counts_1_2);
}

void write_dimensions(const h5::Handle& group, const PointRecord& p) {
  h5::write_scale(group, "rank", indices(p.heads * p.kv), {"1", "rank: head shard * kv + kv rank"});
  h5::write_scale<std::string>(group, "stage", {stage_names.begin(), stage_names.end()}, {"1", "stage of a step"});
  h5::write_scale<std::string>(group, "branch", {branch_names, branch_names + branches}, {"1", "branch of attention"});
  if (!p.time.seconds.empty()) {
    h5::write_scale(group, "mode", p.time.modes, {"1", "way of timing"});
    h5::write_scale(group, "rep", indices(p.time.reps), {"1", "repetition, warm-up first"});
  }
  // Modes that leave a branch out count no reads, but the formula's dataset needs the dimension.
  if (const std::int64_t steps = std::max(p.reads.steps, std::ssize(p.reads.nsa_vibe)); steps > 0)
    h5::write_scale(group, "step", indices(steps), {"1", "step"});
  if (!p.memory.kinds.empty()) h5::write_scale(group, "kind", p.memory.kinds, {"1", "what the memory holds"});
}

/// Writes one dataset for each table that the task has filled.
void write_columns(const h5::Handle& group, const PointRecord& p) {
  const auto column = [&](const char* name, const auto& values, const std::vector<std::string>& dimensions,
                          const h5::Text& text) {
    if (!values.empty()) h5::write(group, name, values, dimensions, text);
  };
  column("time", p.time.seconds, {"mode", "stage", "rank", "rep"}, {"s", "duration of a stage in one step"});
  column("reads", p.reads.counted, {"branch", "rank", "step"}, {"1", "tokens read, counted where they are loaded"});
  column("reads_expected", p.reads.expected, {"branch", "rank", "step"}, {"1", "tokens read, from the shape alone"});
  column("reads_nsa_vibe", p.reads.nsa_vibe, {"step"}, {"1", "tokens read, by the formula of nsa-vibe"});
  column("tokens_kept", p.tokens_kept, {"step"}, {"1", "query tokens that a step keeps, of all sequences"});
  column("bytes", p.bytes, {"stage", "rank"}, {"byte", "modelled bytes moved in one step"});
  column("memory_planned", p.memory.planned, {"kind", "rank"}, {"byte", "memory planned"});
  column("memory_peak", p.memory.measured_peak, {"kind", "rank"}, {"byte", "most memory allocated at a time"});
  column("process_peak", p.memory.process_peak, {"rank"}, {"byte", "growth of the resident set while the point ran"});
}

void write_point_attributes(const h5::Handle& group, const PointRecord& p) {
  for (const Parameter& parameter : p.parameters) h5::write_attribute(group, parameter.first, parameter.second);
  h5::write_attribute(group, "validity", p.valid ? "VALID" : "INVALID");
  write_attributes(group, p, point_texts);
  write_attributes(group, p, point_integers);
  write_attributes(group, p, point_reals);
  write_attributes(group, p, point_reals_1_5);
  if (p.quantisation.o_change >= 0) write_attributes(group, p.quantisation, quantisation_reals);
  const auto by_branch = [&](const char* name, const std::array<std::string, branches>& texts) {
    h5::write_attribute(group, name, std::vector<std::string>(texts.begin(), texts.end()));
  };
  by_branch("routes", p.routes);
  by_branch("route_reasons", p.route_reasons);
  by_branch("route_kernels", p.route_kernels);
  if (!p.chunk.routes[cmp].empty())
    for (const auto& entry : chunk_texts) by_branch(entry.name, p.chunk.*entry.field);
  h5::write_attribute(group, "exchange", p.exchange);
  h5::write_attribute(group, "fallbacks", fmt::format("{}", fmt::join(p.fallbacks, "\n")));
  h5::write_attribute(group, "noisy", fmt::format("{}", fmt::join(p.noisy, "\n")));
}

/// Writes `depth` as the dimension and every other column over it.
void write_needle(const h5::Handle& point_group, const PointRecord& p) {
  const h5::Handle group = h5::create_group(point_group, "needle");
  h5::write_scale(group, "depth", p.needle.at("depth"), {"1", "place of the needle as a fraction of the context"});
  for (const auto& [name, values] : p.needle) {
    if (name != "depth") h5::write(group, name, values, {"depth"}, {"1", "needle: " + name});
  }
}

/// Writes times and errors over implementations.
void write_kernels(const h5::Handle& point_group, const KernelRecord& k) {
  const h5::Handle group = h5::create_group(point_group, "kernels");
  h5::write_scale(group, "implementation", k.implementations, {"1", "implementation of the branch"});
  h5::write_scale(group, "rank", indices(k.ranks), {"1", "rank"});
  h5::write_scale(group, "rep", indices(k.reps), {"1", "repetition, warm-up first"});
  h5::write(group, "time", k.seconds, {"implementation", "rank", "rep"}, {"s", "duration of one execution"});
  h5::write(group, "mean_abs_err", k.mean_abs_err, {"implementation"}, {"1", "mean absolute error against float64"});
  h5::write(group, "mean_abs_err_se", k.mean_abs_err_se, {"implementation"},
            {"1", "standard error of mean_abs_err over query rows"});
  h5::write(group, "max_abs_err", k.max_abs_err, {"implementation"}, {"1", "largest absolute error against float64"});
  h5::write(group, "variant", k.variants, {"implementation"}, {"1", "kernel of the backend that ran"});
}

/// Writes lengths and reads over the sequences.
void write_batch(const h5::Handle& point_group, const BatchRecord& b) {
  const h5::Handle group = h5::create_group(point_group, "batch");
  h5::write_scale(group, "sequence", indices(std::ssize(b.lengths)), {"1", "sequence"});
  h5::write_scale<std::string>(group, "branch", {branch_names, branch_names + branches}, {"1", "branch of attention"});
  h5::write(group, "length", b.lengths, {"sequence"}, {"1", "tokens before the first step"});
  const auto column = [&](const char* name, const std::vector<std::int64_t>& values, const char* text) {
    if (!values.empty()) h5::write(group, name, values, {"branch", "sequence"}, {"1", text});
  };
  column("reads", b.reads, "tokens read at the last step, counted where they are loaded");
  column("reads_expected", b.reads_expected, "tokens read at the last step, from the shape alone");
  h5::write_attribute(group, "length_imbalance", b.length_imbalance);
  h5::write_attribute(group, "schedule_imbalance", b.schedule_imbalance);
}

/// Writes the pages of paged caches over caches and ranks.
void write_pages(const h5::Handle& point_group, const PageRecord& p) {
  const h5::Handle group = h5::create_group(point_group, "pages");
  h5::write_scale(group, "cache", p.caches, {"1", "paged cache"});
  h5::write_scale(group, "rank", indices(p.ranks), {"1", "rank"});
  for (const auto& [name, field, unit, text] : page_columns)
    h5::write(group, name, p.*field, {"cache", "rank"}, {unit, text});
}

/// Writes what may have disturbed each mode, over modes and ranks.
void write_noise(const h5::Handle& point_group, const NoiseRecord& n) {
  const h5::Handle group = h5::create_group(point_group, "noise");
  h5::write_scale(group, "mode", n.modes, {"1", "way of timing"});
  h5::write_scale(group, "rank", indices(n.ranks), {"1", "rank"});
  const auto columns = [&](const auto& list) {
    for (const auto& entry : list)
      h5::write(group, entry.name, n.*entry.field, {"mode", "rank"}, {entry.units, entry.long_name});
  };
  columns(noise_reals);
  columns(noise_counts);
  columns(noise_counts_1_6);
  h5::write(group, "sm_clock_max", n.sm_clock_max_mhz, {"rank"}, {"MHz", "largest clock of an SM, 0 if unknown"});
  h5::write(group, "cache_bytes", n.cache_bytes, {"rank"}, {"byte", "last-level cache of the device, 0 if unknown"});
}

/// Writes the times of phases over phases and ranks.
void write_phases(const h5::Handle& point_group, const PhaseRecord& p) {
  const h5::Handle group = h5::create_group(point_group, "phases");
  h5::write_scale(group, "phase", p.phases, {"1", "phase of the launch that a step's attention is"});
  h5::write_scale(group, "rank", indices(p.ranks), {"1", "rank"});
  h5::write_scale(group, "rep", indices(p.reps), {"1", "repetition, warm-up first"});
  h5::write(group, "time", p.seconds, {"phase", "rank", "rep"}, {"s", "duration, mean over the work items of a rank"});
}

/// The group that holds the tensor of this name, created where missing.
h5::Handle parent_group(const h5::Handle& tensors, const std::string& name) {
  for (auto slash = name.find('/'); slash != std::string::npos; slash = name.find('/', slash + 1)) {
    if (!h5::has(tensors, name.substr(0, slash))) h5::create_group(tensors, name.substr(0, slash));
  }
  const auto last = name.rfind('/');
  return h5::open_group(tensors, last == std::string::npos ? "." : name.substr(0, last));
}

void write_tensor(const h5::Handle& tensors, const TensorRecord& t, const std::set<std::string>& tensor_names) {
  if (t.dims.size() != t.shape.size())
    throw InternalError(
        fmt::format("tensor '{}' has {} dimensions and {} names", t.name, t.shape.size(), t.dims.size()));
  const h5::Handle group = parent_group(tensors, t.name);
  const std::size_t base = t.name.rfind('/') + 1;  // npos + 1 = 0
  std::vector<std::string> dimensions;
  for (std::size_t i = 0; i < t.shape.size(); ++i) {
    std::string name = t.dims[i];
    // The name gets the length appended where a tensor has it, or a dimension of another length.
    const bool other_length = h5::has(group, name) && h5::shape(group, name) != std::vector{t.shape[i]};
    if (other_length || tensor_names.count(t.name.substr(0, base) + name) > 0) name += "_" + std::to_string(t.shape[i]);
    if (!h5::has(group, name)) h5::write_scale(group, name, indices(t.shape[i]), {"1", "index of " + t.dims[i]});
    dimensions.push_back(name);
  }
  const h5::Text text{"1", "tensor " + t.name};
  if (t.integers.empty()) {
    h5::write(group, t.name.substr(base), t.values, dimensions, text);
  } else {
    h5::write(group, t.name.substr(base), t.integers, dimensions, text);
  }
}

void write_point(const h5::Handle& file, const PointRecord& p) {
  const h5::Handle points = h5::has(file, "points") ? h5::open_group(file, "points") : h5::create_group(file, "points");
  const std::string name = fmt::format("{:04d}", p.index);
  if (h5::has(points, name)) h5::remove(points, name);  // an interrupted point
  const h5::Handle group = h5::create_group(points, name);
  write_point_attributes(group, p);
  write_dimensions(group, p);
  write_columns(group, p);
  if (!p.needle.empty()) write_needle(group, p);
  if (!p.kernels.implementations.empty()) write_kernels(group, p.kernels);
  if (!p.noise.modes.empty()) write_noise(group, p.noise);
  if (!p.batch.lengths.empty()) write_batch(group, p.batch);
  if (!p.pages.caches.empty()) write_pages(group, p.pages);
  if (!p.phases.phases.empty()) write_phases(group, p.phases);
  if (p.tensors.empty()) return;
  const h5::Handle tensors = h5::create_group(group, "tensors");
  h5::write_attribute(tensors, "first_position", p.first_position);
  std::set<std::string> tensor_names;
  for (const TensorRecord& t : p.tensors) tensor_names.insert(t.name);
  for (const TensorRecord& t : p.tensors) write_tensor(tensors, t, tensor_names);
}

}  // namespace

struct ResultWriter::Impl {
  std::string path, temporary;
  RunRecord run;
  bool sealed = false;      ///< the file exists and this run wrote or resumed it
  struct stat identity {};  ///< device, inode and size of the file after the last write
  bool described = false;   ///< the file holds `run`

  // Sealing a point copies the file. Points of a long sweep wait for each other, so that it costs them little.
  using Clock = std::chrono::steady_clock;
  static constexpr off_t small_file = off_t{8} << 20;  ///< bytes; below, every point is sealed at once
  static constexpr double seconds_a_point = 0.02, times_the_seal = 10;
  std::vector<PointRecord> waiting;
  Clock::time_point last_seal = Clock::now();
  double seal_seconds = 0;  ///< duration of the last seal

  ~Impl() {
    try {
      if (!waiting.empty()) seal_waiting();  // another point has failed
    } catch (const std::exception&) {        // the run already ends with an error
    }
    unlink(temporary.c_str());
  }

  /// Whether the points may wait: sealing costs more than a point should, and a kill would lose little work.
  bool may_wait() const {
    const double work = std::chrono::duration<double>(Clock::now() - last_seal).count();
    return sealed && identity.st_size >= small_file && waiting.back().tensors.empty() &&
           seal_seconds > seconds_a_point * static_cast<double>(waiting.size()) && work < times_the_seal * seal_seconds;
  }

  void write_waiting(const h5::Handle& file) {
    for (const PointRecord& point : waiting) write_point(file, point);
  }

  void seal_waiting() {
    const Clock::time_point start = Clock::now();
    replace([&](const h5::Handle& file) {
      if (!described) write_run(file, run, "running");
      write_waiting(file);
    });
    waiting.clear();
    last_seal = Clock::now();
    seal_seconds = std::chrono::duration<double>(last_seal - start).count();
  }

  /// Calls `change(file)` on the temporary file; an error of HDF5 names the final file.
  template <class Change>
  void edit(bool create, Change&& change) {
    try {
      h5::Handle file = create ? h5::create_file(temporary) : h5::open_file(temporary, true);
      change(file);
      h5::flush_and_close(std::move(file));
    } catch (const h5::Error& error) {
      if (!create && status_of(temporary).kind == PathStatus::missing)
        file_error("cannot add a point to " + path, "another program has removed " + temporary,
                   "let one run at a time write it");
      h5::user_error(error, "write", path, "make room (disk, quota), then go on with --resume");
    }
  }

  void record_identity(const std::string& from) {
    if (stat(from.c_str(), &identity) != 0)
      file_error("cannot find " + from, std::strerror(errno), "put it back, then go on with --resume");
  }

  /// Throws where another program has written the file: its points must neither be lost nor mixed with those of this
  /// run.
  void check_identity() const {
    struct stat now {};
    if (stat(path.c_str(), &now) != 0)
      file_error("cannot add a point to " + path, std::strerror(errno), "put it back, then go on with --resume");
    if (now.st_dev != identity.st_dev || now.st_ino != identity.st_ino || now.st_size != identity.st_size)
      file_error("cannot add a point to " + path, "another program has written or replaced it since this run last did",
                 "let one run at a time write it");
  }

  /// Calls `change(file)` on a copy and renames the copy over the file.
  template <class Change>
  void replace(Change&& change) {
    if (sealed) {
      check_identity();
      copy_to_temporary(path, temporary);
    }
    edit(!sealed, change);
    sync_file(temporary);
    if (sealed) check_identity();  // the last moment: what is renamed over is what was copied
    record_identity(temporary);    // renaming keeps device and inode
    fault::at("result.publish");
    publish(temporary, path, sealed);
    sealed = described = true;
  }
};

ResultWriter::ResultWriter(const std::string& path, const RunRecord& run, std::size_t expected_bytes, bool resume)
    : impl_(std::make_unique<Impl>()) {
  impl_->path = follow_links(path);  // the links are kept
  check_writable(path, impl_->path, expected_bytes, resume);
  impl_->sealed = status_of(impl_->path).kind != PathStatus::missing;
  impl_->temporary = temporary_name(impl_->path);
  impl_->run = run;
  remove_leftovers(impl_->path);
  check_creatable(path, impl_->temporary);
  if (impl_->sealed) impl_->record_identity(impl_->path);
  // Checks before any computing that HDF5 can write here.
  impl_->edit(true, [&](const h5::Handle& file) { write_run(file, run, "running"); });
  unlink(impl_->temporary.c_str());
}

ResultWriter::~ResultWriter() = default;

void ResultWriter::seal(const PointRecord& point) {
  impl_->waiting.push_back(point);
  if (!impl_->may_wait()) impl_->seal_waiting();
}

void ResultWriter::finish(const RunRecord& run) {
  if (!impl_->sealed) return;
  const bool complete = run.status.empty() || run.status == "running";
  impl_->replace([&](const h5::Handle& file) {
    impl_->write_waiting(file);
    write_run(file, run, complete ? "complete" : run.status);
  });
  impl_->waiting.clear();
}

}  // namespace nsa
