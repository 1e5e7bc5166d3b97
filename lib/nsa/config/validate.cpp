// Checks the constraints of an input. One error lists every violation.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <set>
#include <tuple>

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/keys.hpp"

namespace nsa {

std::string location_text(const SourcePosition& at) {
  if (at.path.empty()) return "";
  return at.line > 0 ? fmt::format("{}:{}:{}: ", at.path, at.line, at.column) : fmt::format("{}: ", at.path);
}

void throw_problems(std::vector<Problem> problems) {
  if (problems.empty()) return;
  const auto order = [](const Problem& p) {
    const int kind = p.where.path.empty() ? 2 : p.where.line == 0 ? 1 : 0;
    return std::tuple(kind, p.where.line, p.where.column);
  };
  std::stable_sort(problems.begin(), problems.end(),
                   [&](const Problem& a, const Problem& b) { return order(a) < order(b); });
  std::string text = problems.size() > 1 ? fmt::format("{} problems in the input", problems.size()) : "";
  for (const Problem& problem : problems) {
    if (!text.empty()) text += "\n  ";
    text += location_text(problem.where) + problem.what;
  }
  throw UserError(text);
}

namespace {

class Checker {
 public:
  explicit Checker(const Config& config) : config_(config) {}

  // Checks that every number is in its range. A list must not be empty or hold a value twice: its values are a sweep.
  template <class T, class Spec>
  void operator()(const char* key, const T& field, const Spec& spec) {
    check_value(key, field, spec);
  }
  template <class T, class Spec>
  void operator()(const char* key, const std::vector<T>& field, const Spec& spec) {
    if (field.empty()) refuse(key, fmt::format("{} is empty; give at least one value", key));
    for (const T& value : field) check_value(key, value, spec);
    if (std::set<T>(field.begin(), field.end()).size() < field.size())
      add({key}, fmt::format("{} holds a value twice; give each once", key));
  }

  void operator()(const char* key, const std::vector<std::int64_t>& field, const EachSequence& spec) {
    for (const std::int64_t value : field) check_value(key, value, spec.range);
  }

  /// Adds a violated rule over several keys, at the position of the first key that was set.
  void add(std::initializer_list<const char*> keys, std::string what) {
    for (const char* key : keys) {
      const auto at = config_.origin.find(key);
      if (at != config_.origin.end()) return problems_.push_back({at->second, std::move(what)});
    }
    problems_.push_back({{}, std::move(what)});
  }

  /// Whether each of the keys is valid by itself. Rules over a key that is not are skipped.
  bool valid(std::initializer_list<const char*> keys) const {
    return std::none_of(keys.begin(), keys.end(), [&](const char* key) { return invalid_.count(key) > 0; });
  }

  void finish() { throw_problems(std::move(problems_)); }

 private:
  void refuse(const char* key, std::string what) {
    invalid_.insert(key);
    add({key}, std::move(what));
  }
  template <class T, class Spec>
  void check_value(const char*, const T&, const Spec&) {}
  void check_value(const char* key, std::int64_t value, const Range& range) {
    if (value < range.least || value > range.most)
      refuse(key, fmt::format("{} = {} is out of range; give {} to {}", key, value, range.least, range.most));
  }
  void check_value(const char* key, std::int32_t value, const Range& range) {
    check_value(key, std::int64_t{value}, range);
  }
  void check_value(const char* key, std::int64_t value, const AutoOr& spec) {
    if (value != 0) check_value(key, value, spec.range);
  }
  void check_value(const char* key, double value, const AllOrShare&) { check_value(key, value, RealRange{0.0, 1.0}); }
  void check_value(const char* key, double value, const RealRange& range) {
    if (!(value >= range.least && value <= range.most))  // NaN is out of range
      refuse(key, fmt::format("{} = {} is out of range; give {} to {}", key, value, range.least, range.most));
  }

  const Config& config_;
  std::set<std::string> invalid_;
  std::vector<Problem> problems_;
};

void check_layer(const Config& c, Checker& check) {
  const ModelConfig& m = c.model;
  const BlockRules& n = c.nsa;
  if (check.valid({"model.n_heads", "model.n_kv_groups"}) && m.n_heads % m.n_kv_groups != 0)
    check.add({"model.n_kv_groups", "model.n_heads"},
              fmt::format("model.n_kv_groups = {} must divide model.n_heads = {} (a group has equally many heads)",
                          m.n_kv_groups, m.n_heads));
  if (check.valid({"model.d_k"}) && m.d_k % 2 != 0)
    check.add({"model.d_k"}, fmt::format("model.d_k = {} must be even (RoPE turns pairs)", m.d_k));
  for (const auto& [key, precision] :
       {std::pair{"model.kv_precision", m.kv_precision}, {"model.cmp_precision", m.cmp_precision}})
    if (precision != KvPrecision::same && m.precision == DType::f16)
      check.add({key, "model.precision"},
                fmt::format("{} = \"fp8_e4m3\" needs model.precision = \"bf16\" or \"fp32\" (fp16 does not hold every "
                            "value times its scale)",
                            key));
  if (check.valid({"nsa.d", "nsa.l"}) && n.l % n.d != 0)
    check.add({"nsa.d", "nsa.l"}, fmt::format("nsa.d = {} must divide nsa.l = {}", n.d, n.l));
  if (check.valid({"nsa.d", "nsa.l_sel"}) && n.l_sel % n.d != 0)
    check.add({"nsa.d", "nsa.l_sel"}, fmt::format("nsa.d = {} must divide nsa.l_sel = {}", n.d, n.l_sel));
  if (n.l > n.l_sel)
    check.add({"nsa.l", "nsa.l_sel"}, fmt::format("nsa.l = {} must be at most nsa.l_sel = {}", n.l, n.l_sel));
  if (n.n_sel < n.n_init + n.n_local)
    check.add(
        {"nsa.n_sel", "nsa.n_init", "nsa.n_local"},
        fmt::format("nsa.n_sel = {} must be at least nsa.n_init + nsa.n_local = {} + {} (those are always chosen)",
                    n.n_sel, n.n_init, n.n_local));
}

/// Steps that are launched as one, and what times launches.
void check_launches(const Config& c, Checker& check) {
  const RunConfig& r = c.run;
  const bool launches = std::ranges::count(r.modes, Mode::launches) > 0;
  if (launches && c.kind != TaskKind::decode)
    check.add({"run.modes"}, "run.modes: \"launches\" needs task.kind = \"decode\"; leave it out");
  if (r.steps_per_graph == 1 || !check.valid({"run.steps_per_graph"})) return;
  if (c.kind != TaskKind::decode)
    check.add({"run.steps_per_graph"}, "run.steps_per_graph needs task.kind = \"decode\"; leave it out");
  if (r.steps % r.steps_per_graph != 0 || r.warmup % r.steps_per_graph != 0)
    check.add(
        {"run.steps_per_graph", "run.steps", "run.warmup"},
        fmt::format("run.steps_per_graph = {} must divide run.steps = {} and run.warmup = {} (a sample is of whole "
                    "graphs)",
                    r.steps_per_graph, r.steps, r.warmup));
}

/// Given selections, and where selections are recorded.
void check_selections(const Config& c, Checker& check) {
  const bool kernels = c.kind == TaskKind::kernels;
  const auto recorded = std::ranges::count(c.kernels.spans, Spans::recorded);
  if (c.output.selection && c.kind == TaskKind::needle)
    check.add({"output.selection"}, "output.selection needs another kind of run than \"needle\"; leave it out");
  const bool ragged = !c.batch.context.empty() || std::ranges::any_of(c.batch.distribution, [](Distribution d) {
    return d != Distribution::equal;
  });
  if (ragged && (c.output.selection || !c.input_selection.empty()))
    check.add({"output.selection", "input.selection", "batch.context", "batch.distribution"},
              "selections are recorded and replayed for sequences of one length; leave them or the lengths out");
  if (kernels && recorded > 0 && c.run.overlap > 0)
    check.add({"run.overlap", "kernels.spans"},
              "run.overlap has no effect on recorded blocks; leave it out, or \"recorded\"");
  if (kernels && (recorded > 0) == c.input_selection.empty())
    check.add({"input.selection", "kernels.spans"},
              "kernels.spans = \"recorded\" and input.selection need each other (the file holds the blocks)");
  if (c.input_selection.empty() || kernels) return;
  if (c.kind == TaskKind::needle)
    check.add({"input.selection"}, "task.kind = \"needle\" looks at what ranking selects; leave input.selection out");
  if (c.model.layers > 1)
    check.add({"input.selection", "model.layers"}, "input.selection needs model.layers = 1 (a record is of one layer)");
  if (c.run.steps_per_graph > 1)
    check.add({"input.selection", "run.steps_per_graph"},
              "input.selection needs run.steps_per_graph = 1 (each step has lists of its own)");
}

/// Several query tokens in a decode step, and how many of them it accepts.
void check_query_tokens(const Config& c, Checker& check) {
  const bool several = std::ranges::any_of(c.run.query_tokens, [](std::int64_t tokens) { return tokens > 1; });
  if (several && !c.decodes())
    check.add({"run.query_tokens"}, "run.query_tokens needs task.kind = \"decode\" or \"mixed\"; leave it out");
  if (!several && c.run.accept < 1)
    check.add({"run.accept", "run.query_tokens"},
              "run.accept needs run.query_tokens above 1 (a step of one token has no draft tokens); leave it out");
  if (several && (c.output.selection || !c.input_selection.empty()))
    check.add({"output.selection", "input.selection", "run.query_tokens"},
              "selections are recorded and replayed for one query token a step; leave them or run.query_tokens out");
}

void check_run(const Config& c, Checker& check) {
  const RunConfig& r = c.run;
  if (r.warmup >= r.steps)
    check.add({"run.warmup", "run.steps"},
              fmt::format("run.warmup = {} must be less than run.steps = {} (warm-up counts among the steps)", r.warmup,
                          r.steps));
  if (check.valid({"parallel.heads", "model.n_kv_groups"}) && c.parallel.heads > 0 &&
      c.model.n_kv_groups % c.parallel.heads != 0)
    check.add({"parallel.heads", "model.n_kv_groups"},
              fmt::format("parallel.heads = {} must divide model.n_kv_groups = {} (a shard owns whole groups)",
                          c.parallel.heads, c.model.n_kv_groups));
  if (r.scope == Scope::attention && c.phi == PhiKind::mlp)
    check.add({"run.scope", "nsa.phi"}, "run.scope = \"attention\" needs nsa.phi = \"mean\" (it has no weights)");
  if (r.scope == Scope::attention && c.model.layers > 1)
    check.add({"run.scope", "model.layers"}, "run.scope = \"attention\" needs model.layers = 1 (q, k and v are given)");
  if (r.fill == CacheFill::synthetic && !c.input_file.empty())
    check.add({"run.fill", "input.file"},
              "run.fill = \"synthetic\" takes nothing from input.file; use fill = \"prefill\"");
  const bool repeats = c.kind == TaskKind::kernels || (c.kind != TaskKind::needle && r.scope == Scope::attention);
  if (r.overlap > 0 && (!repeats || !c.input_file.empty()))
    check.add({"run.overlap", "run.scope", "input.file"},
              "run.overlap needs synthetic q: run.scope = \"attention\" without input.file in decode and prefill, or "
              "task.kind = \"kernels\" (elsewhere q follows from x, or is given)");
  if (r.min_interval > 0 && (c.kind == TaskKind::kernels || c.kind == TaskKind::needle))
    check.add({"run.min_interval"},
              "run.min_interval needs task.kind = \"decode\" or \"prefill\" (the others have no modes); leave it out");
  if (c.output.file.empty()) check.add({"output.file"}, "output.file is empty; name the result file");
}

/// Lengths of a batch come from one place: run.context and run.batch, a list, a distribution, or a trace.
void check_batch(const Config& c, Checker& check) {
  const BatchConfig& b = c.batch;
  const auto has = [&](Distribution d) { return std::ranges::count(b.distribution, d) > 0; };
  const bool file = has(Distribution::file), listed = !b.context.empty(), several = b.distribution.size() > 1;
  const bool drawn = has(Distribution::uniform) || has(Distribution::lognormal) || has(Distribution::zipf);
  const bool context = c.run.context != RunConfig().context, batch = c.run.batch != RunConfig().batch;
  if ((drawn || file || listed) && !c.decodes())
    check.add(
        {"batch.context", "batch.distribution"},
        "[batch] gives sequences different lengths, which needs task.kind = \"decode\" or \"mixed\"; leave it out");
  if (listed && (several || !has(Distribution::equal)))
    check.add({"batch.distribution"}, "batch.context gives the lengths; leave batch.distribution out");
  if (listed && (context || batch))
    check.add({"run.context", "run.batch"}, "batch.context gives the lengths; leave run.context and run.batch out");
  if (file && context) check.add({"run.context"}, "batch.file gives the lengths; leave run.context out");
  if (file && several)
    check.add({"batch.distribution"},
              "batch.distribution = \"file\" has lengths of its own; give it alone, not in a list");
  if (file == b.file.empty())
    check.add({"batch.file", "batch.distribution"},
              file ? "batch.distribution = \"file\" needs batch.file; name the trace"
                   : "batch.file is read with batch.distribution = \"file\" only; set it");
  if (!drawn || !check.valid({"run.context", "batch.min", "batch.max"})) return;
  const auto [least, most] = std::ranges::minmax(c.run.context);
  if (b.least > least || b.most < most)
    check.add({"batch.min", "batch.max"},
              fmt::format("batch.min = {} and batch.max = {} must lie around run.context, the mean of the lengths",
                          b.least, b.most));
}

/// Pages hold whole selection blocks, so that a block is never in two of them.
void check_cache(const Config& c, Checker& check) {
  const CacheConfig& cache = c.cache;
  if (!cache.paged()) {
    if (cache.page != CacheConfig().page || cache.order != CacheConfig().order || cache.shared_prefix > 0)
      check.add(
          {"cache.page", "cache.order", "cache.shared_prefix"},
          "cache.page, cache.order and cache.shared_prefix need cache.layout = \"paged\"; set it, or leave them out");
    return;
  }
  if (!c.decodes() && c.kind != TaskKind::prefill)
    check.add({"cache.layout"},
              "cache.layout = \"paged\" needs task.kind = \"decode\", \"prefill\" or \"mixed\"; leave it out");
  if (check.valid({"cache.page", "nsa.l_sel"}) && cache.page % c.nsa.l_sel != 0)
    check.add({"cache.page", "nsa.l_sel"},
              fmt::format("cache.page = {} must be a multiple of nsa.l_sel = {} (a page holds whole selection blocks)",
                          cache.page, c.nsa.l_sel));
  const bool listed = !c.batch.context.empty(), drawn = c.batch.distribution.front() != Distribution::equal;
  if ((drawn && !listed) || !check.valid({"cache.shared_prefix", "run.context", "run.prefix", "batch.context"})) return;
  const std::int64_t shortest = c.prefix_of_batch() + std::ranges::min(listed ? c.batch.context : c.run.context);
  if (cache.shared_prefix > shortest)
    check.add({"cache.shared_prefix", "run.context", "batch.context"},
              fmt::format("cache.shared_prefix = {} must be at most {}, the tokens of the shortest sequence (every one "
                          "begins with it)",
                          cache.shared_prefix, shortest));
}

/// The chunk of a mixed step, and what its two parts cannot share.
void check_mixed(const Config& c, Checker& check) {
  if (check.valid({"run.prefill_chunk"}) && c.run.prefill_chunk == 0)
    check.add({"run.prefill_chunk", "task.kind"},
              "task.kind = \"mixed\" needs run.prefill_chunk, the tokens that each step prefills; set it, or use "
              "\"decode\"");
  if (check.valid({"run.prefix", "run.prefill_chunk"}) && c.run.prefix + c.run.prefill_chunk > token_range.most)
    check.add({"run.prefix", "run.prefill_chunk"},
              fmt::format("run.prefix + run.prefill_chunk = {} + {} is out of range; together at most {} positions",
                          c.run.prefix, c.run.prefill_chunk, token_range.most));
  const auto refuse = [&](const char* key, const char* why) {
    check.add({key}, fmt::format("{} needs task.kind = \"decode\" or \"prefill\" ({}); leave it out", key, why));
  };
  if (!c.input_file.empty()) refuse("input.file", "a mixed step has synthetic inputs");
  if (!c.input_selection.empty()) refuse("input.selection", "a mixed step ranks its blocks");
  if (c.output.selection) refuse("output.selection", "a record is of one part of a mixed step");
  if (!c.output.csv.empty()) refuse("output.csv", "its columns are of one part of a mixed step");
}

/// What a prefill finds in the caches, and its chunks.
void check_prefill(const Config& c, Checker& check) {
  if (c.kind == TaskKind::mixed) return check_mixed(c, check);
  if (c.kind != TaskKind::prefill) {
    if (c.run.prefix > 0)
      check.add({"run.prefix"},
                "run.prefix needs task.kind = \"prefill\" or \"mixed\" (other kinds say by run.context what the caches "
                "hold); leave it out");
    if (c.run.prefill_chunk > 0)
      check.add({"run.prefill_chunk"}, "run.prefill_chunk needs task.kind = \"prefill\" or \"mixed\"; leave it out");
    return;
  }
  if (!check.valid({"run.context", "run.prefix"})) return;
  const std::int64_t context = *std::max_element(c.run.context.begin(), c.run.context.end());
  if (c.run.prefix + context > token_range.most)
    check.add({"run.prefix", "run.context"},
              fmt::format("run.prefix + run.context = {} + {} is out of range; together at most {} positions",
                          c.run.prefix, context, token_range.most));
}

/// Why no selection of the last position can hold the block of a needle; "" if it can.
std::string why_never_found(const BlockRules& r, std::int64_t context, double depth) {
  const std::int64_t t = context - 1, position = std::llround(depth * static_cast<double>(t - 1));
  const std::int64_t block = position / r.l_sel, eligible = eligible_blocks(r, t);
  if (eligible <= r.n_sel || is_forced(r, block, t)) return "";
  if (r.n_sel <= r.n_init + r.n_local)
    return fmt::format(
        "nsa.n_sel = {} leaves no block beside the nsa.n_init + nsa.n_local = {} + {} that are always "
        "chosen); raise nsa.n_sel",
        r.n_sel, r.n_init, r.n_local);
  const std::int64_t tokens = compressed_tokens(r, t);
  if (tokens == 0 || position >= (tokens - 1) * r.d + r.l)
    return "no complete compression block covers it yet); raise nsa.n_local";
  return "";
}

/// A needle run has scope = "attention", without weights. One key has to point along all queries of its group.
void check_needle(const Config& c, Checker& check) {
  if (c.kind != TaskKind::needle) return;
  if (c.phi == PhiKind::mlp)
    check.add({"nsa.phi"}, "task.kind = \"needle\" needs nsa.phi = \"mean\" (it has no weights)");
  if (check.valid({"run.context"}) && std::count(c.run.context.begin(), c.run.context.end(), 1) > 0)
    check.add({"run.context"}, "run.context = 1 holds no needle (its last position asks); give at least 2");
  if (check.valid({"model.n_heads", "model.n_kv_groups", "model.d_k"}) &&
      2 * c.model.n_heads > c.model.d_k * c.model.n_kv_groups)
    check.add({"model.n_heads", "model.d_k"},
              fmt::format("task.kind = \"needle\" needs at most d_k / 2 = {} heads a group (one key points along all "
                          "queries of its group)",
                          c.model.d_k / 2));
  if (!check.valid(
          {"run.context", "needle.depths", "nsa.l", "nsa.d", "nsa.l_sel", "nsa.n_sel", "nsa.n_init", "nsa.n_local"}))
    return;
  for (const std::int64_t context : c.run.context)
    for (const double depth : c.needle.depths)
      if (const std::string why = why_never_found(c.nsa, context, depth); !why.empty())
        return check.add({"nsa.n_sel", "nsa.n_local", "needle.depths", "run.context"},
                         fmt::format("the needle at depth {} of {} tokens cannot be found ({}", depth, context, why));
}

/// Rows lie within the context, with enough selection blocks before the first row.
void check_kernels(const Config& c, Checker& check) {
  if (c.kind != TaskKind::kernels) return;
  const KernelsConfig& k = c.kernels;
  if (c.run.batch != std::vector<std::int64_t>{1} || c.run.force_branch != std::vector<std::int32_t>{-1})
    check.add({"run.batch", "run.force_branch"},
              "task.kind = \"kernels\" has one sequence and no gates; leave run.batch and run.force_branch out");
  if (!c.input_file.empty())
    check.add({"input.file"}, "task.kind = \"kernels\" has synthetic inputs; leave input.file out");
  if (!c.output.csv.empty() || c.output.tensors)
    check.add({"output.csv", "output.tensors"},
              "task.kind = \"kernels\" has no CSV and no tensors; leave output.csv and output.tensors out");
  if (!check.valid({"run.context", "kernels.rows", "kernels.blocks", "kernels.branch", "nsa.l_sel"})) return;
  const std::int64_t context = *std::min_element(c.run.context.begin(), c.run.context.end());
  const std::int64_t rows = *std::max_element(k.rows.begin(), k.rows.end());
  if (rows > context)
    check.add(
        {"kernels.rows", "run.context"},
        fmt::format("kernels.rows = {} must be at most run.context = {} (the rows end the context)", rows, context));
  if (std::count(k.branch.begin(), k.branch.end(), sel) == 0) return;
  const std::int64_t blocks = *std::max_element(k.blocks.begin(), k.blocks.end());
  const std::string needed = fmt::format(
      "kernels.blocks = {} needs as many blocks of {} tokens in front of the first row", blocks, c.nsa.l_sel);
  if (std::count(k.rows.begin(), k.rows.end(), 0) > 0)
    check.add({"kernels.rows", "kernels.blocks"},
              needed +
                  ", and kernels.rows = 0 (all positions) leaves none; give a number of rows, or leave sel out of "
                  "kernels.branch");
  else if ((context - rows) / c.nsa.l_sel < blocks)
    check.add({"kernels.blocks", "kernels.rows", "run.context"},
              needed + fmt::format("; raise run.context = {} or lower kernels.rows = {}", context, rows));
}

/// The largest tensor of any point has at most 2^50 elements, so that no index or byte count overflows.
void check_sizes(const Config& c, Checker& check) {
  if (!check.valid({"run.context", "run.batch", "run.steps", "run.query_tokens", "model.n_heads", "model.d_k",
                    "model.d_v", "model.dim"}))
    return;
  std::int64_t longest = *std::max_element(c.run.context.begin(), c.run.context.end());
  for (const std::int64_t length : c.batch.context) longest = std::max(longest, length);
  const std::int64_t tokens = *std::max_element(c.run.query_tokens.begin(), c.run.query_tokens.end());
  const double positions = static_cast<double>(longest) + static_cast<double>(c.run.prefix + c.run.steps * tokens);
  const double batch = static_cast<double>(*std::max_element(c.run.batch.begin(), c.run.batch.end()));
  if (batch * positions * values_per_position(c.model) > most_values)
    check.add({"run.context", "run.batch"},
              fmt::format("run.batch x run.context = {} x {} is too large for this model (2^50 values at most)", batch,
                          positions));
}

}  // namespace

void validate(const Config& config) {
  Checker check(config);
  visit_keys(config, check);
  check_layer(config, check);
  check_run(config, check);
  check_selections(config, check);
  check_query_tokens(config, check);
  check_batch(config, check);
  check_cache(config, check);
  check_launches(config, check);
  check_prefill(config, check);
  check_needle(config, check);
  check_kernels(config, check);
  check_sizes(config, check);
  check.finish();
}

}  // namespace nsa
