#pragma once
// The selected blocks of each query as a run with output.selection, or another program, wrote them: docs/SCHEMA.md,
// "Selections".

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace nsa {

/// The lists of one dataset `selected`, [batch][positions][groups][n], of the positions from first_position on.
struct SelectionShape {
  std::int64_t batch, positions, groups, n, first_position;
  bool operator==(const SelectionShape&) const = default;
};

class SelectionFile {
 public:
  /// Throws UserError(file): missing, damaged, or without a dataset `selected` of integers.
  explicit SelectionFile(const std::string& path);
  ~SelectionFile();
  /// What the file holds: /selected, else that of each point, in order.
  const std::vector<SelectionShape>& shapes() const;
  /// The lists of `count` positions, the first of them first_position + `first`, [batch][count][groups][n].
  std::vector<std::int32_t> read(std::size_t index, std::int64_t first, std::int64_t count) const;
  /// The same of the first sequence and group alone, [count][n].
  std::vector<std::int32_t> read_rows(std::size_t index, std::int64_t first, std::int64_t count) const;
  /// Throws UserError(file): "cannot use PATH (<why>); ...".
  [[noreturn]] void fail(const std::string& why) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nsa
