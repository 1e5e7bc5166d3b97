#pragma once
// The prefill chunk of mixed steps (task.kind = "mixed"): in every layer it runs after the decode rows, with the same
// weights, on caches of its own. Every step prefills the same tokens onto the same prefix.

#include <optional>
#include <string>
#include <vector>

#include "nsa/config/parts.hpp"
#include "nsa/tasks/prefill_passes.hpp"

namespace nsa {

class MixedChunk {
 public:
  /// Allocates the chunk's caches beside the decode rows. `chunk` outlives it.
  MixedChunk(const Session& session, const ModelShard& rows, const Part& chunk, const TensorSource& source,
             PointRecord& record);
  /// Fills the caches with the prefix, and connects. Collective.
  void fill_prefix(const Progress& progress);
  /// Allocates and loads what a run needs.
  void open();
  /// Keeps what every step starts from.
  void snapshot() { prefill_->snapshot(); }

  /// Queues the return to the prefix. Untimed, before every step but the recorded one.
  void reload() { passes_->reload(); }
  /// Runs one layer of the chunk; the part of a step that DecodeRunner::also_run takes.
  void run_layer(std::int64_t layer, const StepOptions& options, StageTimer& timer);

  /// Around the step whose chunk every later one must reproduce. Collective.
  void begin_recording();
  void end_recording();

  /// After a step that has ended: notes its reads and, where `compares`, the first difference from the recorded step.
  void end_step(std::int64_t step, bool compares);
  /// The difference since the last call; "" for none.
  std::string take_problem();
  /// Adds those of the steps that ended last, counted and expected.
  void add_reads(RankReads& reads) const;
  /// Adds what all ranks must read together, [branch][step].
  void add_totals(std::vector<std::int64_t>& totals) const;

  /// A fallback on any rank is one on all. Collective.
  bool agree() { return shard_.routes.agree(session_.world); }
  /// Stores routes and fallbacks. Collective.
  void finish();

 private:
  const Session& session_;
  const Part& part_;
  const TensorSource& source_;
  PointRecord& record_;
  ModelShard shard_;
  std::optional<PrefillRunner> prefill_;
  std::optional<PrefillPasses> passes_;
  std::vector<std::int64_t> counted_;  ///< [branch][step]
  std::string problem_;
  bool recording_ = false;
};

}  // namespace nsa
