#pragma once
// The recorded run and the measured runs of a prefill: a point of its own, or the chunk of mixed steps.

#include <memory>
#include <string>
#include <vector>

#include "nsa/forward/prefill.hpp"
#include "nsa/tasks/task.hpp"
#include "nsa/verify/repeat_check.hpp"

namespace nsa {

/// What every run of a point must reproduce: the output of the last tile, the read counters, and the caches of the
/// first layer, which depend on x and the weights only. The same kernels run in the same shapes each time, and the
/// matrix products run on one stream with a workspace of their own, for which cuBLAS promises the same bits; so K and V
/// must be equal bit by bit. After a fallback, scores are summed in another order and blocks may change places; then
/// the output is only checked for values that are not finite.
struct RunResult {
  StepOutput output;
  std::vector<std::int64_t> reads;
  std::uint64_t caches = 0;
};

class PrefillPasses {
 public:
  PrefillPasses(const Session& session, ModelShard& shard, PrefillRunner& prefill, const TensorSource& source,
                PointRecord& record)
      : session_(session), shard_(shard), config_(shard.config), prefill_(prefill), source_(source), record_(record) {}

  /// Loads the given tensors of this rank's rows. Untimed, before the first run.
  void load();
  /// Queues the return to the state before the first run. Untimed, before every later run.
  void reload();

  /// Runs before the measurement: records every tile, and checks the last row of some. Every measured run must
  /// reproduce its result. Collective.
  void recorded();
  /// The same around a run by the caller, which hands every tile of the last layer to take_tile. Both are collective.
  void begin_recording();
  void take_tile(const StepContext& ctx, const PrefillTile& tile);
  void end_recording();

  /// One pass of a mode. False: the run was asked to stop. Collective.
  bool measured(const ModeRun& run, StageTimer& timer, const TakeSample& take);

  /// Why the run that has just ended is not that of the recorded one; "" where it is.
  std::string problem() const;
  /// Tokens read by the run that has just ended, and those expected; one step.
  RankReads reads() const;

 private:
  void compare_neighbours(const StepContext& ctx);
  CheckResult check_tile(const StepContext& ctx, const PrefillTile& tile, std::int64_t group) const;
  RunResult result() const;
  std::string problem_of(const RunResult& result) const;

  const Session& session_;
  ModelShard& shard_;
  const Config& config_;
  PrefillRunner& prefill_;
  const TensorSource& source_;
  PointRecord& record_;
  RunResult expected_;
  std::unique_ptr<StepTensors> tensors_;  ///< of the recorded run, as are the next three
  CheckResult checked_;
  SharedBlocks shared_;
  std::int64_t tiles_seen_ = 0;
};

}  // namespace nsa
