#include "nsa/model/traffic.hpp"

#include <algorithm>
#include <iterator>

#include "nsa/model/pages.hpp"
#include "nsa/model/selections.hpp"
#include "nsa/results/schema.hpp"

namespace nsa {
namespace {

double triangle(double n) { return n * (n + 1) / 2; }

/// Tokens that all queries of one sequence and group read, by branch: the sums of expected_reads over [0, tokens).
struct SummedReads {
  double branch[branches];
};
SummedReads summed_reads(const BlockRules& r, std::int64_t tokens) {
  const auto real = [](std::int64_t n) { return static_cast<double>(n); };
  SummedReads sum{};
  if (tokens >= r.l) {
    const std::int64_t last = tokens - r.l, q = last / r.d;
    sum.branch[cmp] = real(last + 1) + real(r.d) * triangle(real(q - 1)) + real(q * (last % r.d + 1));
  }
  const std::int64_t whole = std::min<std::int64_t>(tokens, std::int64_t{r.n_sel} * r.l_sel), rest = tokens - whole;
  sum.branch[sel] = triangle(real(whole)) + real(rest) * real(r.n_sel - 1) * real(r.l_sel) +
                    real(rest / r.l_sel) * triangle(real(r.l_sel)) + triangle(real(rest % r.l_sel));
  const std::int64_t ramp = std::min<std::int64_t>(tokens, r.w);
  sum.branch[win] = triangle(real(ramp)) + real(tokens - ramp) * real(r.w);
  return sum;
}

/// K/V rows of a branch that a prefill reads where every chunk reads each row once, for one (sequence, group).
std::int64_t prefill_kv_rows(const Config& config, const Point& point, Branch c) {
  std::int64_t rows = 0;
  for (const Span& chunk : prefill_range(config, point).chunks())
    rows += c == cmp   ? compressed_tokens(config.nsa, chunk.end - 1)
            : c == sel ? chunk.end
                       : chunk.end - window_begin(config.nsa, chunk.first);
  return rows;
}

/// Bytes of a K and a V row of the caches of a branch, scales included.
std::int64_t kv_row_bytes(const LayerShape& s, KvPrecision precision) {
  return row_bytes(s.dtype, precision, s.d_k) + row_bytes(s.dtype, precision, s.d_v);
}

/// Bytes of one rank's rows that a prefill gathers of selected and of window tokens, of `width` bytes each.
struct TokenGathers {
  std::int64_t sel = 0, win = 0;
  TokenGathers(const Config& config, const Partition& p, const Point& point, std::int64_t width) {
    const PrefillRange range = prefill_range(config, point);
    const RowMap map = p.tokens(false);
    const std::int64_t whole = p.capacity(map, range.end), times = std::ssize(range.chunks());
    sel = win = whole * width;
    if (p.kv == 1 || !range.in_parts()) return;
    const std::int64_t piece = widest_chunk(map, range);
    const std::int64_t wholes = config.model.layers > 1 ? times : range.first > 0 ? 1 : 0;
    sel = (wholes * whole + (times - wholes) * piece) * width;
    win = times * piece * width;
  }
};

/// Compressed tokens of one group that sequences read of pages which another has read before: their bytes are moved
/// once. The blocks that sequences choose of a shared prefix need not be the same.
std::int64_t shared_tokens(const Config& config, const Partition& p, const Point& point) {
  if (!config.cache.paged()) return 0;
  return (point.batch - 1) * cmp_pages(config, p, point).shared * p.shape.lse.segment;
}

/// K/V rows of a branch that the query tokens of a sequence at positions [first, first + tokens) read, each row once,
/// for one group.
std::int64_t step_kv_rows(const BlockRules& r, std::int64_t first, std::int64_t tokens, Branch c) {
  const std::int64_t last = first + tokens - 1;
  if (c == win) return last + 1 - window_begin(r, first);
  std::int64_t rows = expected_reads(r, last).branch[c];
  if (c == sel) rows += (tokens - 1) * std::max<std::int64_t>(0, r.n_sel - r.n_init - r.n_local) * r.l_sel;
  return c == sel ? std::min(rows, last + 1) : rows;
}

}  // namespace

std::vector<Exchange> exchanges(const Config& config, const Partition& p, const Point& point, bool one_launch) {
  const LayerShape& s = p.shape;
  const bool prefill = config.kind == TaskKind::prefill;
  const std::int64_t storage = static_cast<std::int64_t>(size_of(s.dtype));
  const std::int64_t planes = point.batch * s.groups, width = (s.d_k + s.d_v) * storage;
  const std::int64_t total = total_positions(config, point), tokens = p.capacity(p.tokens(false), total);
  const std::int64_t rows = prefill ? point.batch * (tokens - owned_rows(p.tokens(false), config.run.prefix))
                                    : point.batch * point.query_tokens;
  std::vector<Exchange> list;
  const auto gather = [&](const char* name, std::int64_t bytes) {
    if (p.kv > 1 && bytes > 0) list.push_back({name, "all_gather", p.kv, bytes});
  };
  if (prefill) {
    const std::int64_t times = std::ssize(prefill_range(config, point).chunks());
    const std::int64_t compressed = p.capacity(p.compressed(false), compressed_tokens(s.rules, total - 1));
    const TokenGathers of(config, p, point, planes * kv_row_bytes(s, s.kv_precision));
    gather("raw halo", times * planes * p.capacity(p.raw_heads(false), total) * width);
    gather("k_cmp, v_cmp", times * planes * compressed * kv_row_bytes(s, s.cmp_precision));
    gather("k_sel, v_sel", of.sel);
    if (!s.shared_kv) gather("k_win, v_win", of.win);
    gather("raw ring", times * planes * s.rules.l * width);
  } else {
    gather("lse", lse_slots(s, p.kv) * rows * s.heads() * 2 * 4);
    if (!replays(config))
      gather("candidates", rows * s.groups * s.rules.n_sel * static_cast<std::int64_t>(sizeof(Candidate)));
    gather("partials", partial_floats(s, rows) * 4);
  }
  const bool layer = config.run.scope == Scope::layer;
  if (one_launch && p.kv > 1 && layer) list.push_back({"outputs over kv", "all_reduce", p.kv, rows * s.dim * 4});
  if (p.heads > 1 && layer) list.push_back({"outputs", "all_reduce", p.heads, rows * s.dim * 4});
  return list;
}

std::vector<std::int64_t> modelled_bytes(const Config& config, const Partition& p, const Point& point) {
  const LayerShape& s = p.shape;
  const bool prefill = config.kind == TaskKind::prefill;
  const std::int64_t storage = static_cast<std::int64_t>(size_of(s.dtype)), t = total_positions(config, point) - 1;
  const std::int64_t planes = point.batch * s.groups, width = (s.d_k + s.d_v) * storage;
  const RowMap map = p.tokens(false);
  const std::int64_t rows = prefill ? point.batch * (owned_rows(map, t + 1) - owned_rows(map, config.run.prefix))
                                    : point.batch * point.query_tokens;
  const std::int64_t branches_kv = s.shared_kv ? 1 : branches;
  // Prefill: on every rank, since all are gathered. Decode: what the query rows read.
  const auto kv_rows = [&](Branch c) {
    if (prefill) return planes * prefill_kv_rows(config, point, c);
    std::int64_t reads = 0;
    for (std::int64_t b = 0; b < point.batch; ++b)
      reads +=
          step_kv_rows(s.rules, point.length(b) + (config.run.steps - 1) * point.query_tokens, point.query_tokens, c);
    return s.groups * reads / p.kv - (c == cmp ? s.groups * shared_tokens(config, p, point) : 0);
  };
  const std::int64_t completed = compressed_tokens(s.rules, t) - compressed_tokens(s.rules, config.run.prefix - 1);
  const std::int64_t q = rows * s.heads() * s.d_k * storage, o = rows * s.heads() * s.d_v * 4;
  std::vector<std::int64_t> bytes(stage_count, 0);
  const auto set = [&](Stage stage, std::int64_t n) { bytes[static_cast<int>(stage)] = config.model.layers * n; };
  if (config.run.scope == Scope::layer) {
    set(Stage::project, (qkv_columns(s) * (s.dim + rows) + rows * s.dim) * storage);
    set(Stage::output, (std::int64_t{s.heads()} * s.d_v * (s.dim + rows)) * storage + rows * s.dim * 4);
  }
  const auto cached = [&](Branch c) { return kv_row_bytes(s, s.precision_of(c)); };
  // Read in storage type, written as cached; cmp: the raw rows.
  const std::int64_t written = s.shared_kv ? cached(sel) : cached(sel) + cached(win) + width;
  set(Stage::append, rows * s.groups * (branches_kv * width + written));
  set(Stage::compress, prefill ? (rows * s.groups * width) + planes * completed * cached(cmp) / p.kv
                               : planes * point.query_tokens * (width * s.rules.l + cached(cmp)) / s.rules.d);
  const std::int64_t scores = kv_rows(cmp) * point.query_tokens * s.heads_per_group * 4;
  set(Stage::attend_cmp, kv_rows(cmp) * cached(cmp) + q + o + (prefill ? 0 : scores));
  set(Stage::rank, prefill || replays(config) ? 0 : scores);
  set(Stage::attend_sel, kv_rows(sel) * cached(sel) + q + o);
  set(Stage::attend_win, kv_rows(win) * cached(win) + q + o);
  set(Stage::combine, o * branches * (prefill ? 1 : p.kv) + rows * s.heads() * s.d_v * storage);
  for (const Exchange& e : exchanges(config, p, point))
    bytes[static_cast<int>(Stage::comm)] += config.model.layers * e.bytes * (e.ranks - 1);
  for (int i = 0; i < static_cast<int>(Stage::step); ++i) bytes[static_cast<int>(Stage::step)] += bytes[i];
  return bytes;
}

double modelled_flops(const Config& config, const Partition& p, const Point& point) {
  const LayerShape& s = p.shape;
  const bool prefill = config.kind == TaskKind::prefill;
  const double batch = static_cast<double>(point.batch), kv = p.kv, heads = s.heads(), width = s.d_k + s.d_v;
  SummedReads reads{};
  if (prefill) {
    const PrefillRange range = prefill_range(config, point);
    const SummedReads prefix = summed_reads(s.rules, range.first);
    reads = summed_reads(s.rules, range.end);
    for (int b = 0; b < branches; ++b) reads.branch[b] -= prefix.branch[b];
  } else {
    const ExpectedReads last = expected_reads(s.rules, total_positions(config, point) - 1);
    for (int b = 0; b < branches; ++b)
      reads.branch[b] = static_cast<double>(last.branch[b]) * static_cast<double>(point.query_tokens);
  }
  for (double& count : reads.branch) count *= batch / kv;
  const double rows =
      batch * (prefill ? static_cast<double>(point.context) / kv : static_cast<double>(point.query_tokens));
  const double hidden = s.phi_hidden, token = hidden == 0 ? s.rules.l * width : 2 * hidden * (s.rules.l + 1) * width;
  double flops = rows / s.rules.d * s.groups * token + (replays(config) ? 0 : 2 * heads * reads.branch[cmp]) +
                 2 * branches * rows * heads * s.d_v * (prefill ? 1 : kv);
  for (const double count : reads.branch) flops += 2 * heads * count * width;
  if (config.run.scope == Scope::layer)
    flops += 2 * rows * s.dim * static_cast<double>(qkv_columns(s)) + 2 * rows * heads * s.d_v * s.dim;
  return static_cast<double>(config.model.layers) * flops;
}

}  // namespace nsa
