// The program: parses the command line, runs one command, prints its error, and exits with the code that all ranks
// agreed on.

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "app/against.hpp"
#include "app/build_info.hpp"
#include "app/command_line.hpp"
#include "app/gate.hpp"
#include "app/info.hpp"
#include "app/report.hpp"
#include "app/run.hpp"
#include "comm/watchdog/watchdog.hpp"
#include "kernels/diagnostics/fault_injection.hpp"
#include "kernels/diagnostics/out_of_memory.hpp"
#include "nsa/config/config.hpp"
#include "nsa/config/reference.hpp"
#include "nsa/report/diff.hpp"
#include "nsa/results/files.hpp"
#include "nsa/routing/router.hpp"

namespace {

constexpr auto bug = static_cast<nsa::ExitCode>(1), too_slow = static_cast<nsa::ExitCode>(1);
const double default_deadline = nsa::RunConfig().deadline;  // in effect until the input is read

constexpr const char* exit_codes =
    R"(Exit codes: 0 ok, 1 slower than --fail-above, 2 input or usage, 3 result invalid (diff: results differ),
4 communication, 5 device or memory, 6 file, 75 stopped on request (go on with --resume).)";

constexpr const char* run_examples = R"(Examples:
  nsa run inputs/prefill.toml                           one rank
  mpirun -n 4 nsa run inputs/quickstart.toml            four ranks, heads=2 x kv=2
  nsa run big.toml --dry-run --ranks 64                 the plan: owners and bytes
  nsa run big.toml --dry-run --ranks 8 --advise machines/h200.toml
  nsa run in.toml --set run.context=[4096,8192] --set run.backend=host --output a.h5
  nsa run inputs/rtx4090_v2.toml --csv decode.csv       the columns of nsa-vibe's benchmark
  nsa run big.toml --max-time 50m --resume              as much as fits; again: the rest
  nsa run in.toml --against old/nsa --min-interval 1%   is this build faster than another one? both run by turns
)";

constexpr const char* report_examples = R"(Example:
  nsa report a.h5                                       what the run that wrote it printed
)";

constexpr const char* diff_examples = R"(Example:
  nsa diff a.h5 b.h5 --fail-above 5%                    the same result? what got slower?
)";

constexpr const char* gate_examples = R"(Examples:
  nsa gate m4_decode.h5 m4_kernels.h5                   is a custom selection kernel worth it on that device?
  nsa gate results/*.h5 --context 8192 --adr m4.md      at one context; also as a decision record
)";

constexpr const char* info_examples = R"(Examples:
  nsa info                                              build, libraries and devices
  nsa info --routes                                     which implementation would run on which device, and why
  nsa info --keys                                       every key of an input
)";

struct CommandLine {
  nsa::RunOptions run;
  std::string completion;
  bool dry_run = false;
  bool routes = false, keys = false;
  int ranks = 0;
  double startup_deadline = nsa::Watchdog::default_startup_deadline;
  nsa::GateOptions gate;
  std::vector<std::string> reported;
  nsa::AgainstOptions against;
  nsa::DiffOptions diff;
};

/// An option that is given must say something: --csv "$UNSET" is a slip.
std::string not_empty(const std::string& text) { return text.empty() ? "is empty" : ""; }

const CLI::Validator named(not_empty, "", "");

/// A name of a file to write; "-", which is standard output to other programs, would make a file of that name.
const CLI::Validator written(
    [](const std::string& text) {
      return text == "-" ? "- is no name of a file; write ./- for a file that is called so" : not_empty(text);
    },
    "", "");

/// The number that the text is in decimal; empty for CLI11's other numbers: 010, which is 8, 0x10 and nan.
std::optional<double> decimal_number(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  const std::string_view digits = text.substr(text.starts_with('-') ? 1 : 0);
  if (digits.size() > 1 && digits[0] == '0' && std::isdigit(static_cast<unsigned char>(digits[1]))) return {};
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return {};
  return value;
}

const CLI::Validator decimal(
    [](const std::string& text) {
      return decimal_number(text) ? "" : text + " is no decimal number; write it like 64, without a leading 0";
    },
    "", "");

/// Takes "2%" for 0.02.
const CLI::Validator percent(
    [](std::string& text) {
      const bool hundredths = text.ends_with('%');
      const std::optional<double> number = decimal_number(std::string_view(text).substr(0, text.size() - hundredths));
      if (!number || *number < 0) return text + " is no share; write it like 5% or 0.05";
      if (hundredths) text = std::to_string(*number / 100);
      return std::string();
    },
    "SHARE");

void describe_run(CLI::App& app, CommandLine& line) {
  CLI::App* run = app.add_subcommand("run", "Run an input, as decode or prefill, on all ranks of the launch");
  run->add_option("INPUT", line.run.input, "TOML input")->check(named)->required();
  run->add_option("--set", line.run.overrides, "section.key=value, overrides the input; may be repeated")
      ->allow_extra_args(false);
  run->add_option("--output", line.run.output, "result file, HDF5 (output.file)")->check(written);
  run->add_option("--csv", line.run.csv, "also write the columns of nsa-vibe's benchmark (output.csv)")->check(written);
  run->add_option("--json", line.run.json,
                  "also write the figures of the FOM lines as JSON, last of all; with --dry-run the plan")
      ->check(written);
  run->add_flag("--record-selection", line.run.record_selection,
                "the result file also holds the selected blocks of each query, for [input] selection");
  run->add_flag("--strict", line.run.strict, "an implementation that falls back to sdpa is an error (exit 3)");
  run->add_option(
         "--deadline", line.run.deadline,
         "seconds that a rank may wait for others or for its device before the job ends; 0: any (run.deadline)")
      ->check(decimal)
      ->check(CLI::Range(0.0, 86400.0));
  run->add_option("--startup-deadline", line.startup_deadline,
                  "the same until all ranks have started and connected; 0: as --deadline; default 60")
      ->check(decimal)
      ->check(CLI::Range(0.0, 86400.0));
  CLI::Option* dry = run->add_flag("--dry-run", line.dry_run, "print owners, bytes and exchanges; run nothing");
  run->add_option("--ranks", line.ranks, "ranks to plan for")
      ->needs(dry)
      ->check(decimal)
      ->check(CLI::Range(1, 1 << 20));
  run->add_option("--advise", line.run.machine, "rank the layouts of these ranks on a machine, machines/h200.toml")
      ->needs(dry)
      ->check(named);
  run->add_flag("--resume", line.run.resume, "go on with the result file of an interrupted run: its points are kept");
  run->add_option("--max-time", line.run.max_time,
                  "stop after 90s, 10m, 1.5h, [[D-]HH:]MM:SS or D-HH, as SIGUSR1 and SIGTERM do")
      ->check(named);
  run->add_option("--min-interval", line.run.min_interval,
                  "repeat each mode until the median's 95% interval is that narrow, 2% (run.min_interval)")
      ->transform(percent);
  CLI::Option* against = run->add_option("--against", line.against.binary,
                                         "compare with another build of nsa, both by turns on this input")
                             ->check(named);
  run->add_option("--pairs", line.against.pairs, "runs of each program")
      ->needs(against)
      ->check(decimal)
      ->check(CLI::Range(1, 1000));
  run->add_option("--launcher", line.against.launcher, "what starts each run, \"mpirun -n 4\"")
      ->needs(against)
      ->check(named);
  run->add_option("--fail-above", line.against.fail_above, "exit code 1 where this program is SLOWER by more, 5%")
      ->needs(against)
      ->transform(percent);
  for (const char* other : {"--csv", "--json", "--dry-run", "--resume", "--max-time"})
    against->excludes(run->get_option(other));
  run->footer(std::string(run_examples) + "\n" + exit_codes);
}

void describe_gate(CLI::App& app, CommandLine& line) {
  CLI::App* gate = app.add_subcommand("gate", "Is a custom selection kernel worth it on this device? Needs no GPU");
  gate->add_option("FILES", line.gate.files, "result files, and CSVs of nsa-vibe's benchmark to audit")
      ->check(named)
      ->required();
  gate->add_option("--context", line.gate.contexts, "only these contexts count")
      ->delimiter(',')
      ->check(decimal)
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30));
  gate->add_option("--adr", line.gate.adr, "also write the verdict as a decision record, Markdown")->check(written);
  gate->add_flag("--json", line.gate.json, "print JSON");
  gate->add_flag("--exit-verdict", line.gate.exit_verdict,
                 "exit code 0 PROCEED, 10 STAY, 11 INCONCLUSIVE, 12 NOT EVIDENCE; the largest of several");
  gate->footer(gate_examples);
}

void describe_report(CLI::App& app, CommandLine& line) {
  CLI::App* report =
      app.add_subcommand("report", "Print result files as `run` printed them. Needs no GPU and no launch");
  report->add_option("FILES", line.reported, "result files")->check(named)->required();
  report->footer(report_examples);
}

void describe_diff(CLI::App& app, CommandLine& line) {
  CLI::App* diff = app.add_subcommand("diff", "Compare two result files: the same result? which stage got slower?");
  diff->add_option("A", line.diff.a, "result file")->check(named)->required();
  diff->add_option("B", line.diff.b, "result file")->check(named)->required();
  diff->add_option("--csv", line.diff.csv, "also write a line for each time that is compared")->check(written);
  diff->add_option("--fail-above", line.diff.fail_above, "exit code 1 where B is SLOWER by more than this, 5%")
      ->transform(percent);
  diff->footer(diff_examples);
}

void describe_info(CLI::App& app, CommandLine& line) {
  CLI::App* info = app.add_subcommand("info", "What this build is made of and the devices it sees");
  info->add_flag("--routes", line.routes, "which implementations would run here instead, and why; needs no GPU");
  info->add_flag("--keys", line.keys, "the keys of an input and the environment variables instead (docs/INPUT.md)");
  info->footer(info_examples);
}

void describe(CLI::App& app, CommandLine& line) {
  app.set_version_flag("--version",
                       std::string("nsa ") + nsa::build::version + " (commit " + nsa::build::git_commit + ")");
  app.require_subcommand(1);
  app.add_option("--completion", line.completion, "print a completion script: source <(nsa --completion bash)")
      ->check(CLI::IsMember({"bash"}));
  app.footer(std::string(run_examples) + "More: nsa COMMAND --help\n\n" + exit_codes);
  describe_run(app, line);
  describe_gate(app, line);
  describe_report(app, line);
  describe_diff(app, line);
  describe_info(app, line);
}

struct Failure {
  std::string text;
  nsa::ExitCode code;
};

/// What the exception says that is being handled.
Failure current_failure() {
  try {
    throw;
  } catch (const nsa::UserError& error) {
    return {error.what(), error.code()};
  } catch (const std::bad_alloc&) {
    return {nsa::out_of_memory(), nsa::ExitCode::device};
  } catch (const std::system_error& error) {  // such as a thread that cannot be started
    return {std::string("the system refused what the program needs (") + error.what() +
                "); raise the limits of the process (ulimit -u, -n, -v)",
            nsa::ExitCode::device};
  } catch (const std::exception& error) {
    return {error.what(), bug};
  }
}

int print_error(const Failure& failure) {
  // One write: what the launcher prints at the same time does not come between.
  std::cerr << (failure.code == bug ? "nsa: internal error: " + failure.text + "; please report it\n"
                                    : "nsa: error: " + failure.text + "\n");
  return static_cast<int>(failure.code);
}

/// Runs a command that needs one process.
template <class Command>
int run_local(Command&& command) {
  try {
    return static_cast<int>(command());
  } catch (...) {
    return print_error(current_failure());
  }
}

/// Runs a command on all ranks. An AgreedError is thrown on every rank, and rank 0 prints it. Any other error may have
/// occurred on some ranks only while the others wait for them, so it aborts the job.
template <class Command>
int run_collective(int& argc, char**& argv, double deadline, double startup_deadline, Command&& command) {
  nsa::Watchdog watchdog(deadline, startup_deadline);  // watches MPI_Init and MPI_Finalize too
  nsa::MpiSession session(argc, argv);
  const nsa::ControlComm world = nsa::ControlComm::world();
  try {
    nsa::fault::at("session.start");
    const std::string warning = watchdog.join(world);
    if (!warning.empty()) std::cerr << "nsa: warning: " << warning << "\n";
    return static_cast<int>(command(world, watchdog));
  } catch (const nsa::AgreedError& error) {
    if (world.rank() == 0) print_error({error.what(), error.code()});
    return static_cast<int>(error.code());
  } catch (...) {
    const Failure failure = current_failure();
    // The error of a library in a collective seldom names the rank at fault. The watchdogs compare the operation logs.
    if (failure.code == nsa::ExitCode::communication) watchdog.report_failure(failure.text);
    print_error(failure);
    watchdog.notify_abort(failure.code);
    nsa::MpiSession::abort(failure.code);
  }
  return static_cast<int>(bug);  // not reached
}

/// Opens the null device in place of a standard stream that is closed: the next file would take its number, and get
/// what is printed.
void open_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(stream, F_GETFD) < 0) open("/dev/null", O_RDWR);  // takes the lowest free number: this one
}

/// The exit code of a command that ended with `code`, after what it printed has been written.
int close_standard_output(int code) {
  if (std::cout.flush() && std::fflush(stdout) == 0) return code;
  const bool again = write(STDOUT_FILENO, "\n", 1) == 1;  // the stream does not say why: another attempt does
  const std::string why = again ? "a write failed" : std::strerror(errno);
  print_error(
      {"cannot write the standard output (" + why + "); results that were stored are whole", nsa::ExitCode::file});
  return code != 0 ? code : static_cast<int>(nsa::ExitCode::file);
}

std::string joined(int argc, char** argv) {
  std::string text;
  for (int i = 0; i < argc; ++i) text += std::string(i ? " " : "") + argv[i];
  return text;
}

int run_command(int argc, char** argv) {
  CLI::App app{"Native Sparse Attention on many ranks: run, measure, decide", "nsa"};
  CommandLine line;
  describe(app, line);
  line.run.argv = joined(argc, argv);
  const std::vector<std::string> words = nsa::command_line_words(argc, argv);
  line.run.words = fmt::format("{}", fmt::join(words, " "));
  if (line.run.words == "--completion bash" || line.run.words == "--completion=bash") {
    std::cout << nsa::bash_completion(app);
    return 0;
  }
  try {
    std::vector<std::string> reversed(words.rbegin(), words.rend());  // CLI11 takes them from the back
    app.parse(reversed);
  } catch (const CLI::Success& done) {  // --help, --version
    return app.exit(done);
  } catch (const CLI::ParseError& error) {
    // Every rank of a launch parses the same command line, so all of them get here, and rank 0 prints the error.
    return run_collective(argc, argv, default_deadline, line.startup_deadline,
                          [&](const nsa::ControlComm&, nsa::Watchdog&) -> nsa::ExitCode {
                            throw nsa::AgreedError(nsa::usage_error(app, error, argc, argv));
                          });
  }
  if (app.got_subcommand("gate")) return run_local([&] { return nsa::gate(line.gate); });
  if (app.got_subcommand("report")) return run_local([&] { return nsa::report_results(std::cout, line.reported); });
  if (app.got_subcommand("diff"))
    return run_local([&] {
      nsa::check_written_files({{nsa::NamedFile::read, line.diff.a, "A", ""},
                                {nsa::NamedFile::read, line.diff.b, "B", ""},
                                {nsa::NamedFile::text, line.diff.csv, "the CSV", "--csv"}});
      const nsa::DiffResult result = nsa::diff_results(std::cout, line.diff);
      if (!result.same) return nsa::ExitCode::invalid_result;
      return result.slower_than_allowed ? too_slow : nsa::ExitCode::ok;
    });
  if (app.got_subcommand("info"))
    return run_local([&] {
      if (line.routes)
        nsa::print_routes(std::cout);
      else if (line.keys)
        nsa::print_input_reference(std::cout);
      else
        nsa::print_info(std::cout);
      return nsa::ExitCode::ok;
    });
  if (line.dry_run)
    return run_local([&] {
      nsa::dry_run(line.run, line.ranks);
      return nsa::ExitCode::ok;
    });
  if (!line.against.binary.empty())
    return run_local([&] { return nsa::run_against(line.run, line.against, nsa::follow_links("/proc/self/exe")); });
  return run_collective(
      argc, argv, line.run.deadline.value_or(default_deadline), line.startup_deadline,
      [&](const nsa::ControlComm& world, nsa::Watchdog& watchdog) { return nsa::run(world, watchdog, line.run); });
}

}  // namespace

int main(int argc, char** argv) {
  open_standard_streams();
  std::signal(SIGXFSZ, SIG_IGN);  // a write beyond the limit fails as one on a full disk does
  // The command handles its own errors; those of starting the watchdog and MPI come here.
  return close_standard_output(run_local([&] { return static_cast<nsa::ExitCode>(run_command(argc, argv)); }));
}
