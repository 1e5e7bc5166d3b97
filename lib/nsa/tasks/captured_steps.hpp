#pragma once
// Decode steps as one CUDA graph, or as their launches.

#include "nsa/forward/decode.hpp"
#include "nsa/tasks/measure.hpp"

namespace nsa {

/// Decode steps as one graph where the backend captures graphs; else, to time each stage, and with a chunk (`mixed`),
/// their launches one by one. Several steps have the inputs of the first: to load others would add copies to the timed
/// work.
class CapturedSteps {
 public:
  CapturedSteps(ModelShard& shard, DecodeRunner& decode, StageTimer& timer, const ModeRun& run, bool mixed);
  ~CapturedSteps();
  CapturedSteps(const CapturedSteps&) = delete;
  CapturedSteps& operator=(const CapturedSteps&) = delete;

  /// Queues the steps of one sample.
  void run();

 private:
  void capture();
  void queue();

  ModelShard& shard_;
  DecodeRunner& decode_;
  StageTimer& timer_;
  const ModeRun& run_;
  Graph* graph_ = nullptr;
};

}  // namespace nsa
