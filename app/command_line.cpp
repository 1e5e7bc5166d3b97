#include "app/command_line.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "nsa/config/spelling.hpp"

namespace nsa {
namespace {

/// The candidate that the word was meant to be; "" if none is near.
std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  std::size_t least = word.size() / 3 + 1;
  for (const std::string& candidate : candidates) {
    const std::size_t edits = edit_distance(word, candidate);
    if (edits <= least && (best.empty() || edits < least)) best = candidate, least = edits;
  }
  return best;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options({}))
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

const CLI::App* command_of(const CLI::App& app, const std::string& name) {
  for (const CLI::App* command : app.get_subcommands({}))
    if (command->get_name() == name) return command;
  return nullptr;
}

/// The first word that looks like an option and is none; "" if there is none.
std::string unknown_option(const CLI::App& command, int argc, char** argv) {
  const std::vector<std::string> known = option_names(command);
  for (int i = 1; i < argc && std::string(argv[i]) != "--"; ++i) {
    const std::string word = std::string(argv[i]).substr(0, std::string(argv[i]).find('='));
    if (word.starts_with("--") && std::ranges::find(known, word) == known.end()) return word;
  }
  return "";
}

/// What CLI11 says, and " (did you mean --ranks?)" for an unknown option. Such a one comes first, also where an
/// argument is missing, which CLI11 reports instead.
std::string complaint(const CLI::App& command, const CLI::ParseError& error, int argc, char** argv) {
  const std::string word = unknown_option(command, argc, argv);
  if (word.empty()) return error.what();
  const bool missing = error.get_name() == "RequiredError";
  const std::string meant = nearest(word, option_names(command));
  return (missing ? "The following argument was not expected: " + word : std::string(error.what())) +
         (meant.empty() ? "" : " (did you mean " + meant + "?)");
}

}  // namespace

std::vector<std::string> command_line_words(int argc, char** argv) {
  std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
  if (words.empty() || words[0] != "help") return words;
  words.erase(words.begin());
  words.resize(std::min<std::size_t>(words.size(), 1));
  words.emplace_back("--help");
  return words;
}

std::string usage_error(const CLI::App& app, const CLI::ParseError& error, int argc, char** argv) {
  const std::string first = argc > 1 ? argv[1] : "-";
  // CLI11 reports a misspelt command as a missing one.
  if (const CLI::App* command = command_of(app, first))
    return fmt::format("{}; see nsa {} --help", complaint(*command, error, argc, argv), first);
  if (first[0] == '-') return fmt::format("{}; see nsa --help", complaint(app, error, argc, argv));
  const std::string meant = nearest(first, command_names(app));
  return fmt::format("unknown command {}{}; commands: {}; see nsa --help", first,
                     meant.empty() ? "" : " (did you mean " + meant + "?)", fmt::join(command_names(app), ", "));
}

std::string bash_completion(const CLI::App& app) {
  std::string cases;
  for (const CLI::App* command : app.get_subcommands({}))
    cases += fmt::format("    {}) words=\"{}\" ;;\n", command->get_name(), fmt::join(option_names(*command), " "));
  return fmt::format(R"(_nsa() {{
  local words="" current=${{COMP_WORDS[COMP_CWORD]}}
  case ${{COMP_WORDS[1]}} in
{0}    *) [[ $COMP_CWORD -eq 1 ]] && words="{1} {2} help" ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current"; [[ $COMP_CWORD -gt 1 ]] && compgen -f -- "$current")
}}
complete -o filenames -F _nsa nsa
)",
                     cases, fmt::join(command_names(app), " "), fmt::join(option_names(app), " "));
}

}  // namespace nsa
