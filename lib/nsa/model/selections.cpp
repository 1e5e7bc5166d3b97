#include "nsa/model/selections.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "nsa/results/selection_file.hpp"

namespace nsa {
namespace {

/// What is wrong with the order of a list of blocks below `end`, padded with -1; "": nothing. Sets `count`.
std::string problem_of_order(const std::int32_t* list, std::int64_t n, std::int64_t end, std::int64_t& count) {
  count = std::find(list, list + n, -1) - list;
  for (std::int64_t i = count; i < n; ++i)
    if (list[i] != -1) return fmt::format("block {} follows the end of the list, -1", list[i]);
  for (std::int64_t i = 0; i < count; ++i) {
    if (list[i] < 0 || list[i] >= end) return fmt::format("block {} is none of 0 to {}", list[i], end - 1);
    if (i > 0 && list[i] <= list[i - 1])
      return fmt::format("block {} follows block {}; a list ascends, without duplicates", list[i], list[i - 1]);
  }
  return {};
}

std::string text_of(const SelectionShape& s) {
  return fmt::format("{} sequences, positions {} to {}, {} groups, {} blocks a query", s.batch, s.first_position,
                     s.first_position + s.positions - 1, s.groups, s.n);
}

}  // namespace

std::string problem_of_list(const BlockRules& rules, std::int64_t t, const std::int32_t* list) {
  const std::int64_t eligible = eligible_blocks(rules, t), wanted = std::min<std::int64_t>(rules.n_sel, eligible);
  std::int64_t count = 0;
  if (std::string problem = problem_of_order(list, rules.n_sel, eligible, count); !problem.empty()) return problem;
  if (count != wanted) return fmt::format("it has {} blocks, not {}", count, wanted);
  if (list[count - 1] != eligible - 1) return fmt::format("block {}, that of the query, is missing", eligible - 1);
  return {};
}

std::vector<std::int32_t> recorded_lists(const Config& config, const Point& point, const Partition& p,
                                         std::int64_t first, std::int64_t count) {
  const SelectionFile file(config.input_selection);
  const std::int64_t groups = config.model.n_kv_groups, n = config.nsa.n_sel;
  const auto fits = [&](const SelectionShape& s) {
    return s.batch == point.batch && s.groups == groups && s.n == n && s.first_position <= first &&
           first + count <= s.first_position + s.positions;
  };
  const auto found = std::ranges::find_if(file.shapes(), fits);
  if (found == file.shapes().end())
    file.fail(fmt::format("this input needs {}; it holds {}{}", text_of({point.batch, count, groups, n, first}),
                          text_of(file.shapes().front()), file.shapes().size() > 1 ? ", and others" : ""));
  const std::vector<std::int32_t> all =
      file.read(static_cast<std::size_t>(found - file.shapes().begin()), first - found->first_position, count);
  std::vector<std::int32_t> own;
  for (std::int64_t row = 0; row < point.batch * count; ++row)
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int32_t* list = all.data() + (row * groups + g) * n;
      if (const std::string problem = problem_of_list(config.nsa, first + row % count, list); !problem.empty())
        file.fail(fmt::format("position {}, sequence {}, group {}: {}", first + row % count, row / count, g, problem));
      if (g >= p.group_begin && g < p.group_begin + p.shape.groups) own.insert(own.end(), list, list + n);
    }
  return own;
}

std::vector<std::int32_t> recorded_rows(const Config& config, std::int64_t rows, std::int64_t n, std::int64_t blocks) {
  const SelectionFile file(config.input_selection);
  const auto found =
      std::ranges::find_if(file.shapes(), [&](const SelectionShape& s) { return s.positions >= rows && s.n == n; });
  if (found == file.shapes().end())
    file.fail(
        fmt::format("this input needs {} rows of {} blocks; it holds {}", rows, n, text_of(file.shapes().front())));
  const std::vector<std::int32_t> all =
      file.read_rows(static_cast<std::size_t>(found - file.shapes().begin()), found->positions - rows, rows);
  std::vector<std::int32_t> lists;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* list = all.data() + row * n;
    std::int64_t count = 0;
    std::string problem = problem_of_order(list, n, blocks, count);
    if (problem.empty() && count != n) problem = fmt::format("it has {} blocks, not {}", count, n);
    if (!problem.empty())
      file.fail(fmt::format("position {}, as row {} of {}: {}, the whole blocks in front of the rows",
                            found->first_position + found->positions - rows + row, row, rows, problem));
    lists.insert(lists.end(), list, list + n);
  }
  return lists;
}

}  // namespace nsa
