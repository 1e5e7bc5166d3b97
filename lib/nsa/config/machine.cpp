#include "nsa/config/machine.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "nsa/config/spelling.hpp"
#include "nsa/config/toml.hpp"

namespace nsa {
namespace {

enum class Need { required, optional };
constexpr RealRange seconds{0, 1e6}, rate{1, 1e20};

/// Reads the keys of one table of a machine file; what no call has read is unknown.
class TableReader {
 public:
  TableReader(const toml::table& table, std::string prefix, const std::string& path, std::vector<Problem>& problems)
      : table_(table), prefix_(std::move(prefix)), path_(path), problems_(problems) {}

  void number(const char* key, double& out, RealRange range, Need need = Need::optional) {
    const toml::node* node = find(key, "a number", need);
    if (!node) return;
    const auto value = node->is_number() ? node->value<double>() : std::nullopt;
    if (!value || !(*value >= range.least && *value <= range.most))
      return refuse(*node, key, fmt::format("a number from {:g} to {:g}", range.least, range.most));
    out = *value;
  }
  void integer(const char* key, std::int64_t& out, Range range, Need need = Need::optional) {
    const toml::node* node = find(key, "an integer", need);
    if (!node) return;
    const auto value = node->value_exact<std::int64_t>();
    if (!value || *value < range.least || *value > range.most)
      return refuse(*node, key, fmt::format("an integer from {} to {}", range.least, range.most));
    out = *value;
  }
  void text(const char* key, std::string& out, Need need = Need::optional) {
    const toml::node* node = find(key, "a string", need);
    if (!node) return;
    const auto value = node->value_exact<std::string>();
    if (!value) return refuse(*node, key, "a string");
    out = *value;
  }
  void flag(const char* key, bool& out) {
    const toml::node* node = find(key, "true or false", Need::optional);
    if (!node) return;
    const auto value = node->value_exact<bool>();
    if (!value) return refuse(*node, key, "true or false");
    out = *value;
  }
  const toml::table* section(const char* key) {
    const toml::node* node = find(key, "a section", Need::optional);
    if (node && !node->is_table()) refuse(*node, key, "a section");
    return node ? node->as_table() : nullptr;
  }
  void refuse(const toml::node& node, const std::string& key, const std::string& expected) {
    const SourcePosition where = position(node.source(), path_);
    problems_.push_back({where, fmt::format("{}{} holds something else; give {}", prefix_, key, expected)});
  }
  void refuse_others() {
    for (const auto& [key, node] : table_) {
      const std::string name(key.str());
      if (std::ranges::find(known_, name) != known_.end()) continue;
      const auto nearest = std::ranges::min_element(known_, {}, [&](const auto& k) { return edit_distance(name, k); });
      const SourcePosition where = position(key.source(), path_);
      problems_.push_back(
          {where, fmt::format("unknown key {}{}; did you mean {}{}?", prefix_, name, prefix_, *nearest)});
    }
  }

 private:
  const toml::node* find(const char* key, const char* expected, Need need) {
    known_.emplace_back(key);
    const toml::node* node = table_.get(key);
    const SourcePosition top{path_, 1, 1};
    if (!node && need == Need::required)
      problems_.push_back({top, fmt::format("{}{} is missing; give {}", prefix_, key, expected)});
    return node;
  }

  const toml::table& table_;
  std::string prefix_;
  const std::string& path_;
  std::vector<Problem>& problems_;
  std::vector<std::string> known_;
};

/// The keys of an input that the numbers were measured with: "model.d_k" = 128.
void read_input(const toml::table& table, const std::string& path, PhaseCost& cost, std::vector<Problem>& problems) {
  const std::vector<Parameter> known = parameters(Config(), Point());
  for (const auto& [key, node] : table) {
    const std::string name(key.str());
    const SourcePosition where = position(key.source(), path);
    const auto same = [&](const Parameter& parameter) { return parameter.first == name; };
    if (std::ranges::none_of(known, same))
      problems.push_back({where, name + " is no key of an input; `nsa info --keys` prints them"});
    else if (const auto integer = node.value_exact<std::int64_t>())
      cost.input.emplace_back(name, *integer);
    else if (const auto real = node.value_exact<double>())
      cost.input.emplace_back(name, *real);
    else if (const auto text = node.value_exact<std::string>())
      cost.input.emplace_back(name, *text);
    else
      problems.push_back({where, name + " holds something else; give a number or a string"});
  }
}

void read_exchange(TableReader& read, ExchangeCost& cost) {
  read.number("exchange", cost.fixed, seconds);
  read.number("exchange_rank", cost.rank, seconds);
  read.number("exchange_bandwidth", cost.bandwidth, rate);
}

/// [decode.launches]: exchanges of a step over KV ranks in several launches.
void read_launches(const toml::table& table, const std::string& name, const std::string& path, PhaseCost& cost,
                   std::vector<Problem>& problems) {
  TableReader read(table, name + ".", path, problems);
  read_exchange(read, cost.launches);
  read.text("measured", cost.launches_measured, Need::required);
  read.refuse_others();
}

std::optional<PhaseCost> read_phase(const toml::table* table, const std::string& name, const std::string& path,
                                    std::vector<Problem>& problems) {
  if (!table) return std::nullopt;
  constexpr RealRange error{0, 1e6};
  PhaseCost cost;
  TableReader read(*table, name + ".", path, problems);
  read.number("fixed", cost.fixed, seconds, Need::required);
  read.number("bandwidth", cost.bandwidth, rate);
  read.number("arithmetic", cost.arithmetic, rate);
  read.number("block", cost.block, seconds);
  read_exchange(read, cost.exchange);
  read.number("error_median", cost.error_median, error);
  read.number("error_worst", cost.error_worst, error);
  read.integer("ranks", cost.ranks, Range{0});
  read.flag("fused", cost.fused);
  read.text("measured", cost.measured, Need::required);
  if (const toml::table* table = read.section("launches"))
    read_launches(*table, name + ".launches", path, cost, problems);
  if (const toml::table* input = read.section("input")) read_input(*input, path, cost, problems);
  read.refuse_others();
  return cost;
}

}  // namespace

Machine parse_machine(std::string_view text, const std::string& path) {
  const toml::table document = parse_text(text, path);
  std::vector<Problem> problems;
  Machine machine;
  machine.path = path;
  TableReader read(document, "", path, problems);
  std::string backend = "host";
  read.text("name", machine.name, Need::required);
  read.text("backend", backend, Need::required);
  read.number("memory", machine.memory, {1, 1e18}, Need::required);
  read.integer("node", machine.node, Range{1}, Need::required);
  if (backend != "host" && backend != "cuda") read.refuse(*document.get("backend"), "backend", "\"host\" or \"cuda\"");
  machine.backend = backend == "cuda" ? BackendKind::cuda : BackendKind::host;
  if (const toml::table* gpu = read.section("gpu")) {
    TableReader of_gpu(*gpu, "gpu.", path, problems);
    std::int64_t capability = 0, sms = 0;
    of_gpu.integer("capability", capability, {10, 999}, Need::required);
    of_gpu.integer("sms", sms, {1, 100000}, Need::required);
    of_gpu.refuse_others();
    if (backend == "host") read.refuse(*document.get("gpu"), "gpu", "it with backend = \"cuda\"");
    machine.gpu = {static_cast<int>(capability), static_cast<int>(sms)};
  }
  machine.decode = read_phase(read.section("decode"), "decode", path, problems);
  machine.prefill = read_phase(read.section("prefill"), "prefill", path, problems);
  if (const toml::table* network = read.section("network")) {
    TableReader of_network(*network, "network.", path, problems);
    of_network.text("name", machine.network, Need::required);
    of_network.number("latency", machine.network_latency, {0, 1e6}, Need::required);
    of_network.number("bandwidth", machine.network_bandwidth, {1, 1e20}, Need::required);
    of_network.refuse_others();
  }
  read.refuse_others();
  throw_problems(std::move(problems));
  return machine;
}

}  // namespace nsa
