#pragma once
// Decode: one token of every sequence a step, on caches that a prefill or a synthetic fill has made.

#include <vector>

#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"

namespace nsa {

/// The memory of the decode steps of a point.
class DecodeRunner {
 public:
  /// Loads the steps' inputs. The caches must hold the context before the first step.
  DecodeRunner(ModelShard& engine, const TensorSource* source, bool record);

  /// Keeps the rings as they are, to rewind to.
  void snapshot();
  /// Back to the first step. Caches past the context are written again before they are read.
  void restore();

  /// Queues what step `step` is given (x, or q, k, v and gates). Not part of the timed work.
  void load(std::int64_t step, const StepOptions& options);

  /// Queues one step: the algorithm, a line a stage; where stages are not timed apart, the backend may join them.
  /// Returns what its last layer worked on.
  StepContext step(const StepOptions& options, StageTimer& timer);

  /// Where ranks share the sequences: whether this rank can run the backend's own few launches, tried once here so that
  /// a launch that is refused is found out before it is measured; and whether it does. All ranks or none, because what
  /// they exchange is not the same.
  bool try_sharded();
  void run_sharded(bool all_can) { sharded_ = all_can; }

  StepBuffers& buffers() { return buffers_; }
  /// Logs of the steps since rewind: reads [steps][3][batch, groups]; selected [steps][layers][batch, groups, n].
  const Buffer& reads_log() const { return reads_log_; }
  const Buffer& selected_log() const { return selected_log_; }
  std::int64_t selected_count() const { return selected_count_; }

 private:
  void load_inputs(const TensorSource& source);
  void make_inputs(const TensorSource& source);
  void append_and_compress(StepContext& work, StageTimer& timer);
  void view_caches(StepContext& work);
  StepContext start(const StepOptions& options);
  void attend_by_stages(StepContext& work, StageTimer& timer);
  void attend_sharded(StepContext& work, StageTimer& timer);
  void exchange(StepContext& work, StageTimer& timer, void (*what)(StepContext&, Stream*));
  void fork(StepContext& work, void (*what)(StepContext&, Stream*));
  void join();

  ModelShard& shard_;
  StepBuffers buffers_;
  Buffer position_, step_;  ///< int64 [1] each
  Buffer reads_log_, selected_log_;
  std::int64_t selected_count_ = 0;
  Buffer x_steps_;               ///< [steps][batch, dim]: fp32 with several layers, else storage
  Buffer q_steps_, gate_steps_;  ///< scope = attention: [steps][batch, H, Dk], [steps][batch, groups, 3]
  Buffer k_steps_[branches], v_steps_[branches];
  std::vector<Buffer> snapshot_;  ///< rings of every layer
  bool sharded_ = false;
};

}  // namespace nsa
