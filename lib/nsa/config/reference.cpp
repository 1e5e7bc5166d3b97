// Prints docs/INPUT.md from the list of keys and the list of environment variables.

#include "nsa/config/reference.hpp"

#include <fmt/format.h>
#include <fmt/ostream.h>
#include <unistd.h>

#include <algorithm>

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/keys.hpp"
#include "nsa/config/spelling.hpp"

namespace nsa {
namespace {

std::string type_of(const bool&, AnyValue) { return "boolean"; }
std::string type_of(const std::string&, AnyValue) { return "string"; }
std::string type_of(const double&, RealRange) { return "number"; }
std::string type_of(const double&, AllOrShare) { return "number"; }
std::string type_of(const std::int64_t&, Range) { return "integer"; }
std::string type_of(const std::int64_t&, AutoOr) { return "integer"; }
std::string type_of(const std::int64_t&, EachSequence) { return "integer"; }
template <class T, std::size_t n>
std::string type_of(const T&, const Choice<T> (&)[n]) {
  return "string";
}
template <class T, class Spec>
std::string type_of(const std::vector<T>&, const Spec& spec) {
  return "list of " + type_of(T{}, spec) + "s";
}

std::string values_of(AnyValue) { return ""; }
std::string values_of(Range range) { return fmt::format("{} to {}", range.least, range.most); }
std::string values_of(EachSequence spec) { return values_of(spec.range); }
std::string values_of(RealRange range) { return fmt::format("{} to {}", range.least, range.most); }
std::string values_of(AllOrShare) { return "`\"all\"`, 0 to 1"; }
std::string values_of(AutoOr spec) {
  if (spec.range.least < 0) return fmt::format("`\"auto\"`, {}, 1 to {}", spec.range.least, spec.range.most);
  return "`\"auto\"`, " + values_of(spec.range);
}
template <class T, std::size_t n>
std::string values_of(const Choice<T> (&choices)[n]) {
  std::string list;
  for (const Choice<T>& choice : choices) list += fmt::format("{}`\"{}\"`", list.empty() ? "" : ", ", choice.name);
  return list;
}

struct Variable {
  const char *name, *values, *meaning;
};

constexpr Variable program_variables[] = {
    {"NSA_ROUTE_CMP", "a value of `route.cmp`", "Implementation of compressed attention; overrides the input."},
    {"NSA_ROUTE_SEL", "a value of `route.sel`", "Implementation of selected attention; overrides the input."},
    {"NSA_ROUTE_WIN", "a value of `route.win`", "Implementation of window attention; overrides the input."},
    {"NSA_FORCE", "0, 1",
     "1: runs a requested implementation that a guard forbids on this device ([ROUTES.md](ROUTES.md))."},
    {"NSA_EXCHANGE", "`nccl`", "GPUs of one host exchange through NCCL only, not through each other's memory."},
    {"NSA_SHARE_GPU", "1", "Allows more ranks than GPUs: ranks take turns on a GPU, and the times are not meaningful."},
    {"NSA_FAULT", "`site:key=value:action`",
     "Injects a fault; only in builds with `NSA_FAULTS=ON`, for tests ([CONTRIBUTING.md](../CONTRIBUTING.md))."},
    {"OMP_NUM_THREADS", "threads", "Threads of each rank on the host; default: the rank's share of its cores."},
    {"OMPI_COMM_WORLD_SIZE", "processes",
     "Set by launchers, as are PMI_SIZE and SLURM_STEP_NUM_TASKS: a run ends where it is more than MPI's ranks, which "
     "are one."},
    {"NCCL_P2P_DISABLE", "1", "As `NSA_EXCHANGE=nccl`; NCCL does not use peer access either."},
};

constexpr Variable library_variables[] = {
    {"CUDA_VISIBLE_DEVICES", "GPU numbers", "CUDA: the GPUs that ranks use."},
    {"HDF5_USE_FILE_LOCKING", "`FALSE`", "HDF5: opens result files on file systems without locks."},
    {"OMP_THREAD_LIMIT", "threads", "OpenMP: most threads of a rank; nsa takes no more."},
    {"OMP_WAIT_POLICY", "`passive`", "OpenMP: waiting threads sleep; useful where ranks share cores."},
    {"TMPDIR", "folder", "MPI: where it has its session folders, `/tmp` by default; nothing stays after a run."},
    {"NCCL_HOSTID", "text", "NCCL: nsa sets it with `NSA_SHARE_GPU=1` unless it is set."},
};

constexpr Variable tool_variables[] = {
    {"NSA", "path",
     "The program that job scripts, `scripts/sweep.py`, `contrib/jube` and `nsa-analysis` run. "
     "[jobscripts/slurm](../jobscripts/slurm/README.md) has the other variables of job scripts."},
    {"NSA_INPUT", "path", "The input that `contrib/jube` runs."},
    {"NSA_LAUNCH", "command", "The launcher of `contrib/jube`."},
    {"TOMLPLUSPLUS_INCLUDE_DIR", "path", "`scripts/build.sh` finds toml++ there."},
    {"NLOHMANN_JSON_INCLUDE_DIR", "path", "`scripts/build.sh` finds nlohmann-json there."},
    {"NSA_NO_APT", "1", "`scripts/setup.sh`, and so `quickstart.sh`, installs nothing: CMake has to find everything."},
    {"NSA_WITHOUT_BLAS", "1", "`scripts/setup.sh` does not install OpenBLAS."},
    {"NSA_FAULTS_BINARY", "path", "The program with faults that `scripts/test/test_gpu_faults.sh` runs."},
    {"NSA_FAULTS_JOB", "path", "Set by `scripts/test/test_gpu_faults.sh` to mark its processes."},
    {"NSA_PRIVATE_SLURM", "path", "Set by `tests/slurm` to mark its processes."},
    {"NSA_ROOT", "path", "Set by the module file: where nsa is installed."},
    {"NSA_TEST_BACKEND", "`cuda`", "Tests of parity, MPI and fallbacks run on GPUs."},
    {"NSA_TEST_EXCHANGES", "count", "Chained exchanges of `mpi_tests \"[many]\"`, which then runs for longer."},
    {"NSA_DEBIAN_MIRROR", "URL", "Where `tests/roots` installs bare Debian roots from; apt's own source by default."},
    {"NSA_EXPECT_EXCHANGE", "`NCCL`, `peer memory`", "Tests fail where GPUs exchange through anything else."},
    {"NSA_RUNS", "count", "Repetitions of the quick start in `tests/app/test_many_runs.py`."},
    {"NSA_ROWS", "1", "`bench_prefill` runs selected attention row by row."},
    {"NSA_BINARY", "path", "Set by CTest: the program under test."},
    {"NSA_MPIEXEC", "path", "Set by CTest: the launcher."},
    {"NSA_INPUTS", "path", "Set by CTest: the folder of inputs."},
    {"NSA_TEST_ALL", "1", "Set by `./test.sh --all`: tests repeat more often."},
    {"NSA_WRITE_SAMPLE", "path", "Set by CTest: the program that writes a sample result file."},
    {"NSA_FILE_FAULTS", "path", "Set by CTest: the library that makes file operations fail."},
    {"NSA_HANGUP_TAKEN", "path", "Set by CTest: a library that takes SIGHUP."},
    {"NSA_CLOCK_BACK", "path", "Set by CTest: the library that sets the clock of the day back."},
};

/// A variable and the values that nsa knows beside the empty one.
struct KnownValues {
  const char *name, *values[2];
};
constexpr KnownValues known_values[] = {
    {"NSA_FORCE", {"0", "1"}}, {"NSA_EXCHANGE", {"nccl", "nccl"}}, {"NSA_SHARE_GPU", {"0", "1"}}};

void check_value(const std::string& name, const std::string& value) {
  for (const KnownValues& known : known_values)
    if (name == known.name && !value.empty() && value != known.values[0] && value != known.values[1])
      throw UserError(fmt::format(
          "{}={} in the environment (it is {}{}); correct or unset it", name, value, known.values[0],
          std::string_view(known.values[0]) == known.values[1] ? "" : fmt::format(" or {}", known.values[1])));
}

/// Throws where the name is near that of a variable of the program: others may have names that begin with NSA_ too.
void check_name(const std::string& name) {
  for (const Variable& variable : tool_variables)
    if (name == variable.name) return;
  const char* nearest = program_variables[0].name;
  for (const Variable& variable : program_variables)
    if (edit_distance(name, variable.name) < edit_distance(name, nearest)) nearest = variable.name;
  const std::size_t distance = edit_distance(name, nearest);
  if (distance > 0 && (distance <= 2 || name.find("_ROUTE") != std::string::npos))
    throw UserError(
        fmt::format("{} in the environment (nsa knows no such variable); did you mean {}? `nsa info --keys` "
                    "lists them all",
                    name, nearest));
}

template <std::size_t n>
void print_variables(std::ostream& out, const char* title, const Variable (&variables)[n]) {
  fmt::print(out, "\n### {}\n\n| variable | values | meaning |\n|---|---|---|\n", title);
  for (const Variable& variable : variables)
    fmt::print(out, "| `{}` | {} | {} |\n", variable.name, variable.values, variable.meaning);
}

/// The default in TOML; task.kind has none.
std::string default_of(const Setting& setting) {
  return setting.first == "task.kind" ? "required" : "`" + setting.second + "`";
}

void print_keys(std::ostream& out) {
  const Config config;
  const std::vector<Setting> defaults = settings(config);
  std::string section;
  std::size_t i = 0;
  visit_documented_keys(config, [&](const std::string& key, const auto& field, const auto& spec, const char* unit,
                                    const char* meaning) {
    const auto dot = key.find('.');
    if (key.substr(0, dot) != section) {
      section = key.substr(0, dot);
      fmt::print(out, "\n## [{}]\n\n| key | type | default | values | unit | meaning |\n|---|---|---|---|---|---|\n",
                 section);
    }
    fmt::print(out, "| `{}` | {} | {} | {} | {} | {} |\n", key.substr(dot + 1), type_of(field, spec),
               default_of(defaults[i++]), values_of(spec), unit, meaning);
  });
}

}  // namespace

void check_environment() {
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable, name = text.substr(0, text.find('='));
    if (!name.starts_with("NSA_")) continue;
    check_name(name);
    check_value(name, text.substr(std::min(text.size(), name.size() + 1)));
  }
}

void print_input_reference(std::ostream& out) {
  fmt::print(
      out,
      "# The input and the environment\n\n"
      "`nsa info --keys` prints this page; a test compares them.\n\n"
      "An input is one TOML file. Every key but `task.kind` has a default. `--set section.key=value` overrides a key; "
      "`--output`,\n`--csv` and `--deadline` override `output.file`, `output.csv` and `run.deadline`. A single value "
      "stands for a list of one. The\nkeys that are marked \"Swept\" span the points of a run: one point for each "
      "combination of their values.\n");
  print_keys(out);
  fmt::print(out, "\n## Environment variables\n");
  print_variables(out, "Read by nsa", program_variables);
  print_variables(out, "Read by libraries that nsa uses", library_variables);
  print_variables(out, "Read or set by scripts and tests", tool_variables);
}

}  // namespace nsa
