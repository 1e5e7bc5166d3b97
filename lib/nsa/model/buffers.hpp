#pragma once
// The memory of a run on one rank: caches that live as long as the sequence, and the buffers of a decode step
// and of a prefill. Constructed on dry_device() it allocates nothing and only accounts: that is the plan.

#include <cstdint>
#include <vector>

#include "kernels/interface/buffer.hpp"
#include "nsa/model/partition.hpp"

namespace nsa {

/// A device that does nothing: allocations are counted and not made.
const DeviceOps& dry_device();

/// Makes the buffers of one owner.
struct Allocator {
  const DeviceOps& device;
  MemoryAccount& account;
  Buffer operator()(MemoryKind kind, std::int64_t bytes) const {
    return Buffer(device, account, kind, static_cast<std::size_t>(bytes));
  }
};

struct KvPair {
  KvView k, v;
  Buffer k_memory, v_memory;
};

/// K and V [planes][rows][D] under `map`. rank_stride is that of a gathered buffer of `ranks` such parts.
KvPair make_kv(const Allocator& allocate, MemoryKind kind, const LayerShape& shape, std::int64_t planes,
               const RowMap& map, std::int64_t rows, std::int64_t ranks = 1);

/// One layer's caches for up to `positions` tokens.
struct LayerCaches {
  KvPair sel;  ///< own chunks
  KvPair cmp;  ///< compressed tokens of own chunks, with the halo in front
  KvPair win;  ///< ring of the last w
  KvPair raw;  ///< ring of the last l cmp projections
  LayerCaches(const Allocator& allocate, const Partition& partition, std::int64_t batch, std::int64_t positions);
};

/// What both phases hand from stage to stage, for `rows` query rows of which one tile is attended at a time.
struct StepBuffers {
  Buffer q, gate;                   ///< [rows, H, Dk], [rows, groups, 3]
  Buffer k[branches], v[branches];  ///< [tile rows, groups, D]; shared_kv: only [sel]
  Buffer scores, scratch;
  Buffer lse, lse_all;  ///< [lse_slots] of this rank; [kv] gathered (empty when kv = 1)
  Buffer candidates, candidates_all;
  Buffer selected;  ///< [layers][tile rows, groups, n_sel]
  Buffer partials, partials_all;
  Buffer o;                   ///< [tile rows, H, Dv]
  Buffer o_branch[branches];  ///< [tile rows, H, Dv], for records
  Buffer p_slc;               ///< [tile rows, groups, p_slc_blocks], for records
  std::int64_t p_slc_blocks = 0;
  Buffer x_in;   ///< [rows, dim] storage: what project reads
  Buffer x, y;   ///< [rows, dim] fp32: residual stream (several layers), layer output
  Buffer reads;  ///< [3][batch, groups] int64

  StepBuffers(const Allocator& allocate, const KernelTable& kernels, const Config& config, const Partition& partition,
              const Point& point, std::int64_t rows, const QueryTile& tile, bool exchange, bool record,
              const AttentionPolicy& policy, std::size_t scratch_bytes);
};

}  // namespace nsa
