#include "app/run.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <optional>
#include <regex>

#include "app/build_info.hpp"
#include "app/progress.hpp"
#include "app/stop_request.hpp"
#include "app/threads.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "nsa/config/lengths.hpp"
#include "nsa/experiment/dry_run.hpp"
#include "nsa/experiment/experiment.hpp"
#include "nsa/experiment/plan.hpp"
#include "nsa/experiment/resume.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/report/report.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/result_file.hpp"
#include "nsa/results/temporary_file.hpp"
#include "nsa/routing/router.hpp"
#include "nsa/tasks/task.hpp"

namespace nsa {
namespace {

std::string read_text(const std::string& path, const char* wanted = "a TOML input") {
  constexpr std::size_t most = std::size_t{16} << 20;  // bytes; a device such as /dev/zero has no end
  std::ifstream file(path, std::ios::binary);
  const auto refuse = [&](const std::string& why) {
    throw UserError("cannot read " + path + " (" + why + "); give the path of " + wanted);
  };
  if (!file.is_open()) refuse(std::strerror(errno));
  if (status_of(path).kind == PathStatus::folder) refuse("not a file");
  std::string text;
  for (std::vector<char> part(std::size_t{1} << 16); file && text.size() <= most;) {
    file.read(part.data(), static_cast<std::streamsize>(part.size()));
    text.append(part.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) refuse(std::strerror(errno));
  if (text.size() > most) refuse("larger than 16 MiB");
  return text;
}

/// What batch.file holds; "" without one.
std::string trace_text(const Config& config) {
  const std::string& path = config.batch.file;
  if (path.empty()) return "";
  if (const std::string why = why_no_file(path); !why.empty())
    file_error("cannot read batch.file = " + path, why, "give a trace of requests, CSV or JSON");
  return read_text(path, "a trace of requests, CSV or JSON");
}

/// The input with the options in place, not yet checked.
Config parse_input(const std::string& text, const RunOptions& options) {
  Config config = parse_config(text, options.input, options.overrides);
  if (!options.output.empty()) config.output.file = options.output;
  if (!options.csv.empty()) config.output.csv = options.csv;
  if (options.record_selection) config.output.selection = true;
  if (options.min_interval) config.run.min_interval = *options.min_interval;
  if (options.deadline) config.run.deadline = *options.deadline;
  return config;
}

/// Checks the config and reads its requests from `trace`, which batch.file holds.
void complete(Config& config, const std::string& trace) {
  validate(config);
  if (!config.batch.file.empty()) config.batch.requests = parse_trace(trace, config.batch.file);
}

/// Throws unless the files that this run writes are others than those that it reads, and than one another.
void check_files(const Config& config, const RunOptions& options) {
  check_written_files({{NamedFile::read, options.input, "the input", ""},
                       {NamedFile::read, config.input_file, "[input] file", ""},
                       {NamedFile::read, config.input_selection, "[input] selection", ""},
                       {NamedFile::read, config.batch.file, "[batch] file", ""},
                       {NamedFile::result, config.output.file, "the result file", "--output"},
                       {NamedFile::text, config.output.csv, "the CSV", "--csv"},
                       {NamedFile::text, options.json, "the JSON", "--json"}});
}

/// What the result file holds from an earlier run.
struct Earlier {
  bool file = false, complete = false;
  std::vector<PointRecord> points;  ///< finished
};

/// Reads the file to resume, if it exists, checks that this run may continue it, and makes `run` its continuation.
Earlier resume_from(const Config& config, const Session& session, const std::vector<Point>& points, RunRecord& run) {
  const std::string& path = config.output.file;
  if (status_of(path).kind == PathStatus::missing) return {};
  ResultFile before = read_result(path);
  check_same_run(path, before, run, factorise(config, session.world.size()));
  std::vector<std::string> fingerprints;
  for (const Point& point : points) fingerprints.push_back(fingerprint(session, config, point));
  run = resumed_record(before.run, std::move(run));
  const bool complete = before.run.status == "complete";
  std::vector<PointRecord> finished = finished_points(path, std::move(before), fingerprints);
  return {true, complete && finished.size() == points.size(), std::move(finished)};
}

/// Prints and writes the results on rank 0, while the points run and at the end.
class Output {
 public:
  Output(const Config& config, const RunOptions& options, const RunRecord& run, const std::vector<std::string>& notes,
         int ranks, Earlier earlier)
      : config_(config), json_(options.json) {
    if (!earlier.complete)
      writer_.emplace(config.output.file, run, planned_result_bytes(config, ranks), options.resume);
    columns_.prefix = config.run.prefix > 0;
    for (const Point& point : sweep(config)) columns_.batch |= point.batch != 1;
    for (const std::int64_t tokens : config.run.query_tokens) columns_.query_tokens |= tokens != 1;
    columns_.chunk = config.kind == TaskKind::mixed;
    columns_.rate = columns_.chunk || ((columns_.batch || columns_.query_tokens) && config.kind == TaskKind::decode);
    for (const std::int32_t branch : config.run.force_branch) columns_.forced |= branch >= 0;
    columns_.nsa_vibe = !config.output.csv.empty();
    for (const std::string& note : notes) std::cout << "note: " << note << "\n";
    if (earlier.file)
      std::cout << config.output.file << (earlier.complete ? " is complete: " : ": going on after ")
                << earlier.points.size() << " points\n";
    for (PointRecord& point : earlier.points) show(std::move(point));
  }

  const std::vector<PointRecord>& points() const { return points_; }

  void progress(std::size_t point, std::size_t points, double done, double total, const std::string& what) {
    progress_.update(point, points, done, total, what);
  }

  void add(PointRecord record) {
    writer_->seal(record);
    record.tensors.clear();  // they may be large, and the file holds them
    show(std::move(record));
  }

  /// Removes what the ranks of an earlier, ended run dumped: this one is complete.
  void remove_operation_dumps() const {
    const std::string& path = config_.output.file;
    const std::string folder = parent_of(path), own = path.substr(path.rfind('/') + 1);
    const std::regex dump(R"(\.rank\d+\.ops\.json)");
    for (const std::string& name : names_in(folder))
      if (name.starts_with(own) && std::regex_match(name.substr(own.size()), dump))
        unlink((folder + "/" + name).c_str());
  }

  void finish(const RunRecord& run, const std::string& interrupted) {
    if (writer_) writer_->finish(run);
    print_notes(std::cout, points_);
    write_text_file(config_.output.csv, "--csv", to_csv(points_));
    const bool json = !json_.empty() && interrupted.empty();
    if (json) write_text_file(json_, "--json", to_json(run, config_.output.file, points_));
    if (!points_.empty())
      std::cout << "result: " << config_.output.file << (config_.output.csv.empty() ? "" : ", " + config_.output.csv)
                << (json ? ", " + json_ : "") << "\n";
    print_metrics(std::cout, points_, interrupted);
    std::cout.flush();
  }

 private:
  void show(PointRecord record) {
    progress_.clear();
    print_point(std::cout, columns_, record, points_.empty());
    std::cout.flush();
    points_.push_back(std::move(record));
  }

  const Config& config_;
  std::string json_;
  std::optional<ResultWriter> writer_;  ///< none if the file is complete
  TableColumns columns_;
  ProgressLine progress_;
  std::vector<PointRecord> points_;
};

/// Runs the points whose entry in `finished` is not 'x'. Returns false if the run was asked to stop before the end.
bool run_points(const Session& session, const Config& config, const std::vector<Point>& points,
                const std::string& finished, Output* output) {
  for (std::size_t i = 0; i < points.size(); ++i) {
    if (finished[i] == 'x') continue;
    if (session.stop->check()) return false;
    const auto progress = [&](double done, double total, const std::string& what) {
      if (output) output->progress(i, points.size(), done, total, what);
    };
    PointRecord record;
    try {
      record = run_point(session, config, points[i], static_cast<std::int64_t>(i), progress);
    } catch (const Interrupted&) {
      return false;
    }
    const bool cut_short = record.stop_reason == "interrupted";
    agreed(session.world, [&] {
      if (output) output->add(std::move(record));
    });
    if (cut_short) return false;
  }
  return true;
}

/// The input, on every rank.
struct Input {
  std::string text;
  Config config;
  double max_time = no_limit;  ///< seconds
};

/// Throws AgreedError unless all ranks were started with the same words: mpirun -n 1 nsa run a.toml : -n 1 nsa run
/// b.toml.
void check_words(const ControlComm& world, const std::string& words) {
  const std::string first = world.broadcast(words);
  agreed(world, [&] {
    if (words != first)
      throw UserError(
          fmt::format("rank {} was started with {}, and rank 0 with {}; start all ranks with one command line",
                      world.rank(), words, first));
  });
}

/// Reads the input on rank 0 and validates it on every rank. Collective.
Input read_input(const ControlComm& world, const RunOptions& options) {
  Input input;
  agreed(world, [&] {
    if (world.rank() == 0) input.text = read_text(options.input);
  });
  input.text = world.broadcast(input.text);
  std::string trace;
  agreed(world, [&] {
    input.config = parse_input(input.text, options);
    if (world.rank() == 0) trace = trace_text(input.config);
  });
  trace = world.broadcast(trace);
  const std::string routes = world.broadcast(route_environment_text());
  agreed(world, [&] {
    complete(input.config, trace);
    sweep(input.config);  // throws where the trace has too few requests
    route_environment();
    if (route_environment_text() != routes)
      throw UserError("this rank's environment holds " + route_environment_text() + "(rank 0's: " + routes +
                      "); set the same on all ranks");
    input.max_time = parse_duration(options.max_time);
    if (world.rank() == 0) check_files(input.config, options);  // it alone reads and writes them
    factorise(input.config, world.size());                      // before anything is opened
  });
  return input;
}

/// Opens the result file on rank 0 and checks the other files. Sets `finished` to 'x' for each point that the file
/// holds, on every rank. Returns null on the other ranks. Collective.
std::unique_ptr<Output> open_output(const Session& session, const Config& config, const RunOptions& options,
                                    const std::vector<Point>& points, const Cores& cores, RunRecord& run,
                                    std::string& finished) {
  std::unique_ptr<Output> output;
  finished.assign(points.size(), '-');
  agreed(session.world, [&] {
    if (session.world.rank() != 0) return;
    if (!options.json.empty()) unlink(follow_links(options.json).c_str());  // it describes an earlier run
    Earlier earlier;
    if (options.resume) earlier = resume_from(config, session, points, run);
    for (const PointRecord& point : earlier.points) finished[static_cast<std::size_t>(point.index)] = 'x';
    std::vector<std::string> notes = launch_notes(run, cores);
    if (std::string idle = idle_ranks(config, session.world.size()); !idle.empty()) notes.push_back(std::move(idle));
    output = std::make_unique<Output>(config, options, run, notes, session.world.size(), std::move(earlier));
  });
  finished = session.world.broadcast(finished);
  return output;
}

/// Ends the output on rank 0. `complete`: all points were run. Returns the exit code. Collective.
ExitCode close_output(const ControlComm& world, bool complete, std::size_t points, RunRecord& run, Output* output) {
  std::int64_t invalid = 0;
  agreed(world, [&] {
    if (!output) return;
    std::string interrupted;
    if (!complete) {
      const auto is_finished = [](const PointRecord& point) { return point.stop_reason != "interrupted"; };
      run.status = "interrupted";
      interrupted = fmt::format("{} of {} points are finished; go on with --resume",
                                std::ranges::count_if(output->points(), is_finished), points);
    }
    output->finish(run, interrupted);
    for (const PointRecord& point : output->points()) invalid += !point.valid;
  });
  if (!complete) return ExitCode::interrupted;
  if (output) output->remove_operation_dumps();
  return world.max(invalid) > 0 ? ExitCode::invalid_result : ExitCode::ok;
}

}  // namespace

ExitCode run(const ControlComm& world, Watchdog& watchdog, const RunOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  install_stop_signal_handlers();
  fault::at("run.start");
  check_launch(world);
  check_words(world, options.words);
  const Input input = read_input(world, options);
  const Config& config = input.config;
  const Cores cores = cores_of_rank(world);
  agreed(world, [&] { set_default_host_threads(cores); });
  watchdog.configure(config.run.deadline, config.output.file);

  Session session =
      open_session(config, world, [start, limit = input.max_time] { return stop_requested(start, limit); });
  session.strict = options.strict;
  if (const int index = session.backend.device->info().index; index >= 0)
    watchdog.set_device("GPU " + std::to_string(index));
  RunRecord run = describe_run(session, config, input.text, options.argv);
  describe_threads(world, cores, run);
  run.git_commit = build::git_commit;
  run.compiler = build::compiler;

  const std::vector<Point> points = sweep(config);
  std::string finished;
  const std::unique_ptr<Output> output = open_output(session, config, options, points, cores, run, finished);
  const bool complete = run_points(session, config, points, finished, output.get());
  close_run(session, run);
  return close_output(world, complete, points.size(), run, output.get());
}

void dry_run(const RunOptions& options, int ranks) {
  const std::string text = read_text(options.input);
  Config config = parse_input(text, options);
  complete(config, trace_text(config));
  if (ranks == 0)
    ranks = static_cast<int>(std::max<std::int64_t>(1, config.parallel.heads) *
                             std::max<std::int64_t>(1, config.parallel.kv));
  check_written_files({{NamedFile::read, options.input, "the input", ""},
                       {NamedFile::read, config.input_file, "[input] file", ""},
                       {NamedFile::read, options.machine, "the machine file", ""},
                       {NamedFile::read, config.input_selection, "[input] selection", ""},
                       {NamedFile::read, config.batch.file, "[batch] file", ""},
                       {NamedFile::text, options.json, "the JSON", "--json"}});
  std::optional<Machine> machine;
  if (!options.machine.empty()) machine = parse_machine(read_text(options.machine, "a machine file"), options.machine);
  std::string json;
  print_plan(std::cout, config, ranks, machine ? &*machine : nullptr, options.json.empty() ? nullptr : &json);
  write_text_file(options.json, "--json", json);
}

}  // namespace nsa
