#pragma once
// The arguments of a step's stages over memory of one GPU, for benchmarks and the test of repeated runs.

#include <cstdint>
#include <vector>

#include "kernels/diagnostics/error.hpp"
#include "kernels/interface/backend.hpp"
#include "kernels/interface/buffer.hpp"

namespace nsa::test {

/// Owns the buffers that it allocates.
struct WorkMemory {
  const Backend& backend;
  MemoryAccount account;
  std::vector<Buffer> buffers;
  template <class T = void>
  T* make(std::int64_t bytes) {
    buffers.emplace_back(*backend.device, account, MemoryKind::workspace, static_cast<std::size_t>(bytes));
    return static_cast<T*>(buffers.back().data());
  }
};

/// The memory that the stages of one rank read and write. Rows count from the first row of the tile.
struct StepMemory {
  StageArgs stage;
  const void* q = nullptr;  ///< [rows, H, Dk]
  KvView k[branches] = {}, v[branches] = {};
  const float* gate = nullptr;  ///< [rows, groups, 3]
  float *partials = nullptr, *lse = nullptr;
  void *scores = nullptr, *o = nullptr;
  std::int64_t* reads = nullptr;     ///< [branches][batches, groups]
  std::int32_t* selected = nullptr;  ///< [rows, groups, n_sel]
  Candidate* candidates = nullptr;   ///< ranks > 1
  std::int32_t ranks = 1;

  AttendArgs attend_args(Branch branch) const {
    const LayerShape& s = stage.shape;
    AttendArgs a{stage};
    a.q = q;
    a.k = k[branch];
    a.v = v[branch];
    a.out = partials_at(partials, s, stage.tile.rows(), branch);
    a.reads = reads + branch * stage.tile.batches * s.groups;
    a.selected = selected;
    a.lse = lse;
    a.scores = scores;
    return a;
  }

  RankArgs rank_args() const {
    RankArgs a{stage};
    a.scores = scores;
    a.lse = lse;
    a.lse_ranks = ranks;
    a.cmp_map = k[cmp].map;
    a.token_map = k[sel].map;
    a.q = q;
    a.k_cmp = k[cmp];
    a.cmp_ms = partials_at(partials, stage.shape, stage.tile.rows(), cmp).ms;
    if (ranks > 1)
      a.candidates = candidates;
    else
      a.selected = selected;
    return a;
  }

  SelectArgs select_args() const {
    SelectArgs a{stage};
    a.candidates = candidates;
    a.ranks = ranks;
    a.selected = selected;
    return a;
  }

  CombineArgs combine_args() const {
    CombineArgs a{stage};
    a.partials = partials;
    a.ranks = ranks;
    a.gate = gate;
    a.o = o;
    return a;
  }

  AttentionArgs attention_args() const {
    return {{attend_args(cmp), attend_args(sel), attend_args(win)}, rank_args(), combine_args()};
  }
};

/// Runs a fused operation. Throws InternalError when it does not accept the arguments.
template <class Args>
void run_fused(const FusedOp<Args>& op, const Args& args, Stream* stream) {
  if (!op.accepts || !op.accepts(args)) throw InternalError("the fused operation does not accept these arguments");
  op.run(args, stream);
}

}  // namespace nsa::test
