#pragma once
// The result file: HDF5, schema in docs/SCHEMA.md. All reading and writing of HDF5 is in this folder, that of tensors
// too.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "nsa/results/records.hpp"

namespace nsa {

/// Writes a run on rank 0. The file under its final name holds sealed points only: every point is written to a
/// temporary file in the same folder, which is flushed, synced to disk (fsync) and renamed.
class ResultWriter {
 public:
  /// Checks before any computing that `path` can be created: the parent exists and is writable, the file does not
  /// exist, `expected_bytes` fit on the disk. `resume`: adds points to an existing file. Throws
  /// UserError(ExitCode::file).
  ResultWriter(const std::string& path, const RunRecord& run, std::size_t expected_bytes, bool resume = false);
  ~ResultWriter();
  /// Adds the point, or replaces the point of the same index. In a large file it may wait for the next ones: until
  /// finish or the destructor at the latest.
  void seal(const PointRecord& point);
  void finish(const RunRecord& run);  ///< writes end time, status and the clocks after the run

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct ResultFile {
  RunRecord run;
  std::vector<PointRecord> points;  ///< without tensors
};

/// Throws UserError(file) that names the file: missing, truncated, not HDF5, not a result, unknown major schema
/// version.
ResultFile read_result(const std::string& path);
/// The same of several files, each on a core of its own. A process reads each; throws for the first one that fails.
std::vector<ResultFile> read_results(const std::vector<std::string>& paths);

/// Tensors x and weights of a file that another program or a run wrote, under "/" or under a point's "tensors" group.
class TensorFile {
 public:
  explicit TensorFile(const std::string& path);
  /// A result file, which read_result has read. has() is false until select_point has found the tensors of a point.
  struct OfPoints {};
  TensorFile(const std::string& path, OfPoints);
  void select_point(std::int64_t index);
  ~TensorFile();
  bool has(const std::string& name) const;
  /// The shape of the tensor. Throws UserError(file) when it is missing or not floating point.
  std::vector<std::int64_t> shape(const std::string& name) const;
  /// A slab, row-major. Throws UserError(file): missing, another shape (names both), not finite (names the index).
  std::vector<float> read(const std::string& name, const std::vector<std::int64_t>& expected_shape,
                          const std::vector<std::int64_t>& begin, const std::vector<std::int64_t>& count) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nsa
