#pragma once
// Collects the tensors of a run from all ranks: every rank stores what it owns, rank 0 gets the sum.

#include <string>
#include <vector>

#include "comm/session.hpp"
#include "nsa/forward/stages.hpp"
#include "nsa/results/records.hpp"

namespace nsa {

/// A tensor [batch, rows, columns] of which ranks own disjoint parts; the rest of a rank's copy is zero.
class SharedTensor {
 public:
  SharedTensor(std::string name, std::vector<std::int64_t> shape, std::vector<std::string> dims, std::int64_t rows);
  /// values: consecutive columns from `column` on of row `row` of sequence `b`.
  void store(std::int64_t b, std::int64_t row, std::int64_t column, const float* values, std::int64_t count);
  /// Collective; complete on rank 0.
  TensorRecord reduce(const ControlComm& world, bool as_integers = false);

 private:
  TensorRecord record_;
  std::int64_t rows_, columns_;
};

/// The stage tensors of R recorded positions (docs/SCHEMA.md): selected and, with output.tensors, q, gate, p_slc,
/// o_cmp, o_sel, o_win, o, y.
class StepTensors {
 public:
  StepTensors(ModelShard& shard, std::int64_t positions);
  /// Records the context's tile: row j of each sequence becomes row `row` + j of the tensors.
  /// `shared`: every kv rank computed these rows (decode), and only one of them stores them.
  void take(const StepContext& ctx, std::int64_t row, bool shared);
  std::vector<TensorRecord> reduce(const ControlComm& world);

 private:
  StepTensors(ModelShard& shard, std::int64_t selections, std::int64_t positions);
  ModelShard& shard_;
  SharedTensor q_, gate_, p_slc_, selected_, o_, y_;
  std::vector<SharedTensor> o_branch_;
};

/// x and weights (or q, k, v, gates) as the run used them, rounded to storage; and the compressed tokens.
std::vector<TensorRecord> input_tensors(const ModelShard& shard, const TensorSource& source, bool on_this_rank);
std::vector<TensorRecord> compressed_tensors(ModelShard& shard, const std::vector<std::int64_t>& ends,
                                             const ControlComm& world);

}  // namespace nsa
