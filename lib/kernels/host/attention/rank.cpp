// Importance of the selection blocks and the top n of them (paper, equations 8 to 12).
//
// Tiling: one item a (row, group); with few items their compressed tokens are split in spans of 1024. Bytes: the raw
// scores once. Work: one exponential a score; bound by that on few threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

constexpr std::int64_t span_tokens = 1024;  ///< compressed tokens of a span, where items are split

/// Softmax normaliser of one row and head: maximum and sum exp(score - m).
struct LogSumExp {
  float m = neg_inf, z = 0.0f;
};

/// Merges all LSE buckets by rising bucket: every rank of every kv layout gets the same bits.
LogSumExp merge_buckets(const RankArgs& args, std::int64_t row_head) {
  const std::int64_t row_heads = args.tile.rows() * args.shape.heads();
  const std::int64_t slots = lse_slots(args.shape, args.lse_ranks);
  LogSumExp total;
  for (std::int64_t x = 0; x < args.shape.lse.buckets; ++x) {
    const std::int64_t slot = x % args.lse_ranks * slots + x / args.lse_ranks;
    const float* ms = args.lse + (slot * row_heads + row_head) * 2;
    if (ms[0] == neg_inf) continue;
    if (ms[0] <= total.m) {  // the other factor would be exp(0) = 1 exactly
      total.z += ms[1] * exponential(ms[0] - total.m);
    } else {
      total.z = total.z * exponential(total.m - ms[0]) + ms[1];
      total.m = ms[0];
    }
  }
  return total;
}

/// One row and group. `p`: normalised probabilities summed over the heads, by compressed token.
struct RankItem {
  std::int64_t row, group, t, valid;
  float* p;
};

RankItem rank_item_of(const RankArgs& args, std::int64_t index, float* p) {
  RankItem item;
  item.row = index / args.shape.groups;
  item.group = index % args.shape.groups;
  item.t = position_of_row(args.tile, item.row);
  item.valid = compressed_tokens(args.shape.rules, item.t);
  item.p = p;
  return item;
}

/// p of the tokens [begin, end), which are contiguous seen from chunk c, summed over the heads.
void sum_probabilities(const RankArgs& args, const RankItem& item, const std::vector<LogSumExp>& heads, std::int64_t c,
                       std::int64_t begin, std::int64_t end) {
  const LayerShape& s = args.shape;
  const float* scores = static_cast<const float*>(args.scores);
  const std::int64_t row_heads = args.tile.rows() * s.heads();
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t slot = score_slot(args.cmp_map, c, i);
    const int n = static_cast<int>(std::min(end - i, score_block - slot % score_block));
    std::fill_n(item.p + i, n, 0.0f);
    for (std::int32_t j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t row_head = item.row * s.heads() + item.group * s.heads_per_group + j;
      const float* from = scores + score_offset(slot, row_heads, row_head);
      // The next score block is row_heads blocks away: beyond the hardware prefetcher's stride.
      for (int k = 0; k < score_block; k += simd_lanes) __builtin_prefetch(from + row_heads * score_block + k);
      add_probabilities(n, from, heads[j].m, 1.0f / heads[j].z, item.p + i);
    }
    i += n;
  }
}

/// p of the compressed tokens [begin, end) that this rank scored.
void sum_heads(const RankArgs& args, const RankItem& item, std::int64_t begin, std::int64_t end) {
  const RowMap& map = args.cmp_map;
  std::vector<LogSumExp> heads;
  for (std::int32_t j = 0; j < args.shape.heads_per_group; ++j)
    heads.push_back(merge_buckets(args, item.row * args.shape.heads() + item.group * args.shape.heads_per_group + j));
  if (holds_all_chunks(map)) return sum_probabilities(args, item, heads, 0, begin, end);
  for (std::int64_t c = begin / map.chunk; c * map.chunk - map.halo < end; ++c) {
    if (!has_chunk(map, c)) continue;
    const std::int64_t first = std::max({begin, c * map.chunk - map.halo, std::int64_t{0}});
    sum_probabilities(args, item, heads, c, first, std::min(end, (c + 1) * map.chunk));
  }
}

/// Weights ov(i, j) of the tokens i = j * l'/d - halo, …: the same for every block j.
struct Overlaps {
  explicit Overlaps(const BlockRules& r) : halo(r.l / r.d - 1), ratio(r.l_sel / r.d) {
    const std::int64_t j = r.l;  // any block whose tokens all have i >= 0
    for (std::int64_t i = j * ratio - halo; i < (j + 1) * ratio; ++i) weight.push_back(overlap(r, i, j));
  }
  std::int64_t halo, ratio;
  std::vector<float> weight;
};

float importance(const Overlaps& overlaps, const RankItem& item, std::int64_t j) {
  const std::int64_t start = j * overlaps.ratio - overlaps.halo;
  const std::int64_t end =
      std::min<std::int64_t>(static_cast<std::int64_t>(overlaps.weight.size()), item.valid - start);
  float sum = 0.0f;
  for (std::int64_t k = std::max<std::int64_t>(0, -start); k < end; ++k) sum += item.p[start + k] * overlaps.weight[k];
  return sum;
}

/// Score descending, block ascending.
bool is_better(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.block < b.block;
}

/// Keeps the best n of `candidates`, in order; a NaN counts as the worst score so that the order stays total.
void keep_top_n(std::vector<Candidate>& candidates, std::int32_t n) {
  for (Candidate& c : candidates)
    if (std::isnan(c.score)) c.score = neg_inf;
  const auto kept = candidates.begin() + std::min<std::ptrdiff_t>(n, candidates.end() - candidates.begin());
  std::partial_sort(candidates.begin(), kept, candidates.end(), is_better);
  candidates.erase(kept, candidates.end());
}

void store_selected(const std::vector<Candidate>& best, std::int32_t n, std::int32_t* selected) {
  std::fill_n(selected, n, -1);
  for (std::size_t i = 0; i < best.size(); ++i) selected[i] = best[i].block;
  std::sort(selected, selected + best.size());
}

void select_blocks(const RankArgs& args, const Overlaps& overlaps, const RankItem& item,
                   std::vector<Candidate>& candidates) {
  const LayerShape& s = args.shape;
  const BlockRules& rules = s.rules;
  const std::int64_t row_group = item.row * s.groups + item.group;
  float* p_slc = args.p_slc ? args.p_slc + row_group * args.p_slc_blocks : nullptr;
  if (p_slc) std::fill_n(p_slc, args.p_slc_blocks, 0.0f);
  candidates.clear();
  const std::int64_t eligible = eligible_blocks(rules, item.t);
  for (std::int64_t j = 0; j < eligible; ++j) {
    if (!has_chunk(args.token_map, chunk_of(args.token_map, j * rules.l_sel))) continue;
    const float score = importance(overlaps, item, j);
    if (p_slc && j < args.p_slc_blocks) p_slc[j] = score;
    candidates.push_back({is_forced(rules, j, item.t) ? -neg_inf : score, static_cast<std::int32_t>(j)});
  }
  keep_top_n(candidates, rules.n_sel);
  if (args.selected) store_selected(candidates, rules.n_sel, args.selected + row_group * rules.n_sel);
  if (!args.candidates) return;
  Candidate* out = args.candidates + row_group * rules.n_sel;
  std::fill_n(out, rules.n_sel, Candidate{});
  std::copy(candidates.begin(), candidates.end(), out);
}

/// Whether the tokens of an item run on several threads: with fewer items than keep the threads busy.
bool splits_tokens(std::int64_t items) { return items < 2 * threads(); }

std::int64_t padded_tokens(const LayerShape& s, const QueryTile& tile) {
  return round_up(std::max<std::int64_t>(1, compressed_tokens(s.rules, tile.max_positions - 1)), simd_lanes);
}

}  // namespace

std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t items = tile.rows() * s.groups;
  Arena arena;
  arena.allocate<float>((splits_tokens(items) ? items : threads()) * padded_tokens(s, tile));
  return arena.used();
}

void rank(const RankArgs& args, Stream*) {
  const std::int64_t items = args.tile.rows() * args.shape.groups;
  const std::int64_t width = padded_tokens(args.shape, args.tile);
  const bool split_tokens = splits_tokens(items);
  Arena arena(args.scratch, args.scratch_bytes);
  float* p = arena.allocate<float>((split_tokens ? items : threads()) * width);
  const Overlaps overlaps(args.shape.rules);
  const std::int64_t spans = (width + span_tokens - 1) / span_tokens;
#pragma omp parallel
  {
    std::vector<Candidate> candidates;
    if (split_tokens) {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < items * spans; ++i) {
        const RankItem item = rank_item_of(args, i / spans, p + i / spans * width);
        const std::int64_t begin = i % spans * span_tokens;
        sum_heads(args, item, begin, std::min(begin + span_tokens, item.valid));
      }
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items; ++i) {
      const RankItem item = rank_item_of(args, i, p + (split_tokens ? i : omp_get_thread_num()) * width);
      if (!split_tokens) sum_heads(args, item, 0, item.valid);
      select_blocks(args, overlaps, item, candidates);
    }
  }
}

void select(const SelectArgs& args, Stream*) {
  const std::int32_t n = args.shape.rules.n_sel;
  const std::int64_t row_groups = args.tile.rows() * args.shape.groups;
#pragma omp parallel
  {
    std::vector<Candidate> candidates;
#pragma omp for
    for (std::int64_t i = 0; i < row_groups; ++i) {
      candidates.clear();
      for (std::int32_t r = 0; r < args.ranks; ++r) {
        const Candidate* from = args.candidates + (r * row_groups + i) * n;
        for (std::int32_t k = 0; k < n; ++k)
          if (from[k].block >= 0) candidates.push_back(from[k]);
      }
      keep_top_n(candidates, n);
      store_selected(candidates, n, args.selected + i * n);
    }
  }
}

}  // namespace nsa::host
