#include "app/against.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstring>
#include <iostream>
#include <sstream>
#include <vector>

#include "nsa/report/diff.hpp"
#include "nsa/results/files.hpp"

extern char** environ;

namespace nsa {
namespace {

/// The command of one run, without its output file.
std::vector<std::string> command_of(const std::string& binary, const RunOptions& run, const std::string& launcher) {
  std::vector<std::string> words;
  std::istringstream prefix(launcher);
  for (std::string word; prefix >> word;) words.push_back(word);
  words.insert(words.end(), {binary, "run", run.input});
  for (const std::string& text : run.overrides) words.insert(words.end(), {"--set", text});
  if (run.strict) words.push_back("--strict");
  if (run.record_selection) words.push_back("--record-selection");
  if (run.deadline) words.insert(words.end(), {"--deadline", std::to_string(*run.deadline)});
  if (run.min_interval) words.insert(words.end(), {"--min-interval", std::to_string(*run.min_interval)});
  return words;
}

/// Runs a command whose standard output nobody needs; its errors go where ours go.
void execute(const std::vector<std::string>& words) {
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error = posix_spawnp(&child, arguments[0], &files, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  if (error != 0)
    throw UserError(
        fmt::format("cannot start {} ({}); give the path of a program as --against", words[0], std::strerror(error)));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  throw UserError(fmt::format("{} ended with code {} (its message is above); both programs have to run the input",
                              fmt::join(words, " "), code),
                  // 1 is that of a launcher; here it says that this program is slower
                  WIFEXITED(status) && code != 1 ? static_cast<ExitCode>(code) : ExitCode::usage);
}

}  // namespace

ExitCode run_against(const RunOptions& run, const AgainstOptions& options, const std::string& self) {
  const std::string output = run.output.ends_with(".h5") ? run.output.substr(0, run.output.size() - 3)
                             : run.output.empty()        ? "against"
                                                         : run.output;
  const std::string binaries[] = {options.binary, self};
  std::vector<PairedFiles> pairs;
  for (int i = 1; i <= options.pairs; ++i) {
    pairs.push_back({fmt::format("{}.a{}.h5", output, i), fmt::format("{}.b{}.h5", output, i)});
    for (const std::string& path : {pairs.back().a, pairs.back().b})
      if (status_of(path).kind != PathStatus::missing)
        throw UserError(path + " exists (results are never overwritten); choose another --output, or remove it",
                        ExitCode::file);
  }
  for (int i = 1; i <= options.pairs; ++i) {
    const PairedFiles& pair = pairs[static_cast<std::size_t>(i) - 1];
    for (const int turn : {0, 1}) {
      const int which = (i + turn + 1) % 2;  // B first in every other pair
      std::vector<std::string> words = command_of(binaries[which], run, options.launcher);
      words.insert(words.end(), {"--output", which == 0 ? pair.a : pair.b});
      execute(words);
    }
    std::cerr << "nsa: pair " << i << " of " << options.pairs << "\n";
  }
  const DiffResult result = compare_pairs(std::cout, pairs, options.fail_above);
  if (!result.same) return ExitCode::invalid_result;
  return result.slower_than_allowed ? static_cast<ExitCode>(1) : ExitCode::ok;
}

}  // namespace nsa
