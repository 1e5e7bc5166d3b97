#include "nsa/verify/read_counts.hpp"

#include <algorithm>
#include <array>

namespace nsa {

namespace {

std::int64_t window_slots_read(const Partition& p, std::int64_t t) {
  const RowMap owned = p.window_share();
  std::int64_t sum = 0;
  for (std::int64_t i = window_begin(p.shape.rules, t); i <= t; ++i) sum += has_row(owned, i);
  return sum;
}

std::int64_t selected_tokens_read(const Partition& p, std::int64_t t, const std::int32_t* blocks, std::int64_t count) {
  const RowMap map = p.tokens(false);
  const std::int64_t l_sel = p.shape.rules.l_sel;
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < count; ++i)
    if (blocks[i] >= 0 && has_row(map, blocks[i] * l_sel)) sum += std::min(l_sel, t + 1 - blocks[i] * l_sel);
  return sum;
}

}  // namespace

void expect_decode(RankReads& reads, const Config& config, const Partition& p, const Point& point,
                   const std::vector<std::int32_t>& selected) {
  const std::int64_t layers = config.model.layers, lists = layers * p.shape.groups,
                     width = p.shape.groups * p.shape.rules.n_sel, rows = point.batch * point.query_tokens;
  const StepPositions positions(config, point);
  for (std::int64_t step = 0; step < reads.steps; ++step) {
    const auto add = [&](Branch branch, std::int64_t n) { reads.expected[branch * reads.steps + step] += n; };
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t t = positions(step, row / point.query_tokens) + row % point.query_tokens;
      add(cmp, lists * owned_rows(p.compressed(false), compressed_tokens(p.shape.rules, t)));
      add(win, lists * window_slots_read(p, t));
      if (p.kv == 1) add(sel, lists * expected_reads(p.shape.rules, t).branch[sel]);
      for (std::int64_t layer = 0; p.kv > 1 && layer < layers; ++layer)
        add(sel, selected_tokens_read(p, t, selected.data() + ((step * layers + layer) * rows + row) * width, width));
    }
  }
}

void expect_prefill(RankReads& reads, const Partition& p, std::int64_t first, std::int64_t end, std::int64_t lists) {
  const RowMap map = p.tokens(false);
  for (std::int64_t t = first; t < end; ++t) {
    if (!has_row(map, t)) continue;
    const ExpectedReads row = expected_reads(p.shape.rules, t);
    for (int c = 0; c < branches; ++c) reads.expected[c] += lists * row.branch[c];
  }
}

namespace {

/// What all ranks together must read for the queries at positions [first, first + count) of a sequence, by branch.
std::array<std::int64_t, branches> reads_of_queries(const Config& config, std::int64_t first, std::int64_t count) {
  std::array<std::int64_t, branches> sum{};
  for (std::int64_t i = 0; i < count; ++i) {
    const ExpectedReads reads = expected_reads(config.nsa, first + i);
    for (int c = 0; c < branches; ++c) sum[c] += config.model.n_kv_groups * config.model.layers * reads.branch[c];
  }
  return sum;
}

}  // namespace

std::vector<std::int64_t> total_reads(const Config& config, const Point& point) {
  if (config.kind == TaskKind::prefill) {
    const auto reads = reads_of_queries(config, config.run.prefix, point.context);
    std::vector<std::int64_t> totals(reads.begin(), reads.end());
    for (std::int64_t& total : totals) total *= point.batch;
    return totals;
  }
  const std::int64_t steps = config.run.steps;
  const StepPositions positions(config, point);
  std::vector<std::int64_t> totals(branches * steps, 0);
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::vector<std::int64_t> reads = sequence_reads(config, point, positions, step);
    for (std::int64_t i = 0; i < std::ssize(reads); ++i) totals[i / point.batch * steps + step] += reads[i];
  }
  return totals;
}

std::vector<std::int64_t> sequence_reads(const Config& config, const Point& point, const StepPositions& positions,
                                         std::int64_t step) {
  std::vector<std::int64_t> list(static_cast<std::size_t>(branches * point.batch));
  for (std::int64_t b = 0; b < point.batch; ++b) {
    const auto reads = reads_of_queries(config, positions(step, b), point.query_tokens);
    for (int c = 0; c < branches; ++c) list[c * point.batch + b] = reads[c];
  }
  return list;
}

ReadTable gather_reads(const ControlComm& world, const RankReads& reads) {
  const auto by_branch = [&](const std::vector<std::int64_t>& own) {
    const std::vector<std::int64_t> all = world.gather(own);  // [rank][branch][step]
    std::vector<std::int64_t> table(all.size());
    const std::int64_t ranks = world.size(), steps = reads.steps;
    for (std::int64_t r = 0; !all.empty() && r < ranks; ++r)
      for (std::int64_t c = 0; c < branches; ++c)
        std::copy_n(all.begin() + (r * branches + c) * steps, steps, table.begin() + (c * ranks + r) * steps);
    return table;
  };
  ReadTable table;
  table.ranks = world.size();
  table.steps = reads.steps;
  table.counted = by_branch(reads.counted);
  table.expected = by_branch(reads.expected);
  return table;
}

std::string read_problem(const ReadTable& table, const std::vector<std::int64_t>& totals) {
  for (int c = 0; c < branches; ++c)
    for (std::int64_t step = 0; step < table.steps; ++step) {
      const std::string where = std::string("reads of ") + branch_names[c] + " at step " + std::to_string(step);
      std::int64_t sum = 0;
      for (std::int64_t r = 0; r < table.ranks; ++r) {
        const std::int64_t i = (c * table.ranks + r) * table.steps + step;
        if (table.counted[i] != table.expected[i])
          return where + " on rank " + std::to_string(r) + ": counted " + std::to_string(table.counted[i]) +
                 ", expected " + std::to_string(table.expected[i]);
        sum += table.counted[i];
      }
      const std::int64_t total = totals[c * table.steps + step];
      if (sum != total)
        return where + ": counted " + std::to_string(sum) + " in all, expected " + std::to_string(total);
    }
  return {};
}

}  // namespace nsa
