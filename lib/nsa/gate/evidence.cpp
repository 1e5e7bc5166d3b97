#include "nsa/gate/evidence.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/asked.hpp"
#include "nsa/report/metrics.hpp"

namespace nsa {
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

namespace {

using Value = decltype(Parameter::second);

/// Parameters that must be equal in all points of one verdict. The others are swept, or say how long was measured.
bool must_be_equal(const std::string& key) {
  for (const char* prefix : {"model.", "nsa.", "route.", "run.scope", "run.fill", "run.seed", "run.overlap", "input."})
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

/// What the gate does with a point.
enum class Use { decode, kernels, dense, forced, given, none };

Use use_of(const PointRecord& point) {
  const std::string kind = kind_of(point);
  if (kind == "kernels") return text_parameter(point, "kernels.branch", "sel") == "sel" ? Use::kernels : Use::dense;
  if (kind != "decode") return Use::none;
  if (!text_parameter(point, "input.selection", "").empty()) return Use::given;
  return text_parameter(point, "run.force_branch", "none") == "none" ? Use::decode : Use::forced;
}

void add_gap(DevicePoints& device, const PointRecord& point, const std::string& why) {
  if (use_of(point) == Use::kernels) device.kernel_gaps.push_back({shape_name(point), why});
  if (use_of(point) != Use::decode) return;
  const std::int64_t context = integer_parameter(point, "run.context", 0),
                     batch = integer_parameter(point, "run.batch", 1);
  device.decode_gaps.push_back(
      {fmt::format("context {}{}", context, batch == 1 ? "" : fmt::format(", batch {}", batch)), why, context, batch});
}

void add_point(DevicePoints& device, const PointRecord& point, const GateFile& file, std::set<std::string>& ignored) {
  const std::string& path = file.path;
  const Use use = use_of(point);
  if (use == Use::none && ignored.insert(kind_of(point)).second)
    device.notes.push_back(fmt::format("{}: points of kind {} are not read", path, kind_of(point)));
  if (use == Use::forced)
    device.notes.push_back(fmt::format("{}: {} is left out (forced gates)", path, point_key(point)));
  if (use == Use::given)
    device.notes.push_back(
        fmt::format("{}: {} is left out (its selections are given, so nothing was ranked)", path, point_key(point)));
  if (use == Use::dense) device.dense.push_back(&point);
  if (use != Use::decode && use != Use::kernels) return;
  if (!point.valid) {
    device.notes.push_back(fmt::format("{}: {} is left out, INVALID ({})", path, point_key(point), point.reason));
    add_gap(device, point, fmt::format("INVALID in {} ({}); fix that and run it again", path, point.reason));
  } else if (point.stop_reason == "interrupted") {
    add_gap(device, point, fmt::format("cut short in {}; go on with --resume", path));
  } else if (use == Use::kernels) {
    device.kernels.push_back({&point, &file, {}});
  } else {
    device.decode.push_back(&point);
  }
}

bool is_peer(const GateFile* file) { return file->result.run.program != "nsa"; }

/// What has to be equal for two programs to have done the same work: the shape, where the blocks lie, what is stored.
std::string work_of(const PointRecord& point, const RunRecord& run) {
  const bool recorded = text_parameter(point, "kernels.spans", "?") == "recorded";
  return fmt::format("{}, {}, blocks of {}, cold {}, overlap {}{}", point_key(point),
                     text_parameter(point, "model.precision"), integer_parameter(point, "nsa.l_sel", 0),
                     integer_parameter(point, "kernels.cold", 1), real_parameter(point, "run.overlap", 0),
                     recorded ? ", selection " + run.input_selection_sha256 : "");
}

/// Both ran on one card: a ratio of times of two cards would hold the difference between the cards.
void require_one_card(const GateFile& a, const GateFile& b) {
  const auto card = [](const GateFile& file) {
    return file.result.run.system.empty() ? "" : file.result.run.system[0].uuid;
  };
  const std::string of_a = card(a), of_b = card(b);
  if (of_a != of_b)
    throw UserError(
        fmt::format("{} was measured on {}, {} on {} (a peer is compared on one card); measure both on the same "
                    "one, or leave {} out",
                    a.path, of_a.empty() ? "a device without UUID" : of_a, b.path,
                    of_b.empty() ? "one without UUID" : of_b, b.path));
}

/// Gives every kernel point the points of the same work in the files of peers; each file has to hold all of them.
void pair_peers(DevicePoints& device, const std::vector<const GateFile*>& peers) {
  for (const GateFile* file : peers) {
    device.peers.push_back(fmt::format("{} ({})", file->result.run.program, file->path));
    std::map<std::string, const PointRecord*> by_work;
    for (const PointRecord& point : file->result.points)
      if (!by_work.emplace(work_of(point, file->result.run), &point).second)
        throw UserError(fmt::format("{} holds {} twice; give a file that holds each shape once", file->path,
                                    work_of(point, file->result.run)));
    for (KernelEvidence& kernel : device.kernels) {
      require_one_card(*kernel.file, *file);
      const auto found = by_work.find(work_of(*kernel.point, kernel.file->result.run));
      if (found != by_work.end() && found->second->valid)
        kernel.peers.push_back({found->second, file});
      else
        device.peer_gaps.push_back(
            {shape_name(*kernel.point),
             found == by_work.end()
                 ? fmt::format("no time of it in {}; run it on the shapes of {}", file->path, kernel.file->path)
                 : fmt::format("INVALID in {} ({})", file->path, found->second->reason)});
    }
  }
}

/// Adds the points that the inputs of the files ask for and that none of the files of the device holds.
void add_missing(DevicePoints& device, const std::vector<const GateFile*>& files,
                 const std::map<std::string, std::string>& held) {
  for (const GateFile* file : files) {
    const RunRecord& run = file->result.run;
    const std::string status = run.status == "complete" ? "" : fmt::format(" (status {})", run.status);
    const auto asked = asked_points(run);
    if (!asked && run.status != "complete") {
      const Gap gap{"points of " + file->path,
                    fmt::format("its run did not end{}, and the file does not say what it asks for", status)};
      (kind_of(file->result.points[0]) == "kernels" ? device.kernel_gaps : device.decode_gaps).push_back(gap);
      continue;
    }
    std::string missing;
    std::int64_t count = 0;
    for (const PointRecord& point : asked.value_or(std::vector<PointRecord>{})) {
      if (held.count(kind_of(point) + ", " + point_key(point)) > 0) continue;
      missing += (count++ == 0 ? "" : "; ") + point_key(point);
      add_gap(device, point,
              fmt::format("not in {}{}, whose input asks for it; go on with --resume", file->path, status));
    }
    if (count > 0)
      device.notes.push_back(fmt::format("{} lacks {} of the {} points that its input asks for: {}", file->path, count,
                                         asked->size(), missing));
  }
}

/// Decode first, then kernels; then by start and path: an order that depends on the files alone.
std::vector<const GateFile*> in_order(const std::vector<GateFile>& files) {
  std::vector<const GateFile*> sorted;
  for (const GateFile& file : files) {
    if (file.result.points.empty())
      throw UserError(file.path + " holds no point (its run was stopped before the first one ended); give a run's file",
                      ExitCode::file);
    sorted.push_back(&file);
  }
  const auto key = [](const GateFile* file) {
    return std::tuple(kind_of(file->result.points[0]), file->result.run.start, file->path);
  };
  std::sort(sorted.begin(), sorted.end(), [&](const GateFile* a, const GateFile* b) { return key(a) < key(b); });
  return sorted;
}

/// What is known of a device while its files are read.
struct Device {
  DevicePoints points;
  DeviceInputs inputs;
  std::vector<const GateFile*> files, peers;
};

/// Refuses a file of another program than the earlier files of the device.
void add_run(Device& device, const GateFile& file) {
  const RunRecord& run = file.result.run;
  DevicePoints& points = device.points;
  if (device.files.empty()) {
    points.git_commit = run.git_commit;
    points.precision = text_parameter(file.result.points[0], "model.precision");
    device.inputs.commit_file = file.path;
    if (run.git_commit.ends_with("-dirty"))
      points.notes.push_back(fmt::format("commit {}: the program had changes that no commit holds", run.git_commit));
  } else if (points.git_commit != run.git_commit) {
    throw UserError(
        fmt::format("{}: {} is of commit {}, {} of {} (one verdict needs one program); run them again with "
                    "one build, or judge them apart",
                    points.device, device.inputs.commit_file, points.git_commit, file.path, run.git_commit));
  }
  device.files.push_back(&file);
  points.files.push_back(file.path);
  points.commands.push_back(run.argv);
  points.measured = std::max(points.measured, run.end);
  if (run.status != "complete")
    points.notes.push_back(
        fmt::format("{}: its run did not end (status {}); the points it has are whole", file.path, run.status));
}

}  // namespace

std::string shape_name(const PointRecord& p) {
  return fmt::format("N={} H={} D={} n={} {}", integer_parameter(p, "kernels.rows", 0),
                     integer_parameter(p, "kernels.heads", 0), integer_parameter(p, "kernels.head_size", 0),
                     integer_parameter(p, "kernels.blocks", 0), text_parameter(p, "kernels.spans", "?"));
}

std::vector<DevicePoints> sort_files(const std::vector<GateFile>& files) {
  std::map<std::pair<std::string, std::string>, Device> devices;  // by backend and name
  std::set<std::string> ignored;
  for (const GateFile* file : in_order(files)) {
    const std::string &backend = file->result.run.backend, name = device_of(*file);
    Device& device = devices[{backend, name}];
    device.points.backend = backend;
    device.points.device = name;
    if (is_peer(file)) {
      device.peers.push_back(file);
      continue;
    }
    add_run(device, *file);
    for (const PointRecord& point : file->result.points) {
      check_same_input(device.inputs, point, file->path);
      add_point(device.points, point, *file, ignored);
    }
  }
  std::vector<DevicePoints> sorted;
  for (auto& [key, device] : devices) {
    add_missing(device.points, device.files, device.inputs.points);
    pair_peers(device.points, device.peers);
    std::stable_sort(
        device.points.decode.begin(), device.points.decode.end(), [](const PointRecord* a, const PointRecord* b) {
          const auto order = [](const PointRecord* p) {
            return std::pair(integer_parameter(*p, "run.batch", 1), integer_parameter(*p, "run.context", 0));
          };
          return order(a) < order(b);
        });
    sorted.push_back(std::move(device.points));
  }
  return sorted;
}

}  // namespace nsa
