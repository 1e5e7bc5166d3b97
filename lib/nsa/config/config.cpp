// The points of a sweep, their parameters, and a config as TOML.

#include "nsa/config/config.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/json.hpp"
#include "nsa/config/keys.hpp"
#include "nsa/config/lengths.hpp"

namespace nsa {
namespace {

using Value = decltype(Parameter::second);

Value value_of(bool value, AnyValue) { return std::int64_t{value}; }
Value value_of(const std::string& value, AnyValue) { return value; }
Value value_of(std::int64_t value, Range) { return value; }
Value value_of(double value, RealRange) { return value; }
Value value_of(double value, AllOrShare) { return value == 1.0 ? Value("all") : Value(value); }
Value value_of(std::int64_t value, EachSequence) { return value; }
Value value_of(std::int64_t value, AutoOr) { return value == 0 ? Value("auto") : Value(value); }
template <class T, std::size_t n>
Value value_of(const T& value, const Choice<T> (&choices)[n]) {
  return name_of_choice(value, choices);
}

/// The text of a double that parses back to the same double.
std::string text_of(double value) {
  const std::string text = fmt::format("{}", value);
  return text.find_first_of(".einf") == std::string::npos ? text + ".0" : text;
}

std::string as_text(const Value& value) {
  if (const auto* number = std::get_if<std::int64_t>(&value)) return fmt::format("{}", *number);
  if (const auto* number = std::get_if<double>(&value)) return text_of(*number);
  return std::get<std::string>(value);
}

/// A basic string of TOML: one of JSON, except that DEL has to be escaped too.
std::string toml_string(const std::string& text) {
  std::string quoted = json_text(text);
  for (std::size_t at = 0; (at = quoted.find('\x7f', at)) != std::string::npos;) quoted.replace(at, 1, "\\u007f");
  return quoted;
}

std::string as_toml(const Value& value) {
  const auto* text = std::get_if<std::string>(&value);
  return text ? toml_string(*text) : as_text(value);
}

template <class T, class Spec>
std::string toml_of(const T& field, const Spec& spec) {
  return as_toml(value_of(field, spec));
}
std::string toml_of(bool field, AnyValue) { return field ? "true" : "false"; }
template <class T, class Spec>
std::string toml_of(const std::vector<T>& field, const Spec& spec) {
  std::vector<std::string> list;
  for (const T& value : field) list.push_back(toml_of(value, spec));
  return fmt::format("[{}]", fmt::join(list, ", "));
}

/// At a point a swept key has one value. Other lists (modes, depths) become text: "branches,total".
template <class T, class Spec>
Value value_of(const std::vector<T>& field, const Spec& spec) {
  constexpr bool always_text = std::is_same_v<T, double> || std::is_same_v<Spec, EachSequence>;
  if (field.size() == 1 && !always_text) return value_of(field[0], spec);
  std::vector<std::string> list;
  for (const T& value : field) list.push_back(as_text(value_of(value, spec)));
  return fmt::format("{}", fmt::join(list, ","));
}

std::vector<Point> kernel_sweep(const Config& config) {
  const KernelsConfig& k = config.kernels;
  std::vector<Point> points;
  for (const std::int32_t branch : k.branch)
    for (const Spans spans : branch == sel ? k.spans : std::vector{k.spans.front()})  // other branches have none
      for (const std::int64_t head_size : k.head_size)
        for (const std::int64_t heads : k.heads)
          for (const std::int64_t blocks : branch == sel ? k.blocks : std::vector{k.blocks.front()})
            for (const std::int64_t rows : k.rows)
              for (const std::int64_t context : config.run.context)
                points.push_back(
                    {context, 1, -1, {static_cast<Branch>(branch), rows, heads, head_size, blocks, spans}});
  return points;
}

}  // namespace

std::int64_t Point::longest() const { return ragged() ? *std::ranges::max_element(lengths) : context; }

std::int64_t Point::shortest() const { return ragged() ? *std::ranges::min_element(lengths) : context; }

namespace {

/// A point of a ragged batch has the mean of its lengths as context.
Point point_of(const Config& config, Distribution distribution, std::int64_t context, std::int64_t batch,
               std::int32_t branch) {
  Point point{context, batch, branch};
  point.distribution = distribution;
  point.lengths = sequence_lengths(config.batch, distribution, context, batch);
  if (!point.ragged()) return point;
  point.batch = std::ssize(point.lengths);
  const std::int64_t sum = std::accumulate(point.lengths.begin(), point.lengths.end(), std::int64_t{0});
  point.context = (sum + point.batch / 2) / point.batch;
  const std::int64_t rows = point.longest() + config.run.steps;  // caches of each sequence, in tokens
  if (static_cast<double>(point.batch) * static_cast<double>(rows) * values_per_position(config.model) > most_values)
    throw UserError(fmt::format(
        "a batch of {} sequences, the longest of {} tokens, is too large for this model (2^50 values at most); "
        "lower run.batch, or the lengths in [batch]",
        point.batch, point.longest()));
  return point;
}

}  // namespace

std::vector<Point> sweep(const Config& config) {
  if (config.kind == TaskKind::kernels) return kernel_sweep(config);
  const bool listed = !config.batch.context.empty();  // then neither context nor batch is swept; of a trace, batch is
  const bool drawn = !listed && config.batch.distribution.front() != Distribution::file;
  const auto first = [](const std::vector<std::int64_t>& list) { return std::vector{list.front()}; };
  std::vector<Point> points;
  for (const std::int32_t branch : config.run.force_branch)
    for (const std::int64_t batch : listed ? first(config.run.batch) : config.run.batch)
      for (const std::int64_t context : drawn ? config.run.context : first(config.run.context))
        for (const Distribution distribution : config.batch.distribution)
          for (const std::int64_t query_tokens : config.run.query_tokens) {
            points.push_back(point_of(config, distribution, context, batch, branch));
            points.back().query_tokens = query_tokens;
          }
  const std::int64_t prefix = config.prefix_of_batch();
  for (const Point& point : points)
    if (prefix + point.shortest() < config.cache.shared_prefix)
      throw UserError(
          fmt::format("cache.shared_prefix = {} is longer than a sequence of {} tokens (every sequence begins with "
                      "it); lower it, or "
                      "raise run.context or batch.min",
                      config.cache.shared_prefix, prefix + point.shortest()));
  return points;
}

std::int64_t kv_chunk_blocks(const Config& config, const Point& point) {
  constexpr std::int64_t least = 16, most = 64;
  if (config.parallel.kv_chunk_blocks > 0) return config.parallel.kv_chunk_blocks;
  // Whole KV tiles of compressed tokens are half as much at the paper's block sizes: short sequences then have chunks
  // for more ranks.
  constexpr std::int64_t least_in_decode = 8;
  if (config.kind != TaskKind::prefill)
    return point.context < least_in_decode * least * config.nsa.l_sel ? least_in_decode : least;
  // A rank's prefill runs in tiles of a chunk, and larger tiles waste less at their ends. With 16 chunks a sequence the
  // rank of the last chunk still has little more of the causal triangle than the others.
  constexpr std::int64_t chunks = 16;
  return std::clamp((config.run.prefix + point.context) / (chunks * config.nsa.l_sel), least, most);
}

std::vector<Parameter> parameters(const Config& config, const Point& point) {
  Config at_point = config;
  at_point.run.context = {point.context};
  at_point.run.batch = {point.batch};
  at_point.run.force_branch = {point.force_branch};
  at_point.run.query_tokens = {point.query_tokens};
  at_point.batch.distribution = {point.distribution};
  at_point.parallel.kv_chunk_blocks = kv_chunk_blocks(config, point);
  if (config.kind == TaskKind::kernels) {
    const KernelShape& shape = point.kernel;
    KernelsConfig& k = at_point.kernels;
    k.branch = {shape.branch}, k.spans = {shape.spans}, k.rows = {shape.rows}, k.heads = {shape.heads};
    k.head_size = {shape.head_size}, k.blocks = {shape.blocks};
  }
  std::vector<Parameter> list;
  visit_keys(std::as_const(at_point), [&](const char* key, const auto& field, const auto& spec) {
    list.emplace_back(key, value_of(field, spec));
  });
  return list;
}

std::vector<Setting> settings(const Config& config) {
  std::vector<Setting> list;
  visit_keys(config, [&](const std::string& key, const auto& field, const auto& spec) {
    list.emplace_back(key, toml_of(field, spec));
  });
  return list;
}

std::string to_toml(const Config& config) {
  std::string text, section;
  for (const auto& [key, value] : settings(config)) {
    const auto dot = key.find('.');
    if (key.substr(0, dot) != section) {
      section = key.substr(0, dot);
      text += fmt::format("{}[{}]\n", text.empty() ? "" : "\n", section);
    }
    text += fmt::format("{} = {}\n", key.substr(dot + 1), value);
  }
  return text;
}

}  // namespace nsa
