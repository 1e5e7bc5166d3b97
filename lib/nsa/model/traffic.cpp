#include "nsa/model/traffic.hpp"

#include "nsa/model/selections.hpp"
#include "nsa/results/schema.hpp"

namespace nsa {

std::vector<Exchange> exchanges(const Config& config, const Partition& p, const Point& point) {
  const LayerShape& s = p.shape;
  const bool prefill = config.kind == TaskKind::prefill;
  const std::int64_t storage = static_cast<std::int64_t>(size_of(s.dtype));
  const std::int64_t planes = point.batch * s.groups, width = (s.d_k + s.d_v) * storage;
  const std::int64_t rows = prefill ? point.batch * p.capacity(p.tokens(false), point.context) : point.batch;
  std::vector<Exchange> list;
  const auto gather = [&](const char* name, std::int64_t bytes) {
    if (p.kv > 1 && bytes > 0) list.push_back({name, "all_gather", p.kv, bytes});
  };
  if (prefill) {
    const std::int64_t tokens = p.capacity(p.tokens(false), point.context);
    const std::int64_t compressed = p.capacity(p.compressed(false), compressed_tokens(s.rules, point.context - 1));
    gather("raw halo", planes * p.capacity(p.raw_heads(false), point.context) * width);
    gather("k_cmp, v_cmp", planes * compressed * width);
    gather("k_sel, v_sel", planes * tokens * width);
    if (!s.shared_kv) gather("k_win, v_win", planes * tokens * width);
    gather("raw ring", planes * s.rules.l * width);
  } else {
    gather("lse", lse_slots(s, p.kv) * rows * s.heads() * 2 * 4);
    if (!replays(config))
      gather("candidates", rows * s.groups * s.rules.n_sel * static_cast<std::int64_t>(sizeof(Candidate)));
    gather("partials", partial_floats(s, rows) * 4);
  }
  if (p.heads > 1 && config.run.scope == Scope::layer)
    list.push_back({"heads", "all_reduce", p.heads, rows * s.dim * 4});
  return list;
}

std::vector<std::int64_t> modelled_bytes(const Config& config, const Partition& p, const Point& point) {
  const LayerShape& s = p.shape;
  const bool prefill = config.kind == TaskKind::prefill;
  const std::int64_t storage = static_cast<std::int64_t>(size_of(s.dtype)), t = total_positions(config, point) - 1;
  const std::int64_t planes = point.batch * s.groups, width = (s.d_k + s.d_v) * storage;
  const std::int64_t rows = prefill ? point.batch * owned_rows(p.tokens(false), point.context) : point.batch;
  const std::int64_t branches_kv = s.shared_kv ? 1 : branches;
  const ExpectedReads reads = expected_reads(s.rules, t);
  // Prefill: each K/V row once on every rank, since all are gathered. Decode: what one query row reads.
  const auto kv_rows = [&](Branch c) {
    if (!prefill) return planes * reads.branch[c] / p.kv;
    return planes * (c == cmp ? compressed_tokens(s.rules, t) : t + 1);
  };
  const std::int64_t q = rows * s.heads() * s.d_k * storage, o = rows * s.heads() * s.d_v * 4;
  std::vector<std::int64_t> bytes(stage_count, 0);
  const auto set = [&](Stage stage, std::int64_t n) { bytes[static_cast<int>(stage)] = config.model.layers * n; };
  if (config.run.scope == Scope::layer) {
    set(Stage::project, (qkv_columns(s) * (s.dim + rows) + rows * s.dim) * storage);
    set(Stage::output, (std::int64_t{s.heads()} * s.d_v * (s.dim + rows)) * storage + rows * s.dim * 4);
  }
  set(Stage::append, 2 * rows * s.groups * branches_kv * width);
  set(Stage::compress,
      prefill ? (rows * s.groups * width) + kv_rows(cmp) * width / p.kv : planes * width * (s.rules.l + 1) / s.rules.d);
  set(Stage::attend_cmp, kv_rows(cmp) * width + q + o + (prefill ? 0 : kv_rows(cmp) * s.heads_per_group * 4));
  set(Stage::rank, prefill || replays(config) ? 0 : kv_rows(cmp) * s.heads_per_group * 4);
  set(Stage::attend_sel, kv_rows(sel) * width + q + o);
  set(Stage::attend_win, kv_rows(win) * width + q + o);
  set(Stage::combine, o * branches * (prefill ? 1 : p.kv) + rows * s.heads() * s.d_v * storage);
  for (const Exchange& e : exchanges(config, p, point))
    bytes[static_cast<int>(Stage::comm)] += config.model.layers * e.bytes * (e.ranks - 1);
  for (int i = 0; i < static_cast<int>(Stage::step); ++i) bytes[static_cast<int>(Stage::step)] += bytes[i];
  return bytes;
}

}  // namespace nsa
