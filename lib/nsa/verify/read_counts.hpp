#pragma once
// Tokens read, counted by the kernels, against tokens expected (docs/METRICS.md).

#include <cstdint>
#include <string>
#include <vector>

#include "comm/session.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// This rank's sums over sequences, groups and layers: [branch][step].
struct RankReads {
  std::int64_t steps = 0;
  std::vector<std::int64_t> counted, expected;
  explicit RankReads(std::int64_t n) : steps(n), counted(branches * n), expected(branches * n) {}
};

/// Expected reads of decode steps at positions first, first + 1, ... on one rank. `selected` [steps][lists][n] are
/// the blocks that were chosen; only a rank of several kv ranks needs them, to know which of them are its own.
void expect_decode(RankReads& reads, const Partition& partition, std::int64_t first, std::int64_t lists,
                   const std::vector<std::int32_t>& selected);

/// Expected reads of a prefill of `positions` tokens: this rank's query rows, each with all it attends.
void expect_prefill(RankReads& reads, const Partition& partition, std::int64_t positions, std::int64_t lists);

/// What all ranks together must read, [branch][step]: a decode by step, a prefill in all.
std::vector<std::int64_t> total_reads(const Config& config, const Point& point);

/// Gathers on rank 0.
ReadTable gather_reads(const ControlComm& world, const RankReads& reads);

/// Empty, or where counted and expected differ: on a rank, or in sum over the ranks against `totals` [branch][step].
std::string read_problem(const ReadTable& table, const std::vector<std::int64_t>& totals);

}  // namespace nsa
