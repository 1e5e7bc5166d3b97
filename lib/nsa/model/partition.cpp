#include "nsa/model/partition.hpp"

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

namespace {

RowMap chunked(const Partition& p, std::int64_t chunk, std::int32_t halo, std::int64_t after, bool gathered) {
  if (p.kv == 1) return {};
  RowMap map;
  map.chunk = chunk;
  map.stride = halo + chunk + after;
  map.halo = halo;
  map.kv = p.kv;
  map.rank = gathered ? all_ranks : p.kv_rank;
  return map;
}

// Rows of a ring from which each query token of a step reads the `reach` rows up to its own. A step appends the rows of
// all its query tokens first. The ring is then of whole runs, and a run of positions one of slots.
constexpr std::int64_t ring_run = 64;
std::int64_t ring_rows(std::int64_t reach, std::int32_t query_tokens) {
  return query_tokens == 1 ? reach : (reach + query_tokens - 1 + ring_run - 1) / ring_run * ring_run;
}

RowMap ring_of(std::int64_t rows) {
  RowMap map;
  map.ring = rows;
  return map;
}

}  // namespace

RowMap Partition::tokens(bool gathered) const { return chunked(*this, chunk_tokens, 0, 0, gathered); }

RowMap Partition::compressed(bool gathered) const {
  return chunked(*this, shape.lse.segment, shape.rules.l / shape.rules.d - 1, 0, gathered);
}

RowMap Partition::raw_cmp() const { return chunked(*this, chunk_tokens, 0, shape.rules.l - shape.rules.d, false); }

RowMap Partition::raw_heads(bool gathered) const {
  RowMap map = chunked(*this, chunk_tokens, 0, 0, gathered);
  map.stride = shape.rules.l - shape.rules.d;
  return map;
}

RowMap Partition::window_ring() const { return ring_of(ring_rows(shape.rules.w, query_tokens)); }

RowMap Partition::window_share() const {
  RowMap map = window_ring();
  const std::int64_t run = query_tokens == 1 ? 1 : ring_run;
  map.slot_begin = kv_rank * (map.ring / run) / kv * run;
  map.slot_end = (kv_rank + 1) * (map.ring / run) / kv * run;
  return map;
}

RowMap Partition::raw_ring() const { return ring_of(ring_rows(shape.rules.l, query_tokens)); }

std::int64_t Partition::capacity(const RowMap& local, std::int64_t rows) const {
  if (local.ring > 0) return local.ring;
  // The last rows may already be in the halo before a chunk that has no own rows yet.
  return local.kv == 1 ? rows : owned_chunks(local, rows > 0 ? rows + local.halo : 0, 0) * local.stride;
}

std::pair<std::int32_t, std::int32_t> factorise(const Config& config, std::int32_t ranks) {
  const std::int64_t groups = config.model.n_kv_groups;
  std::int64_t heads = config.parallel.heads, kv = config.parallel.kv;
  if (heads == 0 && kv == 0) heads = std::gcd<std::int64_t>(ranks, groups);
  if (heads == 0) heads = std::max<std::int64_t>(1, ranks / kv);
  if (kv == 0) kv = std::max<std::int64_t>(1, ranks / heads);
  const std::string sizes = "parallel.heads = " + std::to_string(heads) + ", parallel.kv = " + std::to_string(kv);
  if (heads * kv != ranks)
    throw UserError(sizes + " need " + std::to_string(heads * kv) + " ranks (the run has " + std::to_string(ranks) +
                    "); start that many or set both to \"auto\"");
  if (groups % heads != 0)
    throw UserError(sizes + " cannot split model.n_kv_groups = " + std::to_string(groups) +
                    " (a shard owns whole groups); choose heads among the divisors of n_kv_groups");
  return {static_cast<std::int32_t>(heads), static_cast<std::int32_t>(kv)};
}

Partition make_partition(const Config& config, const Point& point, std::int32_t ranks, std::int32_t rank) {
  Partition p;
  std::tie(p.heads, p.kv) = factorise(config, ranks);
  p.head_shard = rank / p.kv;
  p.kv_rank = rank % p.kv;
  p.chunk_tokens = kv_chunk_blocks(config, point) * config.nsa.l_sel;
  p.query_tokens = static_cast<std::int32_t>(point.query_tokens);

  const ModelConfig& m = config.model;
  LayerShape& s = p.shape;
  s.groups = static_cast<std::int32_t>(m.n_kv_groups) / p.heads;
  s.heads_per_group = static_cast<std::int32_t>(m.n_heads / m.n_kv_groups);
  s.d_k = static_cast<std::int32_t>(m.d_k);
  s.d_v = static_cast<std::int32_t>(m.d_v);
  s.dim = static_cast<std::int32_t>(m.dim);
  s.dtype = m.precision;
  s.kv_precision = m.kv_precision;
  s.cmp_precision = m.cmp_precision;
  s.gate = m.gate;
  s.phi = config.phi;
  if (config.phi == PhiKind::mlp)
    s.phi_hidden = static_cast<std::int32_t>(config.phi_hidden > 0 ? config.phi_hidden : 2 * m.d_k);
  s.shared_kv = m.shared_kv;
  s.rope_base = m.rope_base;
  s.rules = config.nsa;
  s.lse.segment = p.chunk_tokens / s.rules.d;
  s.lse.buckets = std::lcm(24, p.kv);
  p.group_begin = p.head_shard * s.groups;
  return p;
}

ExpectedReads expected_reads(const BlockRules& r, std::int64_t t) {
  const std::int64_t blocks = std::min<std::int64_t>(r.n_sel, eligible_blocks(r, t));
  return {{compressed_tokens(r, t), (blocks - 1) * r.l_sel + t % r.l_sel + 1, std::min<std::int64_t>(r.w, t + 1)}};
}

std::int64_t nsa_vibe_reads(const BlockRules& r, std::int64_t t) {
  return compressed_tokens(r, t) + std::int64_t{r.n_sel} * r.l_sel + std::min<std::int64_t>(r.w, t + 1);
}

std::int64_t owned_rows(const RowMap& m, std::int64_t rows) {
  if (m.kv == 1) return rows;
  std::int64_t sum = 0;
  for (std::int64_t c = m.rank; c * m.chunk < rows; c += m.kv) sum += std::min(rows, (c + 1) * m.chunk) - c * m.chunk;
  return sum;
}

Span memory_rows(const RowMap& m, const Span& positions) {
  return {chunk_of(m, positions.first) / m.kv * m.stride, (chunk_of(m, positions.end - 1) / m.kv + 1) * m.stride};
}

std::vector<Span> PrefillRange::chunks() const {
  std::vector<Span> spans;
  for (std::int64_t at = first; at < end; at = spans.back().end) spans.push_back({at, at + std::min(chunk, end - at)});
  return spans;
}

std::int64_t widest_chunk(const RowMap& m, const PrefillRange& range) {
  std::int64_t widest = 0;
  for (const Span& chunk : range.chunks()) {
    const Span rows = memory_rows(m, chunk);
    widest = std::max(widest, rows.end - rows.first);
  }
  return widest;
}

PrefillRange prefill_range(const Config& config, const Point& point) {
  PrefillRange range{config.run.prefix, total_positions(config, point)};
  if (config.run.prefill_chunk > 0) range.chunk = config.run.prefill_chunk;
  return range;
}

std::int64_t total_positions(const Config& config, const Point& point) {
  return point.longest() +
         (config.kind == TaskKind::prefill ? config.run.prefix : config.run.steps * point.query_tokens);
}

}  // namespace nsa
