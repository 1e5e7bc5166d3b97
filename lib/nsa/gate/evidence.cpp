#include "nsa/gate/evidence.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "kernels/diagnostics/error.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
namespace {

using Value = decltype(Parameter::second);

/// Parameters that points of one verdict may not differ in; the rest is swept, or says how long it was measured.
bool must_agree(const std::string& key) {
  for (const char* prefix : {"model.", "nsa.", "route.", "run.scope", "run.fill", "run.seed", "input."})
    if (key.starts_with(prefix)) return true;
  return false;
}

std::string text_of(const Value& value) {
  return std::visit([](const auto& v) { return fmt::format("{}", v); }, value);
}

std::string kind_of(const PointRecord& point) { return text_parameter(point, "task.kind", "decode"); }

std::string point_key(const PointRecord& point) {
  if (kind_of(point) == "kernels")
    return fmt::format("branch {}, context {}, {}", text_parameter(point, "kernels.branch", "sel"),
                       integer_parameter(point, "run.context", 0), shape_name(point));
  return fmt::format("context {}, batch {}, forced branch {}", integer_parameter(point, "run.context", 0),
                     integer_parameter(point, "run.batch", 1), text_parameter(point, "run.force_branch", "none"));
}

std::string device_of(const GateFile& file) {
  std::string device;
  for (const RankSystem& rank : file.result.run.system) {
    const std::string& name = file.result.run.backend == "cuda" ? rank.gpu : rank.cpu;
    if (!device.empty() && name != device)
      throw UserError(fmt::format("{} ran on {} and {} (a verdict is about one device); run it on ranks of one kind",
                                  file.path, device, name));
    device = name;
  }
  return device.empty() ? "unknown device" : device;
}

/// Seen so far of one device, with the file that showed it.
struct Seen {
  std::string commit_file;
  std::map<std::string, std::pair<std::string, std::string>> values;  ///< what -> value, file
  std::map<std::string, std::string> points;                          ///< kind and key -> file

  void agree(const std::string& what, const std::string& value, const std::string& path) {
    const auto [at, fresh] = values.emplace(what, std::pair(value, path));
    if (!fresh && at->second.first != value)
      throw UserError(
          fmt::format("{}: {} in {}, {} in {} (one device's verdict needs one input a kind of run); give "
                      "files that agree, or judge them apart",
                      what, at->second.first, at->second.second, value, path));
  }
};

void check_same_input(Seen& seen, const PointRecord& point, const std::string& path) {
  const std::string kind = kind_of(point);
  for (const auto& [key, value] : point.parameters)
    if (must_agree(key)) seen.agree(kind + " " + key, text_of(value), path);
  seen.agree(kind + " heads x kv", fmt::format("{} x {}", point.heads, point.kv), path);
  for (const char* key : {"model.precision", "nsa.l_sel"})  // of every kind alike
    for (const auto& [name, value] : point.parameters)
      if (name == key) seen.agree(key, text_of(value), path);
  const auto [at, fresh] = seen.points.emplace(kind + ", " + point_key(point), path);
  if (!fresh)
    throw UserError(
        fmt::format("{} and {} both hold {} (a verdict takes each point once, with all its modes); give one "
                    "of them",
                    at->second, path, at->first));
}

void add_point(DevicePoints& device, const PointRecord& point, const std::string& path,
               std::set<std::string>& ignored) {
  const std::string kind = kind_of(point);
  const bool kernels = kind == "kernels";
  if (!kernels && kind != "decode") {
    if (ignored.insert(kind).second)
      device.notes.push_back(fmt::format("{}: points of kind {} are not read", path, kind));
    return;
  }
  if (kernels && text_parameter(point, "kernels.branch", "sel") != "sel") return device.dense.push_back(&point);
  if (!kernels && text_parameter(point, "run.force_branch", "none") != "none") {
    device.notes.push_back(fmt::format("{}: {} is left out (forced gates)", path, point_key(point)));
    return;
  }
  if (!point.valid) {
    device.notes.push_back(fmt::format("{}: {} is left out, INVALID ({})", path, point_key(point), point.reason));
    if (kernels) device.invalid_shapes.push_back(shape_name(point));
    return;
  }
  (kernels ? device.kernels : device.decode).push_back(&point);
}

}  // namespace

std::string shape_name(const PointRecord& p) {
  return fmt::format("N={} H={} D={} n={} {}", integer_parameter(p, "kernels.rows", 0),
                     integer_parameter(p, "kernels.heads", 0), integer_parameter(p, "kernels.head_size", 0),
                     integer_parameter(p, "kernels.blocks", 0), text_parameter(p, "kernels.spans", "?"));
}

std::vector<DevicePoints> sort_files(const std::vector<GateFile>& files) {
  std::vector<DevicePoints> devices;
  std::map<std::string, Seen> seen_of;
  std::set<std::string> ignored;
  for (const GateFile& file : files) {
    const RunRecord& run = file.result.run;
    if (file.result.points.empty())
      throw UserError(file.path + " holds no point (its run was stopped before the first one ended); give a run's file",
                      ExitCode::file);
    const std::string name = device_of(file), key = run.backend + " " + name;
    auto at = std::find_if(devices.begin(), devices.end(),
                           [&](const DevicePoints& d) { return d.backend + " " + d.device == key; });
    Seen& seen = seen_of[key];
    if (at == devices.end()) {
      DevicePoints fresh;
      fresh.device = name;
      fresh.backend = run.backend;
      fresh.git_commit = run.git_commit;
      fresh.precision = text_parameter(file.result.points[0], "model.precision");
      at = devices.insert(at, std::move(fresh));
      seen.commit_file = file.path;
      if (run.git_commit.ends_with("-dirty"))
        at->notes.push_back(fmt::format("commit {}: the program had changes that no commit holds", run.git_commit));
    } else if (at->git_commit != run.git_commit) {
      throw UserError(
          fmt::format("{}: {} is of commit {}, {} of {} (one verdict needs one program); run them again with "
                      "one build, or judge them apart",
                      name, seen.commit_file, at->git_commit, file.path, run.git_commit));
    }
    at->files.push_back(file.path);
    at->commands.push_back(run.argv);
    at->measured = std::max(at->measured, run.end);
    if (run.status != "complete")
      at->notes.push_back(
          fmt::format("{}: its run did not end (status {}); the points it has are whole", file.path, run.status));
    for (const PointRecord& point : file.result.points) {
      check_same_input(seen, point, file.path);
      add_point(*at, point, file.path, ignored);
    }
  }
  for (DevicePoints& device : devices)
    std::stable_sort(device.decode.begin(), device.decode.end(), [](const PointRecord* a, const PointRecord* b) {
      const auto order = [](const PointRecord* p) {
        return std::pair(integer_parameter(*p, "run.batch", 1), integer_parameter(*p, "run.context", 0));
      };
      return order(a) < order(b);
    });
  return devices;
}

}  // namespace nsa
