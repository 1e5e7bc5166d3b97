#pragma once
// The result file: HDF5, schema in docs/SCHEMA.md. The only room that knows HDF5, also for reading tensors.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// Writes a run on rank 0. The file appears under its name only with sealed points in it: every point is
/// written to a temporary file beside it, flushed, fsynced, renamed.
class ResultWriter {
 public:
  /// Checks before any computing that `path` can be made: parent exists and is writable, the file does not
  /// exist, `expected_bytes` fit. `resume`: where it exists, points are added to it. Throws UserError(ExitCode::file).
  ResultWriter(const std::string& path, const RunRecord& run, std::size_t expected_bytes, bool resume = false);
  ~ResultWriter();
  void seal(const PointRecord& point);  ///< in place of one of the same index
  void finish(const RunRecord& run);    ///< end time, status, clocks after

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct ResultFile {
  RunRecord run;
  std::vector<PointRecord> points;  ///< without tensors
};

/// Throws UserError(file): missing, truncated, not HDF5, not a result, unknown schema major; names the file.
ResultFile read_result(const std::string& path);

/// Tensors x and weights that another program wrote, under "/" or under a point's "tensors" group.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path);
  /// The tensors of one point of a result file; has() is false for all where it kept none.
  TensorFile(const std::string& path, std::int64_t point);
  ~TensorFile();
  bool has(const std::string& name) const;
  /// The whole shape. Throws UserError(file) when missing or not floating point.
  std::vector<std::int64_t> shape(const std::string& name) const;
  /// A slab, row-major. Throws UserError(file): missing, not this shape (says both), not finite (says where).
  std::vector<float> read(const std::string& name, const std::vector<std::int64_t>& expected_shape,
                          const std::vector<std::int64_t>& begin, const std::vector<std::int64_t>& count) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nsa
