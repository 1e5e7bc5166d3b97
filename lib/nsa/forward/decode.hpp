#pragma once
// Decode: one token of every sequence, or some query tokens, per step, on caches that a prefill or a synthetic fill
// wrote.

#include <functional>
#include <utility>
#include <vector>

#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"
#include "nsa/model/inputs.hpp"
#include "nsa/model/selections.hpp"
#include "nsa/model/step_positions.hpp"

namespace nsa {

/// The query rows of a step: those of sequence 0, of sequence 1, ...
QueryTile decode_tile(const ModelShard& shard, const std::int64_t* positions);

/// Runs the decode steps of a point and owns their memory.
class DecodeRunner {
 public:
  /// Loads the steps' inputs. The caches must hold the context before the first step.
  DecodeRunner(ModelShard& shard, const TensorSource* source, bool record);

  /// Keeps a copy of the ring caches for restore.
  void snapshot();
  /// Returns to the first step. Steps write cache rows after the context before they read them.
  void restore();

  /// Finds the fastest plan that every rank can run. Each rank launches the fused operations once without exchanges, so
  /// that a launch that fails is known before ranks depend on it. Restores. Before it, a step runs stage by stage.
  /// Collective.
  void choose_plan(const ControlComm& world);

  /// Queues the inputs of step `step` (x, or q, k, v and gates). Not part of the timed work.
  void load(std::int64_t step, const StepOptions& options);

  /// Queues what has ranks start a step of one launch together (align_ranks). Not part of the timed work.
  void align(const StepOptions& options);

  /// What each later step also runs in every layer, after its own part of it: the rest of a mixed step.
  using InLayer = std::function<void(std::int64_t layer, const StepOptions& options, StageTimer& timer)>;
  void also_run(InLayer rest) { rest_ = std::move(rest); }

  /// Queues one step. Where the timer times each stage, the step runs stage by stage.
  void step(const StepOptions& options, StageTimer& timer);

  /// Queues a reading of the device's clock; at most two a step since restore.
  void stamp();
  /// The readings since restore, in nanoseconds.
  std::vector<std::int64_t> stamps() const;

  /// Makes buffers().o whole after a step by the plan, which may leave it cut by heads. Collective over the kv ranks.
  void complete_output(const StepOptions& options);

  /// Whether the plan runs attention as one launch that exchanges by itself. A step with `with_readings(options)` then
  /// reads clocks at its phases. phase_seconds() returns their durations in that step's last layer, by StepPhase, as
  /// means over the work items of this rank.
  bool has_phases() const { return plan_.one_launch; }
  StepOptions with_readings(StepOptions options);
  void clear_readings();
  std::vector<double> phase_seconds() const;

  /// The context of the last layer, for checks of the step that has just run by the plan with these options.
  StepContext last_layer(const StepOptions& options);

  StepBuffers& buffers() { return buffers_; }
  const StepPositions& positions() const { return step_positions_; }
  /// Logs of the steps since restore: reads [steps][3][batch, groups]; selected [steps][layers][rows, groups, n].
  const Buffer& reads_log() const { return reads_log_; }
  const Buffer& selected_log() const { return selected_log_; }
  std::int64_t selected_count() const { return selected_count_; }

 private:
  /// The given tensors, with the memory that holds them for all steps.
  std::vector<GivenTensor> step_inputs() const;
  void load_inputs(const TensorSource& source);
  void load_selections();
  void load_from_file(const TensorSource& source, const GivenTensor& input);
  void generate(const TensorSource& source, const GivenTensor& input);
  StepContext context(std::int64_t layer, const StepOptions& options, const StepPlan& plan);
  StepPlan probe();
  void staged_prologue(const StepContext& ctx, StageTimer& timer);
  void attention(Attention attention, const StepContext& ctx, StageTimer& timer);
  void staged_attention(const StepContext& ctx, StageTimer& timer);
  void sharded_attention(const StepContext& ctx, StageTimer& timer);
  void output_projection(const StepContext& ctx, StageTimer& timer);
  AdvanceArgs step_log() const;
  void exchange(const StepContext& ctx, StageTimer& timer, void (*what)(const StepContext&, Stream*));
  /// Runs concurrently with what is queued on the compute stream from here to Streams::wait_side.
  void on_side_stream(const StepContext& ctx, void (*what)(const StepContext&, Stream*));

  ModelShard& shard_;
  StepBuffers buffers_;
  StepPlan plan_;
  InLayer rest_;
  Buffer positions_;  ///< int64: of the next token, [1], or [batch] where each sequence has its own
  Buffer step_;       ///< int64 [1]
  Buffer stamps_;     ///< int64 [1 + 2 steps]: their number, then the readings
  Buffer readings_;   ///< kv > 1: int64 [rows * groups][step_readings]
  Buffer reads_log_, selected_log_;
  std::int64_t selected_count_ = 0;
  Buffer x_steps_;               ///< [steps][rows, dim]: fp32 with several layers, else storage
  Buffer q_steps_, gate_steps_;  ///< scope = attention: [steps][rows, H, Dk], [steps][rows, groups, 3]
  Buffer k_steps_[branches], v_steps_[branches];
  Buffer recorded_steps_;  ///< given selections: [steps][rows, groups, n] int32
  StepPositions step_positions_;
  RingSnapshot rings_;
};

}  // namespace nsa
