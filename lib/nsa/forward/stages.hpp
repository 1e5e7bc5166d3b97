#pragma once
// The stages of a step, one function each, for decode and prefill. A stage fills its arguments from the context
// and calls the kernel table.

#include <cstdint>

#include "nsa/model/model_shard.hpp"
#include "nsa/model/selections.hpp"

namespace nsa {

struct StepOptions {
  std::int32_t leave_out = -1;       ///< ablation: a Branch that is not computed
  std::int32_t force_branch = -1;    ///< one-hot gates
  bool record = false;               ///< also store o_c and p_slc
  std::int64_t* readings = nullptr;  ///< of clocks by a sharded step (ShardedStepArgs)
};

enum class Prologue { staged, fused };
/// sharded: the fused phases between the exchanges of ranks that share the sequences (KernelTable::sharded_attention).
enum class Attention { staged, fused, sharded };

/// How a step runs where its stages are not timed one by one. Every plan selects the same blocks.
struct StepPlan {
  Prologue prologue = Prologue::staged;
  Attention attention = Attention::staged;
  /// Ranks that share the sequences: all of attention is KernelTable::sharded_step. `attention` holds for a pass that
  /// records, which needs the branches apart.
  bool one_launch = false;
  /// Everything up to output, and the end of the step, is KernelTable::decode_layer; with one_launch project, then
  /// KernelTable::sharded_step, which does what is around attention too. Not in a pass of several ranks that records.
  bool fused_layer = false;
};

/// The state that the stages of one layer and tile share. It does not change while they run.
struct StepContext {
  ModelShard& shard;
  StepBuffers& buffers;
  const StepOptions options;
  const Phase phase;
  const std::int64_t layer;
  const std::int64_t first_row;  ///< of the tile within q, gate, x, y
  const bool exchanges;          ///< decode with kv > 1: each rank attends its own rows, and the ranks merge partials
  const bool sharded;            ///< this step's attention is Attention::sharded
  const bool one_launch;         ///< it is StepPlan::one_launch, which leaves o cut by heads
  const StageArgs stage;
  const KvView k[branches], v[branches];  ///< what attention reads: [cmp], [sel], [win]

  bool leaves_out(Branch branch) const { return options.leave_out == branch; }
  /// Whether the step selects blocks; else nobody attends them, or they are given.
  bool ranks_blocks() const { return !leaves_out(sel) && !replays(shard.config); }
  bool whole_layer() const { return shard.config.run.scope == Scope::layer; }
  /// Sharded: the ranks exchange gated partials. A record needs the branches apart, so it exchanges ordinary ones.
  bool exchanges_gated() const { return sharded && !options.record; }
  Stream* stream() const { return shard.streams.compute; }
};

void project(const StepContext& ctx);
void append(const StepContext& ctx, Branch branch, const KvView& k_cache, const KvView& v_cache);
void compress(const StepContext& ctx);  ///< decode: the token that completes, halo copies too
void attend(const StepContext& ctx, Branch branch);
void score_blocks(const StepContext& ctx);   ///< candidates of this rank; without exchanges the selection
void select_blocks(const StepContext& ctx);  ///< from the exchanged candidates
void combine(const StepContext& ctx);
void output(const StepContext& ctx);

/// The fused operations: whether the backend has one for this context and its routes, and the call of it.
bool has_fused_prologue(const StepContext& ctx);
bool has_fused_attention(const StepContext& ctx);
bool has_decode_layer(const StepContext& ctx, const AdvanceArgs& log);
bool has_sharded_attention(const StepContext& ctx);
bool has_sharded_step(const StepContext& ctx);
void fused_prologue(const StepContext& ctx);
void fused_attention(const StepContext& ctx);
void decode_layer(const StepContext& ctx, const AdvanceArgs& log, bool ends_step);
void sharded_step(const StepContext& ctx);
void try_sharded_step(const StepContext& ctx);  ///< without exchanges: o and the selection are undefined

/// The phases of sharded attention: cmp and win over this rank's rows; their sum, gated and normalised over all ranks,
/// once lse is exchanged; o, once the gated partials are.
void local_attention(const StepContext& ctx);
void normalise_partials(const StepContext& ctx, Stream* stream);
void merge_ranks(const StepContext& ctx);

void exchange_lse(const StepContext& ctx, Stream* stream);
void exchange_candidates(const StepContext& ctx, Stream* stream);
void exchange_partials(const StepContext& ctx, Stream* stream);
/// Ranks that exchange inside a launch start it at the same time, as they do behind another layer: an exchange of 16
/// bytes, queued before a timed step.
void align_ranks(const StepContext& ctx);
/// o of all heads on every rank, after a step that leaves it cut by heads. For checks: no timed step needs it.
void gather_heads(const StepContext& ctx);
/// Sums y [rows, dim] from the context's first row on over the ranks that have other heads and, with several layers,
/// adds it to the residual stream.
void sum_outputs(const StepContext& ctx, std::int64_t rows);

}  // namespace nsa
