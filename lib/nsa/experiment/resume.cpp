#include "nsa/experiment/resume.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/schema.hpp"

namespace nsa {
namespace {

[[noreturn]] void refuse(const std::string& path, const std::vector<std::string>& differences) {
  throw UserError(fmt::format("cannot resume {} ({}); give what it was begun with, or start anew with another --output",
                              path, fmt::join(differences, "; ")));
}

std::string difference(const std::string& what, const std::string& there, const std::string& here) {
  const auto text = [](const std::string& value) { return value.empty() ? "none" : value; };
  return fmt::format("{}: {} there, {} here", what, text(there), text(here));
}

/// Both runs are of the same program, so that their keys are the same.
void compare_settings(const std::string& path, const RunRecord& before, const RunRecord& now,
                      std::vector<std::string>& list) {
  const std::vector<Setting> there = settings(parse_config(before.config, path, {})),
                             here = settings(parse_config(now.config, "this run", {}));
  for (std::size_t i = 0; i < here.size(); ++i) {
    if (decides_point(here[i].first) && there[i].second != here[i].second)
      list.push_back(difference(here[i].first, there[i].second, here[i].second));
  }
}

/// Names the first rank that differs. Host names and GPU UUIDs may differ: another host of the same kind is accepted.
void compare_machines(const RunRecord& before, const RunRecord& now, std::vector<std::string>& list) {
  for (const auto& entry : system_texts) {
    if (entry.field == &RankSystem::host || entry.field == &RankSystem::uuid) continue;
    for (std::size_t rank = 0; rank < now.system.size(); ++rank) {
      const std::string &there = before.system[rank].*entry.field, &here = now.system[rank].*entry.field;
      if (there == here) continue;
      list.push_back(difference(fmt::format("{} of rank {}", entry.name, rank), there, here));
      break;
    }
  }
  for (std::size_t rank = 0; now.backend == "host" && rank < now.system.size(); ++rank) {
    const std::int64_t there = before.system[rank].threads, here = now.system[rank].threads;
    if (there == 0 || there == here) continue;  // 0: a file from before schema 1.2
    list.push_back(difference(fmt::format("threads of rank {}", rank), std::to_string(there), std::to_string(here)));
    break;
  }
}

}  // namespace

bool decides_point(const std::string& key) {
  for (const char* name : {"input.file", "input.selection", "output.file", "output.csv", "run.backend", "run.deadline",
                           "parallel.heads", "parallel.kv"}) {
    if (key == name) return false;
  }
  return true;
}

void check_same_run(const std::string& path, const ResultFile& before, const RunRecord& now,
                    std::pair<std::int64_t, std::int64_t> shards) {
  std::vector<std::string> list;
  const auto compare = [&](const char* what, const std::string& there, const std::string& here) {
    if (there != here) list.push_back(difference(what, there, here));
  };
  compare("commit", before.run.git_commit, now.git_commit);
  compare("compiler", before.run.compiler, now.compiler);
  if (list.empty() && before.run.config.empty()) list.push_back("the file does not hold its configuration");
  if (list.empty()) compare_settings(path, before.run, now, list);
  compare("content of [input] file (SHA-256)", before.run.input_file_sha256, now.input_file_sha256);
  compare("content of [input] selection (SHA-256)", before.run.input_selection_sha256, now.input_selection_sha256);
  compare("backend", before.run.backend, now.backend);
  compare("ranks", std::to_string(before.run.system.size()), std::to_string(now.system.size()));
  if (before.run.system.size() == now.system.size()) {
    compare_machines(before.run, now, list);
    for (const PointRecord& point : before.points) {
      if (std::pair(point.heads, point.kv) == shards) continue;
      list.push_back(difference("heads x kv", fmt::format("{} x {}", point.heads, point.kv),
                                fmt::format("{} x {}", shards.first, shards.second)));
      break;
    }
  }
  if (!list.empty()) refuse(path, list);
}

std::vector<PointRecord> finished_points(const std::string& path, ResultFile before,
                                         const std::vector<std::string>& fingerprints) {
  std::vector<PointRecord> finished;
  for (PointRecord& point : before.points) {
    const auto index = static_cast<std::size_t>(point.index);
    if (index >= fingerprints.size() || point.fingerprint != fingerprints[index])
      refuse(path, {fmt::format("point {} has another fingerprint", point.index)});
    if (point.stop_reason != "interrupted") finished.push_back(std::move(point));
  }
  return finished;
}

RunRecord resumed_record(const RunRecord& before, RunRecord now) {
  RunRecord run = std::move(now);
  run.run_uuid = before.run_uuid;
  run.start = before.start;
  run.argv = before.argv;
  run.input_toml = before.input_toml;
  run.input_sha256 = before.input_sha256;
  run.config = before.config;
  run.resumed = before.resumed + 1;
  for (std::size_t rank = 0; rank < run.system.size(); ++rank) {
    const std::string& earlier = before.system[rank].host;
    std::string& host = run.system[rank].host;
    const std::string last = earlier.substr(earlier.rfind(',') + 1);  // npos + 1 = 0
    host = last == host ? earlier : earlier + "," + host;
  }
  return run;
}

}  // namespace nsa
