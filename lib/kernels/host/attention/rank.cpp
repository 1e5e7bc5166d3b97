// Importance of the selection blocks and the best n of them (design sections 2.5 and 2.6).
//
// Bytes: the raw scores once. Work: one exponential a score; bound by that on few threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host/attention/score_layout.hpp"
#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t span_tokens = 1024;  ///< compressed tokens one thread takes when rows are few

struct Normaliser {
  float m = -infinity, z = 0.0f;
};

/// All lanes merged by rising lane, so that every rank of every kv layout gets the same bits.
Normaliser merge_lanes(const RankArgs& args, std::int64_t row_head) {
  const std::int64_t row_heads = args.tile.rows() * args.shape.heads();
  const std::int64_t slots = lse_slots(args.shape, args.lse_ranks);
  Normaliser total;
  for (std::int64_t x = 0; x < args.shape.lse.buckets; ++x) {
    const std::int64_t slot = x % args.lse_ranks * slots + x / args.lse_ranks;
    const float* lane = args.lse + (slot * row_heads + row_head) * 2;
    if (lane[0] == -infinity) continue;
    if (lane[0] <= total.m) {  // the other factor would be exp(0) = 1 exactly
      total.z += lane[1] * exponential(lane[0] - total.m);
    } else {
      total.z = total.z * exponential(total.m - lane[0]) + lane[1];
      total.m = lane[0];
    }
  }
  return total;
}

/// One row and group. `p`: normalised probabilities summed over the heads, by compressed token.
struct RankTask {
  std::int64_t row, group, t, valid;
  float* p;
};

RankTask task_of(const RankArgs& args, std::int64_t index, float* p) {
  RankTask task;
  task.row = index / args.shape.groups;
  task.group = index % args.shape.groups;
  task.t = *args.tile.first_position + task.row % args.tile.tokens;
  task.valid = compressed_tokens(args.shape.rules, task.t);
  task.p = p;
  return task;
}

void add_run(const RankArgs& args, const RankTask& task, const std::vector<Normaliser>& heads, std::int64_t c,
             std::int64_t begin, std::int64_t end) {
  const LayerShape& s = args.shape;
  const float* scores = static_cast<const float*>(args.scores);
  const std::int64_t row_heads = args.tile.rows() * s.heads();
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t slot = score_slot(args.cmp_map, c, i);
    const int n = static_cast<int>(std::min(end - i, score_block - slot % score_block));
    std::fill_n(task.p + i, n, 0.0f);
    for (std::int32_t j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t row_head = task.row * s.heads() + task.group * s.heads_per_group + j;
      const float* from = scores + score_offset(slot, row_heads, row_head);
      // The next block is row_heads blocks away, which the processor does not foresee.
      for (int k = 0; k < score_block; k += lanes) __builtin_prefetch(from + row_heads * score_block + k);
      add_probabilities(n, from, heads[j].m, 1.0f / heads[j].z, task.p + i);
    }
    i += n;
  }
}

/// p of the compressed tokens [begin, end) that were scored here.
void sum_heads(const RankArgs& args, const RankTask& task, std::int64_t begin, std::int64_t end) {
  const RowMap& map = args.cmp_map;
  std::vector<Normaliser> heads;
  for (std::int32_t j = 0; j < args.shape.heads_per_group; ++j)
    heads.push_back(merge_lanes(args, task.row * args.shape.heads() + task.group * args.shape.heads_per_group + j));
  if (holds_all(map)) return add_run(args, task, heads, 0, begin, end);
  for (std::int64_t c = begin / map.chunk; c * map.chunk - map.halo < end; ++c) {
    if (!has_chunk(map, c)) continue;
    const std::int64_t first = std::max({begin, c * map.chunk - map.halo, std::int64_t{0}});
    add_run(args, task, heads, c, first, std::min(end, (c + 1) * map.chunk));
  }
}

/// ov(i, j) for the tokens i = j * l'/d - lead, …: the same for every block.
struct Overlaps {
  explicit Overlaps(const BlockRules& r) : lead(r.l / r.d - 1), ratio(r.l_sel / r.d) {
    const std::int64_t j = r.l;  // far enough from 0
    for (std::int64_t i = j * ratio - lead; i < (j + 1) * ratio; ++i) weight.push_back(overlap(r, i, j));
  }
  std::int64_t lead, ratio;
  std::vector<float> weight;
};

float importance(const Overlaps& overlaps, const RankTask& task, std::int64_t j) {
  const std::int64_t start = j * overlaps.ratio - overlaps.lead;
  const std::int64_t end =
      std::min<std::int64_t>(static_cast<std::int64_t>(overlaps.weight.size()), task.valid - start);
  float sum = 0.0f;
  for (std::int64_t k = std::max<std::int64_t>(0, -start); k < end; ++k) sum += task.p[start + k] * overlaps.weight[k];
  return sum;
}

bool better(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score > b.score : a.block < b.block;
}

/// The best n of `list` in order; a NaN counts as the worst score so that the order stays total.
void keep_best(std::vector<Candidate>& list, std::int32_t n) {
  for (Candidate& c : list)
    if (std::isnan(c.score)) c.score = -infinity;
  const auto kept = list.begin() + std::min<std::ptrdiff_t>(n, list.end() - list.begin());
  std::partial_sort(list.begin(), kept, list.end(), better);
  list.erase(kept, list.end());
}

void write_selected(const std::vector<Candidate>& best, std::int32_t n, std::int32_t* selected) {
  std::fill_n(selected, n, -1);
  for (std::size_t i = 0; i < best.size(); ++i) selected[i] = best[i].block;
  std::sort(selected, selected + best.size());
}

void choose(const RankArgs& args, const Overlaps& overlaps, const RankTask& task, std::vector<Candidate>& list) {
  const LayerShape& s = args.shape;
  const BlockRules& rules = s.rules;
  const std::int64_t row_group = task.row * s.groups + task.group;
  float* p_slc = args.p_slc ? args.p_slc + row_group * args.p_slc_blocks : nullptr;
  if (p_slc) std::fill_n(p_slc, args.p_slc_blocks, 0.0f);
  list.clear();
  const std::int64_t eligible = eligible_blocks(rules, task.t);
  for (std::int64_t j = 0; j < eligible; ++j) {
    if (!has_chunk(args.token_map, chunk_of(args.token_map, j * rules.l_sel))) continue;
    const float score = importance(overlaps, task, j);
    if (p_slc && j < args.p_slc_blocks) p_slc[j] = score;
    list.push_back({is_forced(rules, j, task.t) ? infinity : score, static_cast<std::int32_t>(j)});
  }
  keep_best(list, rules.n_sel);
  if (args.selected) write_selected(list, rules.n_sel, args.selected + row_group * rules.n_sel);
  if (!args.candidates) return;
  Candidate* out = args.candidates + row_group * rules.n_sel;
  std::fill_n(out, rules.n_sel, Candidate{});
  std::copy(list.begin(), list.end(), out);
}

bool splits(std::int64_t tasks) { return tasks < 2 * threads(); }

std::int64_t padded_tokens(const LayerShape& s, const QueryTile& tile) {
  return round_up(std::max<std::int64_t>(1, compressed_tokens(s.rules, tile.max_positions - 1)), lanes);
}

}  // namespace

std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t tasks = tile.rows() * s.groups;
  Arena arena;
  arena.take<float>((splits(tasks) ? tasks : threads()) * padded_tokens(s, tile));
  return arena.used();
}

void rank(const RankArgs& args, Stream*) {
  const std::int64_t tasks = args.tile.rows() * args.shape.groups;
  const std::int64_t width = padded_tokens(args.shape, args.tile);
  const bool split = splits(tasks);
  Arena arena(args.scratch, args.scratch_bytes);
  float* p = arena.take<float>((split ? tasks : threads()) * width);
  const Overlaps overlaps(args.shape.rules);
  const std::int64_t spans = (width + span_tokens - 1) / span_tokens;
#pragma omp parallel
  {
    std::vector<Candidate> list;
    if (split) {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < tasks * spans; ++i) {
        const RankTask task = task_of(args, i / spans, p + i / spans * width);
        const std::int64_t begin = i % spans * span_tokens;
        sum_heads(args, task, begin, std::min(begin + span_tokens, task.valid));
      }
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < tasks; ++i) {
      const RankTask task = task_of(args, i, p + (split ? i : omp_get_thread_num()) * width);
      if (!split) sum_heads(args, task, 0, task.valid);
      choose(args, overlaps, task, list);
    }
  }
}

void select(const SelectArgs& args, Stream*) {
  const std::int32_t n = args.shape.rules.n_sel;
  const std::int64_t row_groups = args.tile.rows() * args.shape.groups;
#pragma omp parallel
  {
    std::vector<Candidate> list;
#pragma omp for
    for (std::int64_t i = 0; i < row_groups; ++i) {
      list.clear();
      for (std::int32_t r = 0; r < args.ranks; ++r) {
        const Candidate* from = args.candidates + (r * row_groups + i) * n;
        for (std::int32_t k = 0; k < n; ++k)
          if (from[k].block >= 0) list.push_back(from[k]);
      }
      keep_best(list, n);
      write_selected(list, n, args.selected + i * n);
    }
  }
}

}  // namespace nsa::host
