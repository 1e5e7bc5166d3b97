#pragma once
// kind = "kernels": compares all implementations of one attention branch on one shape. N query rows whose H heads share
// one K and V, at the last N positions of a context (N = 0: at all positions, as in prefill). Selection chooses n whole
// blocks for each row, all before the first row, in a pattern from contiguous to scattered. docs/METRICS.md defines
// what is timed.

#include <string>
#include <vector>

#include "nsa/config/config.hpp"
#include "nsa/model/buffers.hpp"
#include "nsa/results/records.hpp"
#include "nsa/tasks/session.hpp"

namespace nsa {

/// The layer of a kernels point: one group of H heads, D = Dv, n blocks, one sequence.
Config kernel_config(const Config& config, const Point& point);

/// Query rows of the point.
std::int64_t kernel_rows(const Point& point);

/// Blocks that each row attends, [rows][n] ascending, drawn from the seed: n contiguous ones (contiguous), n / 2
/// contiguous and the others anywhere (mixed), all anywhere (scattered). A row repeats the one before it with
/// probability `overlap`. The same on every machine.
std::vector<std::int32_t> choose_blocks(Spans spans, std::int64_t rows, std::int32_t n, std::int64_t blocks,
                                        std::uint64_t seed, double overlap = 0);

/// One implementation of the point's attention.
struct KernelChoice {
  std::string label;  ///< in the result file
  const AttendKernel* kernel;
  bool packed;  ///< reads K and V that are packed for each row beforehand
};

/// The implementations that the input lists, in its order, where the backend has them and they accept the shape.
std::vector<KernelChoice> kernel_choices(const KernelTable& kernels, const Config& config, const Point& point);

/// Outputs in float64 [rows][H][Dv], and for each row the largest error that rounding explains (error_bound).
struct ExactOutputs {
  std::vector<double> o, bounds;
};

/// Inputs and outputs of a point in backend memory. There are several copies of K and V, so that no hardware cache
/// holds what the next execution reads.
class KernelBench {
 public:
  /// On dry_device() it only counts the memory.
  KernelBench(const Allocator& allocate, const KernelTable& kernels, const Config& config, const Point& point);
  /// Writes the values; waits.
  void fill(Stream* stream);
  /// Queues one execution on copy `at` modulo copies().
  void run(const KernelChoice& choice, std::int64_t at, Stream* stream) const;
  /// The name of the backend's kernel that runs.
  std::string variant(const KernelChoice& choice) const;

  std::int64_t rows() const { return rows_; }
  std::int64_t copies() const { return static_cast<std::int64_t>(kv_.size()); }
  /// Overwrites outputs with NaN and zeroes counters, so that values read after one execution are its own.
  void clear(Stream* stream) const;
  /// Normalised outputs [rows][H][Dv] of the last execution.
  std::vector<float> output(Stream* stream) const;
  /// Tokens that the last execution read, and those it must read.
  std::int64_t reads(Stream* stream) const;
  std::int64_t expected_reads_total() const;
  /// The blocks of each row, [rows][n]; empty for another branch than sel.
  const std::vector<std::int32_t>& selected() const { return selected_; }
  /// The fraction of blocks that neighbouring rows have in common; NaN where there is no such pair.
  double blocks_shared() const;

  /// The same attention in float64 by plain loops over the tokens of each row. `threads` share the rows.
  ExactOutputs oracle(Stream* stream, int threads) const;

 private:
  AttendArgs args_of(const KernelChoice& choice, std::int64_t at) const;
  std::vector<std::int64_t> tokens_of(std::int64_t row) const;
  std::vector<float> download(const void* from, std::int64_t count, Stream* stream) const;

  const DeviceOps& device_;
  const KernelTable& kernels_;
  const Config config_;  ///< kernel_config
  const Point point_;
  const Branch branch_;
  LayerShape shape_, packed_shape_;
  std::int64_t rows_, first_position_, kv_rows_;
  QueryTile tile_, packed_tile_;
  std::vector<std::int32_t> selected_;
  std::vector<KvPair> kv_, packed_;
  Buffer positions_, q_, chosen_, partials_, reads_, scores_, lse_, scratch_;
};

/// Mean absolute error, its standard error over rows, the largest one, and the largest one as a multiple of its row's
/// bound; infinite where an output is not a number.
struct KernelError {
  double mean, standard_error, largest, excess;
};
KernelError kernel_error(const std::vector<float>& output, const ExactOutputs& exact);

/// Measures the point. Collective; returns the memory this rank used.
MemoryAccount run_kernels(const Session& session, const Config& config, const Point& point, PointRecord& record,
                          const Progress& progress);

}  // namespace nsa
