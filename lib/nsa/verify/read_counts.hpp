#pragma once
// Tokens read, counted by the kernels, against tokens expected (docs/METRICS.md).

#include <cstdint>
#include <string>
#include <vector>

#include "comm/session.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/model/step_positions.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// This rank's sums over sequences, groups and layers: [branch][step].
struct RankReads {
  std::int64_t steps = 0;
  std::vector<std::int64_t> counted, expected;
  explicit RankReads(std::int64_t n) : steps(n), counted(branches * n), expected(branches * n) {}
};

/// Adds the expected reads of the decode steps of a point on one rank. `selected` [steps][layers][batch][query
/// tokens][groups][n] are the chosen blocks; they are used only where there are several kv ranks, to count the blocks
/// that this rank owns.
void expect_decode(RankReads& reads, const Config& config, const Partition& partition, const Point& point,
                   const std::vector<std::int32_t>& selected);

/// Expected reads of a prefill of positions [first, end): this rank's query rows, each with every token it attends.
void expect_prefill(RankReads& reads, const Partition& partition, std::int64_t first, std::int64_t end,
                    std::int64_t lists);

/// What all ranks together must read, [branch][step]. A prefill counts as one step.
std::vector<std::int64_t> total_reads(const Config& config, const Point& point);

/// What all ranks together must read of each sequence of a batch at a decode step, [branch][sequence].
std::vector<std::int64_t> sequence_reads(const Config& config, const Point& point, const StepPositions& positions,
                                         std::int64_t step);

/// Gathers the reads of all ranks on rank 0. Collective.
ReadTable gather_reads(const ControlComm& world, const RankReads& reads);

/// Empty, or where counted and expected differ: on one rank, or the sum over the ranks from `totals` [branch][step].
std::string read_problem(const ReadTable& table, const std::vector<std::int64_t>& totals);

}  // namespace nsa
