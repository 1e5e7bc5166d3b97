// Reads the result file (docs/SCHEMA.md), except its tensors.

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <deque>
#include <map>
#include <optional>
#include <utility>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/hdf5/h5.hpp"
#include "nsa/results/result_file.hpp"
#include "nsa/results/schema.hpp"
#include "nsa/results/serialize.hpp"

namespace nsa {
namespace {

template <class Record, class T, std::size_t n>
void read_attributes(const h5::Handle& at, Record& record, const Named<Record, T> (&list)[n]) {
  for (const auto& entry : list) record.*entry.field = h5::attribute_as<T>(at, entry.name);
}

template <class T, std::size_t n>
void read_system_columns(const h5::Handle& group, RunRecord& run, const Named<RankSystem, T> (&list)[n]) {
  for (const auto& entry : list) {
    const std::vector<T> values = h5::read<T>(group, entry.name);
    if (values.size() != run.system.size())
      throw h5::Error(fmt::format("'/system/{}' is not one value a rank", entry.name));
    for (std::size_t i = 0; i < values.size(); ++i) run.system[i].*entry.field = values[i];
  }
}

/// The number that the text begins with; -1 where it begins with none.
int leading_number(const std::string& text) {
  int number = -1;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

/// The index of a point's group, "0007"; -1 for any other name.
int point_index(const std::string& name) {
  const bool digits = name.size() >= 4 && name.find_first_not_of("0123456789") == std::string::npos;
  return digits ? leading_number(name) : -1;
}

void check_schema(const h5::Handle& file) {
  const std::vector<std::string> attributes = h5::attribute_names(file);
  if (std::find(attributes.begin(), attributes.end(), "schema_version") == attributes.end())
    throw h5::Error("HDF5, but no result of nsa: no attribute 'schema_version'");
  const auto version = h5::attribute_as<std::string>(file, "schema_version");
  if (leading_number(version) != schema_major)
    throw h5::Error(fmt::format("its schema is '{}', this program reads {}.x", version, schema_major));
}

RunRecord read_run(const h5::Handle& file) {
  RunRecord run;
  run.status = h5::attribute_as<std::string>(file, "status");
  read_attributes(file, run, run_attributes);
  const std::vector<std::string> names = h5::attribute_names(file);
  if (std::count(names.begin(), names.end(), "config") > 0) {
    read_attributes(file, run, run_attributes_1_1);
    read_attributes(file, run, run_integers_1_1);
  }
  if (std::count(names.begin(), names.end(), "program") > 0) read_attributes(file, run, run_attributes_1_5);
  if (std::count(names.begin(), names.end(), "input_selection_sha256") > 0)
    read_attributes(file, run, run_attributes_1_6);
  const h5::Handle system = h5::open_group(file, "system");
  run.system.resize(h5::read<std::int64_t>(system, "rank").size());
  read_system_columns(system, run, system_texts);
  read_system_columns(system, run, system_clocks);
  read_system_columns(system, run, system_counts);
  if (h5::has(system, "cores")) {
    read_system_columns(system, run, system_texts_1_2);
    read_system_columns(system, run, system_counts_1_2);
  }
  return run;
}

/// A dataset of the given shape; empty where the task did not fill it.
template <class T>
std::vector<T> column(const h5::Handle& group, const char* name, const std::vector<std::int64_t>& shape) {
  std::optional<h5::Array<T>> found = h5::read_if_there<T>(group, name);
  if (!found) return {};
  if (found->shape != shape)
    throw h5::Error(fmt::format("'{}' has shape ({}), its dimensions ({})", name, fmt::join(found->shape, ", "),
                                fmt::join(shape, ", ")));
  return std::move(found->values);
}

template <class T>
std::vector<T> labels(const h5::Handle& group, const char* name) {
  std::optional<h5::Array<T>> found = h5::read_if_there<T>(group, name);
  return found ? std::move(found->values) : std::vector<T>{};
}

void read_columns(const h5::Handle& group, PointRecord& p) {
  const auto length = [&](const char* name) {
    return static_cast<std::int64_t>(labels<std::int64_t>(group, name).size());
  };
  const std::vector<std::string> stages = h5::read<std::string>(group, "stage");
  if (!std::equal(stages.begin(), stages.end(), stage_names.begin(), stage_names.end()))
    throw h5::Error(
        fmt::format("its stages are {}; this program knows {}", fmt::join(stages, ", "), fmt::join(stage_names, ", ")));
  const std::int64_t ranks = length("rank"), reps = length("rep"), steps = length("step");
  p.time.modes = labels<std::string>(group, "mode");
  p.memory.kinds = labels<std::string>(group, "kind");
  const auto modes = static_cast<std::int64_t>(p.time.modes.size());
  const auto kinds = static_cast<std::int64_t>(p.memory.kinds.size());
  p.time.seconds = column<double>(group, "time", {modes, stage_count, ranks, reps});
  if (!p.time.seconds.empty()) p.time.ranks = ranks, p.time.reps = reps;
  p.reads.counted = column<std::int64_t>(group, "reads", {branches, ranks, steps});
  p.reads.expected = column<std::int64_t>(group, "reads_expected", {branches, ranks, steps});
  p.reads.nsa_vibe = column<std::int64_t>(group, "reads_nsa_vibe", {steps});
  p.tokens_kept = column<std::int64_t>(group, "tokens_kept", {steps});  // since 1.7
  if (p.reads.counted.empty() != p.reads.expected.empty())
    throw h5::Error("of 'reads' and 'reads_expected' it has only one");
  if (!p.reads.counted.empty()) p.reads.ranks = ranks, p.reads.steps = steps;
  p.bytes = column<std::int64_t>(group, "bytes", {stage_count, ranks});
  p.memory.planned = column<std::int64_t>(group, "memory_planned", {kinds, ranks});
  p.memory.measured_peak = column<std::int64_t>(group, "memory_peak", {kinds, ranks});
  p.memory.process_peak = column<std::int64_t>(group, "process_peak", {ranks});
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> result;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    result.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

void read_by_branch(const h5::Handle& group, const char* name, std::array<std::string, branches>& field) {
  const std::vector<std::string> texts = h5::string_attributes(group, name);
  if (texts.size() != field.size()) throw h5::Error(fmt::format("attribute '{}' is not one name a branch", name));
  std::copy(texts.begin(), texts.end(), field.begin());
}

void read_point_attributes(const h5::Handle& group, PointRecord& p) {
  const std::vector<std::string> names = h5::attribute_names(group);
  for (const std::string& name : names) {  // parameters are "section.key"
    if (name.find('.') != std::string::npos) p.parameters.emplace_back(name, h5::attribute(group, name));
  }
  p.valid = h5::attribute_as<std::string>(group, "validity") == "VALID";
  read_attributes(group, p, point_texts);
  read_attributes(group, p, point_integers);
  read_attributes(group, p, point_reals);
  if (p.warmup_reps < 0) throw h5::Error(fmt::format("attribute 'warmup_reps' is {}", p.warmup_reps));
  read_by_branch(group, "routes", p.routes);
  if (std::count(names.begin(), names.end(), "route_kernels") > 0)  // since 1.3
    read_by_branch(group, "route_kernels", p.route_kernels);
  for (const auto& entry : chunk_texts)  // since 1.9
    if (std::count(names.begin(), names.end(), entry.name) > 0) read_by_branch(group, entry.name, p.chunk.*entry.field);
  if (std::count(names.begin(), names.end(), "exchange") > 0)  // since 1.4
    p.exchange = h5::attribute_as<std::string>(group, "exchange");
  if (std::count(names.begin(), names.end(), "blocks_shared") > 0) read_attributes(group, p, point_reals_1_5);
  if (std::count(names.begin(), names.end(), "selection_agreement") > 0)
    read_attributes(group, p.quantisation, quantisation_reals);
  p.fallbacks = lines(h5::attribute_as<std::string>(group, "fallbacks"));
  if (std::count(names.begin(), names.end(), "noisy") > 0)  // since 1.5
    p.noisy = lines(h5::attribute_as<std::string>(group, "noisy"));
}

KernelRecord read_kernels(const h5::Handle& group) {
  KernelRecord k;
  k.implementations = h5::read<std::string>(group, "implementation");
  k.ranks = std::ssize(h5::read<std::int64_t>(group, "rank"));
  k.reps = std::ssize(h5::read<std::int64_t>(group, "rep"));
  const std::int64_t count = std::ssize(k.implementations);
  const auto whole = [&](const char* name, const std::vector<std::int64_t>& shape) {
    if (!h5::has(group, name)) throw h5::Error(fmt::format("dataset 'kernels/{}' is missing", name));
    return column<double>(group, name, shape);
  };
  k.seconds = whole("time", {count, k.ranks, k.reps});
  k.mean_abs_err = whole("mean_abs_err", {count});
  k.mean_abs_err_se = whole("mean_abs_err_se", {count});
  k.max_abs_err = whole("max_abs_err", {count});
  k.variants = column<std::string>(group, "variant", {count});
  return k;
}

std::map<std::string, std::vector<double>> read_needle(const h5::Handle& group) {
  std::map<std::string, std::vector<double>> columns{{"depth", {}}};
  for (const std::string& name : h5::names(group)) columns[name] = h5::read<double>(group, name);
  for (const auto& [name, values] : columns)
    if (values.size() != columns.at("depth").size())
      throw h5::Error(fmt::format("dataset 'needle/{}' is not one value a depth", name));
  return columns;
}

NoiseRecord read_noise(const h5::Handle& group) {
  NoiseRecord n;
  n.modes = h5::read<std::string>(group, "mode");
  n.ranks = std::ssize(h5::read<std::int64_t>(group, "rank"));
  const auto whole = [&]<class T>(const char* name, std::vector<T>& field, const std::vector<std::int64_t>& shape) {
    if (!h5::has(group, name)) throw h5::Error(fmt::format("dataset 'noise/{}' is missing", name));
    field = column<T>(group, name, shape);
  };
  for (const auto& entry : noise_reals) whole(entry.name, n.*entry.field, {std::ssize(n.modes), n.ranks});
  for (const auto& entry : noise_counts) whole(entry.name, n.*entry.field, {std::ssize(n.modes), n.ranks});
  if (h5::has(group, "throttled_passes"))
    for (const auto& entry : noise_counts_1_6) whole(entry.name, n.*entry.field, {std::ssize(n.modes), n.ranks});
  whole("sm_clock_max", n.sm_clock_max_mhz, {n.ranks});
  whole("cache_bytes", n.cache_bytes, {n.ranks});
  return n;
}

BatchRecord read_batch(const h5::Handle& group) {
  BatchRecord b;
  const auto sequences = std::ssize(h5::read<std::int64_t>(group, "sequence"));
  b.lengths = column<std::int64_t>(group, "length", {sequences});
  if (b.lengths.empty()) throw h5::Error("dataset 'batch/length' is missing");
  b.reads = column<std::int64_t>(group, "reads", {branches, sequences});
  b.reads_expected = column<std::int64_t>(group, "reads_expected", {branches, sequences});
  b.length_imbalance = h5::attribute_as<double>(group, "length_imbalance");
  b.schedule_imbalance = h5::attribute_as<double>(group, "schedule_imbalance");
  return b;
}

PageRecord read_pages(const h5::Handle& group) {
  PageRecord p;
  p.caches = h5::read<std::string>(group, "cache");
  p.ranks = std::ssize(h5::read<std::int64_t>(group, "rank"));
  for (const auto& column_of : page_columns) {
    if (!h5::has(group, column_of.name))
      throw h5::Error(std::string("dataset 'pages/") + column_of.name + "' is missing");
    p.*column_of.field = column<std::int64_t>(group, column_of.name, {std::ssize(p.caches), p.ranks});
  }
  return p;
}

PhaseRecord read_phases(const h5::Handle& group) {
  PhaseRecord p;
  p.phases = h5::read<std::string>(group, "phase");
  p.ranks = std::ssize(h5::read<std::int64_t>(group, "rank"));
  p.reps = std::ssize(h5::read<std::int64_t>(group, "rep"));
  if (!h5::has(group, "time")) throw h5::Error("dataset 'phases/time' is missing");
  p.seconds = column<double>(group, "time", {std::ssize(p.phases), p.ranks, p.reps});
  return p;
}

PointRecord read_point(const h5::Handle& group, std::int64_t index) {
  PointRecord p;
  p.index = index;
  read_point_attributes(group, p);
  read_columns(group, p);
  if (h5::has(group, "needle")) p.needle = read_needle(h5::open_group(group, "needle"));
  if (h5::has(group, "kernels")) p.kernels = read_kernels(h5::open_group(group, "kernels"));
  if (h5::has(group, "phases")) p.phases = read_phases(h5::open_group(group, "phases"));  // since 1.6
  if (h5::has(group, "noise")) p.noise = read_noise(h5::open_group(group, "noise"));
  if (h5::has(group, "batch")) p.batch = read_batch(h5::open_group(group, "batch"));
  if (h5::has(group, "pages")) p.pages = read_pages(h5::open_group(group, "pages"));  // since 1.7
  return p;
}

ResultFile read_file(const h5::Handle& file, const std::function<void()>& progress) {
  check_schema(file);
  ResultFile result;
  result.run = read_run(file);
  const h5::Handle points = h5::open_group(file, "points");
  for (const std::string& name : h5::names(points)) {
    const int index = point_index(name);
    if (index < 0) continue;  // of another program
    try {
      result.points.push_back(read_point(h5::open_group(points, name), index));
      progress();
    } catch (const h5::Error& error) {
      throw h5::Error("point " + name + ": " + error.what(), error.kind());
    }
  }
  std::sort(result.points.begin(), result.points.end(),
            [](const PointRecord& a, const PointRecord& b) { return a.index < b.index; });
  return result;
}

}  // namespace

ResultFile read_result(const std::string& path) { return std::move(read_results({path})[0]); }

std::vector<ResultFile> read_results(const std::vector<std::string>& paths) {
  std::deque<std::optional<h5::Sandbox>> readers;  // none of what is no file
  for (const std::string& path : paths) {
    std::optional<h5::Sandbox>& reader = readers.emplace_back();
    if (why_no_file(path).empty())
      reader.emplace([&path](const auto& progress) { return serialize(read_file(h5::open_file(path), progress)); });
  }
  std::vector<ResultFile> results;
  for (std::size_t i = 0; i < paths.size(); ++i) {
    const std::string& path = paths[i];
    if (!readers[i])
      throw UserError("cannot read " + path + " (" + why_no_file(path) + "); give the result file of a run",
                      ExitCode::file);
    try {
      results.push_back(deserialize(readers[i]->result()));
    } catch (const h5::Error& wrong) {
      h5::user_error(wrong, "read", path, "give the result file of a run");
    }
  }
  return results;
}

}  // namespace nsa
