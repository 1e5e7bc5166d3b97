#include "app/report.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>

#include <algorithm>

#include "app/threads.hpp"
#include "nsa/report/report.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {

namespace {

void print_run(std::ostream& out, const std::string& path, const RunRecord& run) {
  out << run_line(path, run) << "\n";
  if (const std::string note = oversubscribed(run); !note.empty()) fmt::print(out, "note: {}\n", note);
}

}  // namespace

ExitCode report_results(std::ostream& out, const std::vector<std::string>& paths) {
  bool valid = true;
  for (const std::string& path : paths) {
    const ResultFile file = read_result(path);
    const bool whole = file.run.status == "complete";
    if (&path != &paths.front()) out << "\n";
    print_run(out, path, file.run);
    print_points(out, file.points,
                 whole ? "" : fmt::format("{} points are finished; status {}", file.points.size(), file.run.status));
    valid &= std::ranges::all_of(file.points, &PointRecord::valid);
  }
  return valid ? ExitCode::ok : ExitCode::invalid_result;
}

}  // namespace nsa
