// Parses TOML to a Config.

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>
#include <sstream>

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/keys.hpp"
#include "nsa/config/spelling.hpp"
#include "nsa/config/toml.hpp"

namespace nsa {
namespace {

/// A key as it was set, in the file or on the command line.
struct Entry {
  const toml::node* value;
  SourcePosition key_position, value_position;
};
using Entries = std::map<std::string, Entry>;

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

/// The known key nearest to `key`: by its full name, or by its bare name in another section.
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

void collect_file(const toml::table& document, const std::string& path, Entries& entries,
                  std::vector<Problem>& problems) {
  for (const auto& [section, node] : document) {
    const std::string name(section.str());
    const SourcePosition where = position(section.source(), path);
    if (node.is_array_of_tables()) {
      problems.push_back({where, fmt::format("[[{0}]] is a list of sections; write [{0}], once", name)});
    } else if (!node.is_table()) {
      problems.push_back({where, is_section(name) ? fmt::format("{0} is a section (found a value); write [{0}]", name)
                                                  : fmt::format("{} is outside a section; did you mean {}?", name,
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

std::string without_blanks(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

/// "section.key=value". The value is TOML; a value that is not TOML is a string.
void collect_override(const std::string& text, std::vector<toml::table>& owners, Entries& entries,
                      std::vector<Problem>& problems) {
  const SourcePosition where{"--set " + text, 0, 0};
  const auto equals = text.find('=');
  if (equals == std::string::npos) {
    problems.push_back({where, "no value given; write --set section.key=value"});
    return;
  }
  const std::string key = without_blanks(text.substr(0, equals)), value = without_blanks(text.substr(equals + 1));
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
  entries[key] = {owners.back().get("value"), where, where};
}

// read_value: one overload for each type of field; false: the value has another type. expected: the type, for messages.

bool read_value(const toml::node& node, bool& out, AnyValue) {
  const auto value = node.value_exact<bool>();
  if (value) out = *value;
  return value.has_value();
}

bool read_value(const toml::node& node, std::string& out, AnyValue) {
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

bool read_value(const toml::node& node, std::int64_t& out, EachSequence spec) {
  return read_value(node, out, spec.range);
}

bool read_value(const toml::node& node, double& out, RealRange) {
  if (!node.is_number()) return false;
  out = *node.value<double>();
  return true;
}

bool read_value(const toml::node& node, double& out, AllOrShare) {
  if (node.value_exact<std::string>() == "all") {
    out = 1.0;
    return true;
  }
  return read_value(node, out, RealRange{});
}

template <class T, std::size_t n>
bool read_value(const toml::node& node, T& out, const Choice<T> (&choices)[n]) {
  const auto name = node.value_exact<std::string>();
  const auto choice =
      std::find_if(std::begin(choices), std::end(choices), [&](const auto& c) { return name == c.name; });
  if (choice == std::end(choices)) return false;
  out = choice->value;
  return true;
}

std::string expected(const bool&, AnyValue) { return "true or false"; }
std::string expected(const std::string&, AnyValue) { return "a string"; }
std::string expected(const double&, RealRange) { return "a number"; }
std::string expected(const double&, AllOrShare) { return "\"all\" or a number"; }
std::string expected(const std::int64_t&, AutoOr) { return "\"auto\" or a positive integer"; }
std::string expected(const std::int64_t&, EachSequence) { return "an integer"; }
std::string expected(const std::int64_t&, Range) { return "an integer"; }
std::string expected(const std::int32_t&, Range) { return "an integer of 32 bits"; }
template <class T, std::size_t n>
std::string expected(const T&, const Choice<T> (&choices)[n]) {
  std::string list;
  for (const auto& choice : choices) list += fmt::format("{}\"{}\"", list.empty() ? "" : ", ", choice.name);
  return "one of " + list;
}

/// "the string "many"", "a list", ...
std::string description(const toml::node& node) {
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

/// Reads each known key and removes it from `entries`; the remaining keys are unknown.
struct Reader {
  Entries& entries;
  Config& config;
  std::vector<Problem>& problems;

  template <class T, class Spec>
  void operator()(const char* key, T& field, const Spec& spec) {
    if (const auto entry = take(key); entry && !read_value(*entry->value, field, spec))
      refuse(key, *entry, *entry->value, expected(field, spec));
  }

  template <class T, class Spec>
  void operator()(const char* key, std::vector<T>& field, const Spec& spec) {
    const auto entry = take(key);
    if (!entry) return;
    std::vector<T> values;
    const auto read_one = [&](const toml::node& node) {
      T value{};
      if (read_value(node, value, spec)) return values.push_back(value);
      refuse(key, *entry, node, expected(value, spec) + (node.is_array() ? "" : ", or a list of such"));
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

  void refuse(const char* key, const Entry& entry, const toml::node& node, const std::string& expected_type) {
    const bool in_file = entry.value_position.line > 0;
    const SourcePosition where = in_file ? position(node.source(), entry.value_position.path) : entry.value_position;
    problems.push_back({where, fmt::format("{} holds {}; give {}", key, description(node), expected_type)});
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
    problems.push_back({top, "task.kind is missing; give kind in [task], " + expected(config.kind, task_kinds)});
  }
  throw_problems(std::move(problems));
  return config;
}

}  // namespace nsa
