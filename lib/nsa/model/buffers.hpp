#pragma once
// The memory of a run on one rank: the caches of the sequences, and the buffers of a decode step and of a prefill.
// On dry_device() nothing is allocated and only the bytes are counted: this gives the memory plan.

#include <cstdint>
#include <vector>

#include "kernels/interface/buffer.hpp"
#include "nsa/model/partition.hpp"

namespace nsa {

/// A device without memory and work: its allocations are null, and only the account counts them.
const DeviceOps& dry_device();

/// Allocates the buffers of one owner.
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

/// K and V [planes][rows][D] under `map`. rank_stride separates the ranks of a gathered buffer of `ranks` ranks; a
/// rank's part ends with the scales of its rows where `precision` has them.
KvPair make_kv(const Allocator& allocate, MemoryKind kind, const LayerShape& shape, KvPrecision precision,
               std::int64_t planes, const RowMap& map, std::int64_t rows, std::int64_t ranks = 1);
/// Bytes of one rank's part.
std::size_t bytes_of_rank(const KvView& view, DType type);
/// A view that begins so many elements of data and scales later, or earlier.
KvView moved_by(KvView view, std::int64_t elements, std::int64_t scales, DType type);

/// K and V in `count` pages.
KvPair make_paged_kv(const Allocator& allocate, MemoryKind kind, const LayerShape& shape, KvPrecision precision,
                     const RowMap& map, const PageTable& pages, std::int64_t count);

class CachePages;

/// One layer's caches for up to `positions` tokens; with `pages`, sel and cmp lie in these.
struct LayerCaches {
  KvPair sel;  ///< own chunks
  KvPair cmp;  ///< compressed tokens of own chunks, with the halo before each
  KvPair win;  ///< ring of the last w
  KvPair raw;  ///< ring of the last l cmp projections
  LayerCaches(const Allocator& allocate, const Partition& partition, std::int64_t batch, std::int64_t positions,
              const CachePages* pages);
};

/// What the stages of both phases pass on, for `rows` query rows of which one tile is attended at a time.
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
  Buffer x_in;   ///< [rows, dim] storage: the input of project
  Buffer x, y;   ///< [rows, dim] fp32: residual stream (several layers), layer output
  Buffer reads;  ///< [3][batch, groups] int64

  StepBuffers(const Allocator& allocate, const KernelTable& kernels, const Config& config, const Partition& partition,
              const Point& point, std::int64_t rows, const QueryTile& tile, bool exchange, bool record,
              const AttentionPolicy& policy, std::size_t scratch_bytes);
};

}  // namespace nsa
