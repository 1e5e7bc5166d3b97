#pragma once
// Prefill: a rank has the query rows of its KV chunks. K and V are gathered in each layer; queries run tile by tile.
//
// A prefill runs on caches that may hold earlier tokens, its prefix, and as one or several prefill chunks: all layers
// of one chunk, then of the next, whose prefix then includes it. Before a chunk, the rings hold the last tokens of its
// prefix, which its windows and its first compressed tokens need.

#include <functional>
#include <iterator>
#include <optional>
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
  std::int64_t local_row = 0;  ///< within the rank's rows of a sequence and prefill chunk
};

/// A prefill chunk and this rank's part of it: tiles [tiles_begin, tiles_end), `rows` query rows of each sequence.
/// Buffers of all query rows hold the rows of each prefill chunk together: [batch][rows] from batch * first_row on.
struct PrefillChunk : Span {
  std::size_t tiles_begin = 0, tiles_end = 0;
  std::int64_t first_row = 0, rows = 0;
};

/// Runs a prefill and owns its memory, which is released before decode starts.
class PrefillRunner {
 public:
  PrefillRunner(ModelShard& shard, const PrefillRange& range, bool record);

  /// Keeps a copy of the rings for restore. Only with a prefix: a run starts from its rings, and overwrites them.
  void snapshot();
  /// Queues the rings' return to the prefix. Before every run; without a prefix there is nothing to do.
  void restore();

  /// Loads x (scope = layer) or q and gates (attention) of this rank's rows. Untimed, before every run.
  void load_rows(const TensorSource& source);
  /// scope = attention: loads the given K and V.
  void load_kv(const TensorSource& source);

  /// Calls `done` after each tile with the fraction of the run that is queued. Not for a timed run.
  void watch(std::function<void(double done)> done) { watch_ = std::move(done); }

  /// Runs all layers. After each tile of the last layer, `on_tile` may read the buffers.
  using OnTile = std::function<void(const StepContext&, const PrefillTile&)>;
  void run(StageTimer& timer, const StepOptions& options, const OnTile& on_tile = nullptr);

  /// The same layer by layer, of a prefill that is one chunk: start(), then each layer in order.
  void start();
  void run_layer(std::int64_t layer, StageTimer& timer, const StepOptions& options, const OnTile& on_tile = nullptr) {
    run_layer(chunks_.front(), layer, timer, options, on_tile);
  }

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
  void run_layer(const PrefillChunk& chunk, std::int64_t layer, StageTimer& timer, const StepOptions& options,
                 const OnTile& on_tile);
  CacheViews make_caches(const PrefillChunk& chunk, std::int64_t layer, const StepOptions& options, StageTimer& timer);
  void read_rings(const PrefillChunk& chunk, std::int64_t layer);
  void project_rows(const PrefillChunk& chunk, std::int64_t layer, const StepOptions& options, StageTimer& timer);
  void exchange_raw_halo(const PrefillChunk& chunk);
  void compress_rows(const PrefillChunk& chunk, std::int64_t layer);
  /// The rows of a layer's caches in order: copied from their pages up to the end of the chunk, or the caches.
  const KvPair& sel_in_order(const PrefillChunk& chunk, std::int64_t layer, Stream* stream);
  const KvPair& cmp_in_order(const PrefillChunk& chunk, std::int64_t layer, Stream* stream);
  CacheViews gathered(const PrefillChunk& chunk, std::int64_t layer);
  void gather_rows(const char* what, const PrefillChunk& chunk, const KvPair& own, const KvPair& all, Stream* stream);
  void gather_tokens(const PrefillChunk& chunk, std::int64_t layer, Stream* stream);
  void gather_compressed(const PrefillChunk& chunk, std::int64_t layer);
  void fill_rings(const PrefillChunk& chunk, std::int64_t layer, const CacheViews& caches);
  void attend_rows(const PrefillChunk& chunk, std::int64_t layer, const StepOptions& options, const CacheViews& caches,
                   StageTimer& timer, const OnTile& on_tile);
  void load_selections();
  void copy_recorded(const StepContext& ctx);
  void attention(const StepContext& ctx, StageTimer& timer);
  void staged_attention(const StepContext& ctx, StageTimer& timer);
  /// Of the tile's first query, within the buffers of all query rows.
  std::int64_t row_of_tile(const PrefillChunk& chunk, std::int64_t batch, const PrefillTile& tile) const {
    return shard_.point.batch * chunk.first_row + batch * chunk.rows + tile.local_row;
  }
  /// body(tile, query rows, first row within the buffers of all query rows)
  template <class Body>
  void each_tile(const PrefillChunk& chunk, Body&& body);
  bool holds_earlier(const PrefillChunk& chunk) const;
  /// Rows of [first, last), as CopyRowsArgs.
  void copy_rows(const KvView& src, const KvView& dst, std::int64_t first, std::int64_t last, std::int64_t span_begin,
                 std::int64_t span_end, Stream* stream);
  void copy_rows(const KvView& src, const KvView& dst, std::int64_t first, std::int64_t last, std::int64_t span_begin,
                 std::int64_t span_end) {
    copy_rows(src, dst, first, last, span_begin, span_end, shard_.streams.compute);
  }

  ModelShard& shard_;
  const PrefillRange range_;
  const AttentionPolicy policy_;    ///< of the buffers; it stays the same when another implementation takes over
  std::vector<PrefillTile> tiles_;  ///< of all prefill chunks
  const std::vector<PrefillChunk> chunks_;  ///< by rising position
  StepBuffers buffers_;
  Buffer starts_;    ///< first positions, of the [tiles] and then of the [chunks]
  Buffer recorded_;  ///< given selections: [query rows][groups][n] int32
  std::optional<RingSnapshot> prefix_rings_;
  KvPair raw_, win_;                    ///< own rows of the cmp and win projections, at their positions
  KvPair sel_rows_, cmp_rows_;          ///< of paged caches: own rows in order
  KvPair sel_all_, cmp_all_, win_all_;  ///< gathered, kv > 1
  KvPair piece_, piece_all_;            ///< a prefill chunk's rows of these, own and gathered
  KvPair heads_, heads_all_, ring_all_;
  std::function<void(double)> watch_;
  bool fuses_attention_ = true;  ///< until a launch of the fused operation fails
  std::int64_t tiles_done_ = 0;  ///< of this run, projected and attended
};

}  // namespace nsa
