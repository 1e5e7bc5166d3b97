#pragma once
// Prefill: a rank has the query rows of its chunks. K and V are gathered in each layer; queries run tile by tile.

#include <functional>
#include <iterator>
#include <utility>
#include <vector>

#include "nsa/forward/stage_timer.hpp"
#include "nsa/forward/stages.hpp"
#include "nsa/model/inputs.hpp"
#include "nsa/model/selections.hpp"

namespace nsa {

/// Query rows of one sequence that are attended at a time.
struct PrefillTile {
  std::int64_t first_position = 0;
  std::int32_t tokens = 0;
  std::int64_t local_row = 0;  ///< within the rank's rows of a sequence
};

/// Runs a prefill of `positions` tokens and owns its memory, which is released before decode starts.
class PrefillRunner {
 public:
  PrefillRunner(ModelShard& shard, std::int64_t positions, bool record);

  /// Loads x (scope = layer) or q and gates (attention) of this rank's rows. Untimed, before every run.
  void load_rows(const TensorSource& source);
  /// scope = attention: loads the given K and V.
  void load_kv(const TensorSource& source);

  /// Calls `done` after each tile with the fraction of the run that is queued. Not for a timed run.
  void watch(std::function<void(double done)> done) { watch_ = std::move(done); }

  /// Runs all layers. After each tile of the last layer, `on_tile` may read the buffers.
  using OnTile = std::function<void(const StepContext&, const PrefillTile&)>;
  void run(StageTimer& timer, const StepOptions& options, const OnTile& on_tile = nullptr);

  /// Fills the caches of all layers, which decode needs. The queries of the last layer are not attended.
  void fill_caches(StageTimer& timer);

  StepBuffers& buffers() { return buffers_; }
  std::int64_t tile_count() const { return std::ssize(tiles_); }
  std::int64_t last_tile_rows() const { return tiles_.empty() ? 0 : tiles_.back().tokens; }
  /// The memory of a branch's K and V rows on this rank; with shared_kv, [win] is [sel].
  KvPair& rows(Branch branch, std::int64_t layer = 0) {
    return branch == cmp ? raw_ : branch == win && !shard_.shape().shared_kv ? win_ : shard_.caches[layer].sel;
  }

 private:
  /// What attention reads of a layer, all positions: the caches themselves, or copies gathered from all ranks.
  struct CacheViews {
    KvView k[branches], v[branches];
  };

  /// The given tensors that load_rows loads.
  std::vector<GivenTensor> row_inputs() const;
  void load_from_file(const TensorSource& source, const GivenTensor& input);
  void generate(const TensorSource& source, const GivenTensor& input);
  StepContext context(std::int64_t layer, const StepOptions& options, const CacheViews& caches, const QueryTile& rows,
                      std::int64_t first_row);
  void start();
  CacheViews make_caches(std::int64_t layer, const StepOptions& options, StageTimer& timer);
  void project_rows(std::int64_t layer, const StepOptions& options, StageTimer& timer);
  void exchange_raw_halo();
  void compress_rows(std::int64_t layer);
  CacheViews gathered(std::int64_t layer);
  void gather_tokens(std::int64_t layer, Stream* stream);
  void gather_compressed(std::int64_t layer);
  void fill_rings(std::int64_t layer, const CacheViews& caches);
  void attend_rows(std::int64_t layer, const StepOptions& options, const CacheViews& caches, StageTimer& timer,
                   const OnTile& on_tile);
  void load_selections();
  void copy_recorded(const StepContext& ctx);
  void attention(const StepContext& ctx, StageTimer& timer);
  void staged_attention(const StepContext& ctx, StageTimer& timer);
  /// body(tile, query rows, first row within the buffers of all rows)
  template <class Body>
  void each_tile(Body&& body);
  void copy_rows(const KvView& src, const KvView& dst, std::int64_t first, std::int64_t span_begin,
                 std::int64_t span_end);

  ModelShard& shard_;
  const std::int64_t positions_;
  const AttentionPolicy policy_;  ///< of the buffers; it stays the same when another implementation takes over
  const std::vector<PrefillTile> tiles_;
  const std::int64_t local_rows_;  ///< of one sequence
  StepBuffers buffers_;
  Buffer starts_;                       ///< [tiles] first positions, then one 0
  Buffer recorded_;                     ///< given selections: [batch][local rows][groups][n] int32
  KvPair raw_, win_;                    ///< own rows of the cmp and win projections
  KvPair sel_all_, cmp_all_, win_all_;  ///< gathered, kv > 1
  KvPair heads_, heads_all_, ring_all_;
  std::function<void(double)> watch_;
  bool fuses_attention_ = true;  ///< until a launch of the fused operation fails
  std::int64_t tiles_done_ = 0;  ///< of this run, projected and attended
};

}  // namespace nsa
