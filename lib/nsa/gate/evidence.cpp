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

/// Parameters that must be equal in all points of one verdict. The others are swept, or say how long was measured.
bool must_be_equal(const std::string& key) {
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

/// Values of one device in the files read so far, each with the file that holds it.
struct DeviceInputs {
  std::string commit_file;
  std::map<std::string, std::pair<std::string, std::string>> values;  ///< name -> value, file
  std::map<std::string, std::string> points;                          ///< kind and key -> file

  void require_equal(const std::string& what, const std::string& value, const std::string& path) {
    const auto [entry, inserted] = values.emplace(what, std::pair(value, path));
    if (!inserted && entry->second.first != value)
      throw UserError(
          fmt::format("{}: {} in {}, {} in {} (one device's verdict needs one input a kind of run); give "
                      "files that agree, or judge them apart",
                      what, entry->second.first, entry->second.second, value, path));
  }
};

void check_same_input(DeviceInputs& inputs, const PointRecord& point, const std::string& path) {
  const std::string kind = kind_of(point);
  for (const auto& [key, value] : point.parameters)
    if (must_be_equal(key)) inputs.require_equal(kind + " " + key, text_of(value), path);
  inputs.require_equal(kind + " heads x kv", fmt::format("{} x {}", point.heads, point.kv), path);
  for (const char* key : {"model.precision", "nsa.l_sel"})  // equal over all kinds
    for (const auto& [name, value] : point.parameters)
      if (name == key) inputs.require_equal(key, text_of(value), path);
  const auto [entry, inserted] = inputs.points.emplace(kind + ", " + point_key(point), path);
  if (!inserted)
    throw UserError(
        fmt::format("{} and {} both hold {} (a verdict takes each point once, with all its modes); give one "
                    "of them",
                    entry->second, path, entry->first));
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
  std::map<std::string, DeviceInputs> inputs_of;
  std::set<std::string> ignored;
  for (const GateFile& file : files) {
    const RunRecord& run = file.result.run;
    if (file.result.points.empty())
      throw UserError(file.path + " holds no point (its run was stopped before the first one ended); give a run's file",
                      ExitCode::file);
    const std::string name = device_of(file), key = run.backend + " " + name;
    auto device = std::find_if(devices.begin(), devices.end(),
                               [&](const DevicePoints& d) { return d.backend + " " + d.device == key; });
    DeviceInputs& inputs = inputs_of[key];
    if (device == devices.end()) {
      DevicePoints added;
      added.device = name;
      added.backend = run.backend;
      added.git_commit = run.git_commit;
      added.precision = text_parameter(file.result.points[0], "model.precision");
      device = devices.insert(device, std::move(added));
      inputs.commit_file = file.path;
      if (run.git_commit.ends_with("-dirty"))
        device->notes.push_back(fmt::format("commit {}: the program had changes that no commit holds", run.git_commit));
    } else if (device->git_commit != run.git_commit) {
      throw UserError(
          fmt::format("{}: {} is of commit {}, {} of {} (one verdict needs one program); run them again with "
                      "one build, or judge them apart",
                      name, inputs.commit_file, device->git_commit, file.path, run.git_commit));
    }
    device->files.push_back(file.path);
    device->commands.push_back(run.argv);
    device->measured = std::max(device->measured, run.end);
    if (run.status != "complete")
      device->notes.push_back(
          fmt::format("{}: its run did not end (status {}); the points it has are whole", file.path, run.status));
    for (const PointRecord& point : file.result.points) {
      check_same_input(inputs, point, file.path);
      add_point(*device, point, file.path, ignored);
    }
  }
  for (DevicePoints& points : devices)
    std::stable_sort(points.decode.begin(), points.decode.end(), [](const PointRecord* a, const PointRecord* b) {
      const auto order = [](const PointRecord* p) {
        return std::pair(integer_parameter(*p, "run.batch", 1), integer_parameter(*p, "run.context", 0));
      };
      return order(a) < order(b);
    });
  return devices;
}

}  // namespace nsa
