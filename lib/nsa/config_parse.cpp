// Text to Config. toml++ stays in this file.

#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>
#include <sstream>

#include "kernels/error.hpp"
#include "nsa/config_schema.hpp"

namespace nsa {
namespace {

/// A key as it was set, in the file or on the command line.
struct Entry {
  const toml::node* value;
  SourcePosition key_position, value_position;
};
using Entries = std::map<std::string, Entry>;

SourcePosition position(const toml::source_region& region, const std::string& path) {
  return {path, static_cast<std::int64_t>(region.begin.line), static_cast<std::int64_t>(region.begin.column)};
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0]++;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j] + 1, row[j + 1] + 1, replaced});
    }
  }
  return row.back();
}

std::string_view bare(std::string_view key) { return key.substr(key.find('.') + 1); }
std::string section_of(std::string_view key) { return std::string(key.substr(0, key.find('.'))); }

const std::vector<std::string>& known_keys() {
  static const std::vector<std::string> keys = [] {
    std::vector<std::string> list;
    const Config defaults;
    visit_keys(defaults, [&](const char* key, const auto&, const auto&) { list.emplace_back(key); });
    return list;
  }();
  return keys;
}

/// The known key most like `key`: by its whole name, or by its bare name in another section.
std::string nearest_key(const std::string& key) {
  const auto distance = [&](const std::string& known) {
    return std::min(edit_distance(key, known), 1 + edit_distance(bare(key), bare(known)));
  };
  const auto nearer = [&](const std::string& a, const std::string& b) { return distance(a) < distance(b); };
  return *std::min_element(known_keys().begin(), known_keys().end(), nearer);
}

std::string nearest_section(const std::string& name) {
  const auto nearer = [&](const std::string& a, const std::string& b) {
    return edit_distance(name, section_of(a)) < edit_distance(name, section_of(b));
  };
  return section_of(*std::min_element(known_keys().begin(), known_keys().end(), nearer));
}

bool is_section(const std::string& name) {
  return std::any_of(known_keys().begin(), known_keys().end(),
                     [&](const std::string& key) { return section_of(key) == name; });
}

std::string unknown_key(const std::string& key) {
  const std::string nearest = nearest_key(key);
  return fmt::format("unknown key {}; did you mean {} in [{}]?", key, bare(nearest), section_of(nearest));
}

/// Where a string that begins at `begin` ends: behind its closing quote, or with the line.
std::size_t end_of_string(std::string_view text, std::size_t begin) {
  for (std::size_t i = begin + 1; i < text.size() && text[i] != '\n'; ++i) {
    if (text[i] == text[begin]) return i + 1;
    if (text[i] == '\\' && text[begin] == '"') ++i;
  }
  return std::min(text.find('\n', begin), text.size());
}

/// Outside strings and comments some characters beyond ASCII are undefined behaviour in toml++ 3.3, so a file that has
/// any is looked through first. A quote right behind a word or another string begins no string that toml++ would read
/// as one (nor do the quotes of a string of several lines, which such a file cannot have).
void refuse_stray_characters(std::string_view text, const std::string& path) {
  const auto beyond_ascii = [](char c) { return static_cast<unsigned char>(c) >= 0x80; };
  if (std::none_of(text.begin(), text.end(), beyond_ascii)) return;
  const auto refuse = [&](std::size_t at, const char* what) {
    const std::string_view before = text.substr(0, at);
    const std::int64_t line = 1 + std::count(before.begin(), before.end(), '\n');
    const auto column = static_cast<std::int64_t>(at - (before.rfind('\n') + 1)) + 1;
    throw UserError(place_text({path, line, column}) + "not TOML: " + what);
  };
  constexpr std::string_view before_string = " \t\r\n=[,{.";
  for (std::size_t i = text.substr(0, 3) == "\xEF\xBB\xBF" ? 3 : 0; i < text.size();) {
    if (text[i] == '"' || text[i] == '\'') {
      if (i > 0 && before_string.find(text[i - 1]) == std::string_view::npos)
        refuse(i, "a quote right behind a word or a quote, in a file with characters beyond ASCII");
      i = end_of_string(text, i);
    } else if (text[i] == '#') {
      i = std::min(text.find('\n', i), text.size());
    } else if (beyond_ascii(text[i])) {
      refuse(i, "a character beyond ASCII (only strings and comments have them); remove it");
    } else {
      ++i;
    }
  }
}

toml::table parse_text(std::string_view text, const std::string& path) {
  refuse_stray_characters(text, path);
  try {
    return toml::parse(text, path);
  } catch (const toml::parse_error& error) {
    throw UserError(place_text(position(error.source(), path)) + "not TOML: " + std::string(error.description()));
  }
}

void collect_file(const toml::table& document, const std::string& path, Entries& entries,
                  std::vector<Problem>& problems) {
  for (const auto& [section, node] : document) {
    const std::string name(section.str());
    const SourcePosition where = position(section.source(), path);
    if (!node.is_table()) {
      problems.push_back({where, is_section(name) ? fmt::format("{0} is a section (found a value); write [{0}]", name)
                                                  : fmt::format("{} stands outside a section; did you mean {}?", name,
                                                                nearest_key("." + name))});
    } else if (!is_section(name)) {
      problems.push_back({where, fmt::format("unknown section [{}]; did you mean [{}]?", name, nearest_section(name))});
    } else {
      for (const auto& [key, value] : *node.as_table())
        entries[name + "." + std::string(key.str())] = {&value, position(key.source(), path),
                                                        position(value.source(), path)};
    }
  }
}

/// "section.key=value". The value is TOML; what is not TOML is a string.
void collect_override(const std::string& text, std::vector<toml::table>& owners, Entries& entries,
                      std::vector<Problem>& problems) {
  const SourcePosition where{"--set " + text, 0, 0};
  const auto equals = text.find('=');
  if (equals == std::string::npos) {
    problems.push_back({where, "no value given; write --set section.key=value"});
    return;
  }
  const std::string value = text.substr(equals + 1);
  toml::table parsed;
  try {
    parsed = toml::parse(std::string_view("value = " + value));
  } catch (const toml::parse_error&) {
  }
  if (parsed.size() != 1) {
    parsed.clear();
    parsed.insert("value", value);
  }
  owners.push_back(std::move(parsed));
  entries[text.substr(0, equals)] = {owners.back().get("value"), where, where};
}

// One overload for each type of field: true and the value, or false; and what was wanted instead.

bool read_value(const toml::node& node, bool& out, Any) {
  const auto value = node.value_exact<bool>();
  if (value) out = *value;
  return value.has_value();
}

bool read_value(const toml::node& node, std::string& out, Any) {
  const auto value = node.value_exact<std::string>();
  if (value) out = *value;
  return value.has_value();
}

template <class Integer>
bool read_value(const toml::node& node, Integer& out, Range) {
  const auto value = node.value_exact<std::int64_t>();
  if (!value || *value != static_cast<Integer>(*value)) return false;
  out = static_cast<Integer>(*value);
  return true;
}

bool read_value(const toml::node& node, std::int64_t& out, AutoOr spec) {
  if (node.value_exact<std::string>() == "auto") {
    out = 0;
    return true;
  }
  return read_value(node, out, spec.range) && out != 0;
}

bool read_value(const toml::node& node, double& out, RealRange) {
  if (!node.is_number()) return false;
  out = *node.value<double>();
  return true;
}

template <class T, std::size_t n>
bool read_value(const toml::node& node, T& out, const Choice<T> (&choices)[n]) {
  const auto word = node.value_exact<std::string>();
  const auto found =
      std::find_if(std::begin(choices), std::end(choices), [&](const auto& c) { return word == c.name; });
  if (found == std::end(choices)) return false;
  out = found->value;
  return true;
}

std::string wanted(const bool&, Any) { return "true or false"; }
std::string wanted(const std::string&, Any) { return "a string"; }
std::string wanted(const double&, RealRange) { return "a number"; }
std::string wanted(const std::int64_t&, AutoOr) { return "\"auto\" or a positive integer"; }
std::string wanted(const std::int64_t&, Range) { return "an integer"; }
std::string wanted(const std::int32_t&, Range) { return "an integer of 32 bits"; }
template <class T, std::size_t n>
std::string wanted(const T&, const Choice<T> (&choices)[n]) {
  std::string list;
  for (const auto& choice : choices) list += fmt::format("{}\"{}\"", list.empty() ? "" : ", ", choice.name);
  return "one of " + list;
}

/// "the string "many"", "a list", ...
std::string found(const toml::node& node) {
  if (node.is_array()) return "a list";
  if (node.is_table()) return "a section";
  std::ostringstream text;
  node.visit([&](const auto& value) {
    if constexpr (toml::is_value<decltype(value)>) text << value;
  });
  if (node.is_string()) return fmt::format("the string \"{}\"", *node.value<std::string>());
  if (node.is_integer()) return "the integer " + text.str();
  if (node.is_floating_point()) return "the number " + text.str();
  if (node.is_boolean()) return text.str();
  return "the date or time " + text.str();
}

/// Takes each known key out of `entries`; what is left is unknown.
struct Reader {
  Entries& entries;
  Config& config;
  std::vector<Problem>& problems;

  template <class T, class Spec>
  void operator()(const char* key, T& field, const Spec& spec) {
    if (const auto entry = take(key); entry && !read_value(*entry->value, field, spec))
      refuse(key, *entry, *entry->value, wanted(field, spec));
  }

  template <class T, class Spec>
  void operator()(const char* key, std::vector<T>& field, const Spec& spec) {
    const auto entry = take(key);
    if (!entry) return;
    std::vector<T> values;
    const auto read_one = [&](const toml::node& node) {
      T value{};
      if (read_value(node, value, spec)) return values.push_back(value);
      refuse(key, *entry, node, wanted(value, spec) + (node.is_array() ? "" : ", or a list of such"));
    };
    if (const toml::array* list = entry->value->as_array()) {
      for (const toml::node& node : *list) read_one(node);
    } else {
      read_one(*entry->value);
    }
    field = std::move(values);
  }

  std::optional<Entry> take(const char* key) {
    const auto at = entries.find(key);
    if (at == entries.end()) return std::nullopt;
    const Entry entry = at->second;
    config.origin[key] = entry.key_position;
    entries.erase(at);
    return entry;
  }

  void refuse(const char* key, const Entry& entry, const toml::node& node, const std::string& wanted) {
    const bool in_file = entry.value_position.line > 0;
    const SourcePosition where = in_file ? position(node.source(), entry.value_position.path) : entry.value_position;
    problems.push_back({where, fmt::format("{} holds {}; give {}", key, found(node), wanted)});
  }
};

}  // namespace

Config parse_config(std::string_view text, const std::string& path, const std::vector<std::string>& overrides) {
  const toml::table document = parse_text(text, path);
  Entries entries;
  std::vector<Problem> problems;
  std::vector<toml::table> owners;
  owners.reserve(overrides.size());  // entries point into them
  collect_file(document, path, entries, problems);
  for (const std::string& override : overrides) collect_override(override, owners, entries, problems);

  Config config;
  visit_keys(config, Reader{entries, config, problems});
  for (const auto& [key, entry] : entries) problems.push_back({entry.key_position, unknown_key(key)});
  if (config.origin.count("task.kind") == 0) {
    const SourcePosition top{path, 1, 1};
    problems.push_back({top, "task.kind is missing; say kind = \"decode\", \"prefill\", \"kernels\" or \"needle\" in [task]"});
  }
  throw_problems(std::move(problems));
  return config;
}

}  // namespace nsa
