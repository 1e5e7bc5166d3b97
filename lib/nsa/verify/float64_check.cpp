#include "nsa/verify/float64_check.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "nsa/model/inputs.hpp"
#include "nsa/results/error_bound.hpp"

namespace nsa {

namespace {

using Rows = std::vector<float>;  // [rows][width]

// The given rows of a view on this rank. With exchanges each row comes from the kv rank that holds it.
Rows fetch(const StepContext& ctx, const KvView& view, std::int64_t plane, const std::vector<std::int64_t>& rows) {
  ModelShard& shard = ctx.shard;
  const DType type = shard.shape().dtype;
  StoredRows stored = empty_rows(std::ssize(rows), view, type);
  for (std::size_t i = 0; i < rows.size(); ++i)
    if (has_row(view.map, rows[i])) get_row(shard, view, plane, rows[i], stored, static_cast<std::int64_t>(i));
  shard.device().synchronize(shard.streams.compute);
  Rows values = from_cache(stored, view, type);
  if (ctx.exchanges) shard.comms->kv_control.sum(values);
  return values;
}

std::vector<std::int64_t> range(std::int64_t first, std::int64_t last) {
  std::vector<std::int64_t> rows(static_cast<std::size_t>(std::max<std::int64_t>(0, last - first)));
  std::iota(rows.begin(), rows.end(), first);
  return rows;
}

struct Softmax {
  std::vector<double> p;
  double largest_score;  ///< magnitude
};

Softmax softmax(const float* q, const Rows& k, std::int64_t width) {
  std::vector<double> p(k.size() / width);
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    double dot = 0;
    for (std::int64_t e = 0; e < width; ++e) dot += double{q[e]} * k[i * width + e];
    max = std::max(max, p[i] = dot / std::sqrt(static_cast<double>(width)));
  }
  const double largest = largest_magnitude(p);
  for (double& x : p) sum += x = std::exp(x - max);
  for (double& x : p) x /= sum;
  return {std::move(p), largest};
}

double attention_error(const std::vector<double>& p, const Rows& v, std::int64_t width, const float* o) {
  double worst = 0;
  for (std::int64_t e = 0; e < width; ++e) {
    double value = 0;
    for (std::size_t i = 0; i < p.size(); ++i) value += p[i] * v[i * width + e];
    const double error = std::abs(value - o[e]);
    if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  return worst;
}

struct CombineError {
  double largest, bound;
};

// The largest |sum of gated branches - o| of one row and group, after combine.
CombineError combine_error(const StepContext& ctx, std::int64_t row, std::int64_t group) {
  ModelShard& shard = ctx.shard;
  const LayerShape& s = shard.shape();
  const std::int64_t count = std::int64_t{s.heads_per_group} * s.d_v;
  const std::int64_t at = (row * s.heads() + group * s.heads_per_group) * s.d_v;
  const auto* gates = ctx.buffers.gate.as<float>() + ((ctx.first_row + row) * s.groups + group) * branches;
  const Rows gate = download(shard, gates, branches, DType::f32);
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype));
  const Rows o = download(shard, ctx.buffers.o.as<std::byte>() + at * size, count, s.dtype);
  std::vector<double> wanted(static_cast<std::size_t>(count), 0.0);
  double scale = 0;
  for (int c = 0; c < branches; ++c) {
    const Rows o_branch = download(shard, ctx.buffers.o_branch[c].as<float>() + at, count, DType::f32);
    for (std::int64_t i = 0; i < count; ++i) wanted[i] += double{gate[c]} * o_branch[i];
    scale += std::abs(double{gate[c]}) * largest_magnitude(o_branch);
  }
  double worst = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double error = std::abs(wanted[i] - o[i]);
    if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  return {worst, error_bound(s.dtype, scale)};
}

// Empty where the chosen blocks are the forced ones and the best of the others, up to rounding of the scores, of which
// the largest has the magnitude `largest_score`. Of given blocks only their number and eligibility is known.
std::string selection_problem(const BlockRules& r, std::int64_t t, const std::vector<double>& s, double largest_score,
                              const std::vector<std::int32_t>& chosen, bool given) {
  const std::int64_t eligible = eligible_blocks(r, t), wanted = std::min<std::int64_t>(r.n_sel, eligible);
  std::vector<bool> is_chosen(static_cast<std::size_t>(eligible), false);
  std::int64_t count = 0;
  for (const std::int32_t j : chosen) {
    if (j < 0) continue;
    if (j >= eligible || is_chosen[j]) return "block " + std::to_string(j) + " chosen twice or from the future";
    is_chosen[j] = true;
    ++count;
  }
  if (count != wanted) return std::to_string(count) + " blocks chosen, not " + std::to_string(wanted);
  if (given) return {};
  double worst_in = std::numeric_limits<double>::infinity(), best_out = 0;
  for (std::int64_t j = 0; j < eligible; ++j) {
    if (is_forced(r, j, t)) {
      if (!is_chosen[j]) return "forced block " + std::to_string(j) + " not chosen";
      continue;
    }
    if (is_chosen[j])
      worst_in = std::min(worst_in, s[j]);
    else
      best_out = std::max(best_out, s[j]);
  }
  // fp32 scores of normalised probabilities: a few hundred roundings of relative size 2^-24, and a few of the scores
  // before the exponential. Below 2^-120 a probability may be zero in fp32.
  const double relative = 1e-4 + 16 * 0x1p-24 * largest_score;
  if (best_out > worst_in + relative * best_out + 0x1p-120) return "a block of lower importance was chosen";
  return {};
}

}  // namespace

void CheckResult::merge(const CheckResult& other) {
  if (!(other.max_abs_err <= max_abs_err)) max_abs_err = other.max_abs_err;
  scale = std::max(scale, other.scale);
  if (problem.empty()) problem = other.problem;
}

CheckResult check_row(const StepContext& ctx, std::int64_t plane, std::int64_t row, std::int64_t t) {
  ModelShard& shard = ctx.shard;
  const LayerShape& s = shard.shape();
  const BlockRules& r = s.rules;
  const std::int64_t group = plane % s.groups, h = s.heads_per_group, heads = s.heads();
  const std::int64_t size = static_cast<std::int64_t>(size_of(s.dtype)), head = group * h;
  const auto* q_at = ctx.buffers.q.as<std::byte>() + ((ctx.first_row + row) * heads + head) * s.d_k * size;
  const Rows q = download(shard, q_at, h * s.d_k, s.dtype);
  std::vector<std::int32_t> chosen =
      download_ints(shard,
                    ctx.buffers.selected.as<std::int32_t>() +
                        (((shard.config.model.layers - 1) * ctx.stage.tile.rows() + row) * s.groups + group) * r.n_sel,
                    r.n_sel);

  std::vector<std::int64_t> tokens[branches] = {
      range(0, compressed_tokens(r, t)), {}, range(window_begin(r, t), t + 1)};
  for (const std::int32_t j : chosen)
    if (j >= 0)
      for (const std::int64_t i : range(std::int64_t{j} * r.l_sel, std::min((j + std::int64_t{1}) * r.l_sel, t + 1)))
        tokens[sel].push_back(i);

  CheckResult result;
  std::string error_problem;
  double largest_score = 0;  // of cmp
  std::vector<double> importance(static_cast<std::size_t>(eligible_blocks(r, t)), 0.0);
  for (int c = 0; c < branches; ++c) {
    const Rows k = fetch(ctx, ctx.k[c], plane, tokens[c]), v = fetch(ctx, ctx.v[c], plane, tokens[c]);
    if (ctx.exchanges && shard.partition.kv_rank != 0) continue;
    const Rows o =
        download(shard, ctx.buffers.o_branch[c].as<float>() + (row * heads + head) * s.d_v, h * s.d_v, DType::f32);
    const double scale = largest_magnitude(v);
    for (std::int64_t j = 0; j < h; ++j) {
      const auto [p, score] = softmax(q.data() + j * s.d_k, k, s.d_k);
      const double error = attention_error(p, v, s.d_v, o.data() + j * s.d_v),
                   bound = error_bound(s.dtype, scale, score);
      result.merge({error, scale, {}});
      if (error_problem.empty() && !(error <= bound))
        error_problem = fmt::format("error {:.3g} against float64 exceeds {:.3g} in {}", error, bound, branch_names[c]);
      if (c == cmp) largest_score = std::max(largest_score, score);
      for (std::size_t i = 0; c == cmp && i < p.size(); ++i)
        for (std::int64_t b = static_cast<std::int64_t>(i) * r.d / r.l_sel;
             b < std::ssize(importance) && b * r.l_sel < std::int64_t(i) * r.d + r.l; ++b)
          importance[b] += p[i] * overlap(r, static_cast<std::int64_t>(i), b);
    }
  }
  if (!ctx.exchanges || shard.partition.kv_rank == 0)
    result.problem = selection_problem(r, t, importance, largest_score, chosen, replays(shard.config));
  if (result.problem.empty()) result.problem = error_problem;
  if (const auto [error, bound] = combine_error(ctx, row, group); result.problem.empty() && !(error <= bound))
    result.problem =
        fmt::format("the combined output differs by {:.3g} from its gated branches (rounding: {:.3g})", error, bound);
  if (!result.problem.empty())
    result.problem = "position " + std::to_string(t) + ", sequence " + std::to_string(plane / s.groups) + ", group " +
                     std::to_string(shard.partition.group_begin + group) + ": " + result.problem;
  return result;
}

}  // namespace nsa
