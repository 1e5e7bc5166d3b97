#pragma once
// Recorded selections ([input] selection): the blocks that the queries of a point attend instead of those that ranking
// would choose. Every layout replays the same lists.

#include <cstdint>
#include <string>
#include <vector>

#include "nsa/model/partition.hpp"

namespace nsa {

/// Whether selections are given; ranking does not run then.
inline bool replays(const Config& config) { return !config.input_selection.empty(); }

/// This rank's groups of the recorded lists of `count` positions from `first` on, [batch][count][groups][n_sel]. Throws
/// UserError(file): what SelectionFile does; no lists of this shape at these positions; or a list that no query can
/// select (problem_of_list), naming the first.
std::vector<std::int32_t> recorded_lists(const Config& config, const Point& point, const Partition& partition,
                                         std::int64_t first, std::int64_t count);

/// The last `rows` lists of a file's first sequence and group, [rows][n], whole blocks below `blocks`: for
/// kind = "kernels". Throws as above.
std::vector<std::int32_t> recorded_rows(const Config& config, std::int64_t rows, std::int64_t n, std::int64_t blocks);

/// Why a query at position t cannot have selected the n blocks of `list`; "" if it can. They have to be min(n,
/// eligible) blocks in ascending order, then -1; none starts after t; and that of t is the last.
std::string problem_of_list(const BlockRules& rules, std::int64_t t, const std::int32_t* list);

}  // namespace nsa
