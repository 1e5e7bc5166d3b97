#pragma once
// The stages of a step, one function each, for decode and prefill alike: they fill a stage's arguments from
// the engine and the buffers and call the kernel table.

#include <cstdint>

#include "nsa/model/model_shard.hpp"

namespace nsa {

struct StepOptions {
  std::int32_t leave_out = -1;     ///< ablation: a Branch that is not computed
  std::int32_t force_branch = -1;  ///< one-hot gates
  bool record = false;             ///< also leave o_c and p_slc
};

/// What the stages work on now.
struct StepContext {
  ModelShard& engine;
  StepBuffers& buffers;
  StepOptions options;
  bool exchange = false;  ///< decode with kv > 1: each rank attends what it holds and they merge
  QueryTile tile;
  std::int64_t first_row = 0;  ///< of the tile within q, gate, x, y
  std::int64_t layer = 0;
  KvView k[branches], v[branches];  ///< what attention reads: [cmp], [sel], [win]
  Phase phase = Phase::decode;
  bool weighted = false;  ///< sharded decode: cmp and win travel as one weighted vector (ShardedStep)
  bool opened = false;    ///< sharded decode: cmp's scores are those of ShardedStep

  bool leaves_out(Branch branch) const { return options.leave_out == branch; }
  bool whole_layer() const { return engine.config.run.scope == Scope::layer; }
};

void project(StepContext& work);
void append(StepContext& work, Branch branch, const KvView& k_cache, const KvView& v_cache);
void compress(StepContext& work);  ///< decode: the token that completes, halo copies too
void attend(StepContext& work, Branch branch);
void rank_blocks(StepContext& work);    ///< candidates of this rank, or the selection itself without exchange
void select_blocks(StepContext& work);  ///< from the exchanged candidates
void combine(StepContext& work);
void output(StepContext& work);

/// Decode: project, append and compress, in the backend's own few launches; both phases: everything from attend to
/// combine. False, and nothing queued, where it has none for this.
bool enter_at_once(StepContext& work);
bool attend_at_once(StepContext& work);

/// Decode where ranks share the sequences, in the backend's own few launches: cmp with win before the exchange of lse,
/// and what they give to each head, once that is there. combine() follows `weighted`.
bool shards_at_once(StepContext& work);  ///< whether the backend has that for this work, as it is routed
void open_shard(StepContext& work);
void weigh_shard(StepContext& work, Stream* stream);

void exchange_lse(StepContext& work, Stream* stream);
void exchange_candidates(StepContext& work, Stream* stream);
void exchange_partials(StepContext& work, Stream* stream);
/// Sums y [rows, dim] over the head shards and, with several layers, adds it to the residual stream.
void sum_outputs(StepContext& work, std::int64_t rows);

}  // namespace nsa
