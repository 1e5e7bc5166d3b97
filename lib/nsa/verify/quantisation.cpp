#include "nsa/verify/quantisation.hpp"

#include <algorithm>
#include <cmath>

#include "nsa/model/inputs.hpp"
#include "nsa/model/selections.hpp"

namespace nsa {

namespace {

void add_difference(const std::vector<float>& quantised, const std::vector<float>& exact, double& error, double& norm) {
  for (std::size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{quantised.at(i)} - exact[i], 2);
    norm += std::pow(double{exact[i]}, 2);
  }
}

bool contains(const std::int32_t* list, std::int64_t n, std::int32_t block) {
  return std::find(list, list + n, block) != list + n;
}

/// Importance of the blocks of a list, of those whose scores this rank has.
float importance_of(const std::int32_t* list, std::int64_t n, const float* p_slc) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i)
    if (list[i] >= 0) sum += p_slc[list[i]];
  return sum;
}

}  // namespace

StepOutput recorded_step(const StepContext& ctx) {
  ModelShard& shard = ctx.shard;
  const std::int64_t rows = shard.point.batch * shard.point.query_tokens, layers = shard.config.model.layers,
                     choices = rows * shard.shape().groups * shard.shape().rules.n_sel;
  StepOutput output = latest_output(shard, ctx.buffers, rows, true);
  output.selected = download_ints(shard, ctx.buffers.selected.as<std::int32_t>() + (layers - 1) * choices, choices);
  return output;
}

void QuantisationSums::add(const StepContext& ctx, const std::vector<std::int64_t>& positions,
                           const StepOutput& quantised) {
  ModelShard& shard = ctx.shard;
  const BlockRules& r = shard.shape().rules;
  const StepOutput exact = recorded_step(ctx);
  const bool counts = shard.partition.kv_rank == 0;  // the kv ranks have the same blocks and outputs
  if (counts) add_difference(quantised.o, exact.o, o_error, o_norm);
  if (counts && shard.partition.head_shard == 0) add_difference(quantised.y, exact.y, y_error, y_norm);
  if (replays(shard.config)) return;  // nothing was chosen
  const std::int64_t queries_here = std::ssize(positions) * shard.shape().groups, blocks = ctx.buffers.p_slc_blocks;
  const std::vector<float> p_slc = download(shard, ctx.buffers.p_slc.data(), queries_here * blocks, DType::f32);
  std::vector<float> kept;  // [row, group][exact, quantised]
  for (std::int64_t query = 0; query < queries_here; ++query)
    for (const StepOutput* output : {&exact, &quantised})
      kept.push_back(importance_of(output->selected.data() + query * r.n_sel, r.n_sel, p_slc.data() + query * blocks));
  if (ctx.exchanges) shard.comms->kv_control.sum(kept);
  for (std::int64_t query = 0; counts && query < queries_here; ++query) {
    const std::int64_t t = positions[static_cast<std::size_t>(query / shard.shape().groups)];
    if (eligible_blocks(r, t) <= r.n_sel) continue;
    const std::int32_t *own = exact.selected.data() + query * r.n_sel,
                       *other = quantised.selected.data() + query * r.n_sel;
    for (std::int32_t i = 0; i < r.n_sel; ++i)
      if (!is_forced(r, own[i], t)) free += 1, same += contains(other, r.n_sel, own[i]);
    const double before = kept[2 * query], after = kept[2 * query + 1];
    if (before > 0) lost += (before - after) / before, queries += 1;
  }
}

QuantisationRecord QuantisationSums::reduce(const ControlComm& world) const {
  QuantisationSums all;
  const std::vector<double> ranks =
      world.gather(std::vector{same, free, lost, queries, o_error, o_norm, y_error, y_norm});
  double* const to[] = {&all.same,    &all.free,   &all.lost,    &all.queries,
                        &all.o_error, &all.o_norm, &all.y_error, &all.y_norm};
  for (std::size_t i = 0; i < ranks.size(); ++i) *to[i % std::size(to)] += ranks[i];
  QuantisationRecord record;
  if (all.free > 0) record.selection_agreement = all.same / all.free;
  if (all.queries > 0) record.importance_lost = all.lost / all.queries;
  if (all.o_norm > 0) record.o_change = std::sqrt(all.o_error / all.o_norm);
  if (all.y_norm > 0) record.y_change = std::sqrt(all.y_error / all.y_norm);
  return record;
}

}  // namespace nsa
