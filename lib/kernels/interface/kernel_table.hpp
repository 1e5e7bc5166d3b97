#pragma once
// The interface between the algorithm and the hardware: one plain function pointer a stage, filled by the host backend
// and by the CUDA backend. lib/nsa calls these and nothing else of a backend.

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/interface/stage_args.hpp"

namespace nsa {

struct Stream;  // opaque, made by DeviceOps

/// One implementation of a branch. `sdpa` exists for every branch and accepts every shape: others fall back to it. It
/// is the fastest packed SDPA of the backend, and `sdpa_gemm` (matrix products) where that refuses the shape.
struct AttendKernel {
  const char* name;  ///< "sdpa", "sdpa_gemm", "masked", "fused", "flash"
  bool (*accepts)(const LayerShape&, const QueryTile&);
  /// Throws LaunchError where it could not be queued and nothing is lost: another may then run on the same arguments.
  void (*run)(const AttendArgs&, Stream*);
  /// cmp: whether AttentionPolicy::recompute_scores is right for prefill tiles, on whole or gathered caches. The shape
  /// alone decides, so that every kv layout and every tile of it chooses by the same bits. Null: never.
  bool (*recompute_scores)(const LayerShape&) = nullptr;
  /// Bytes of scratch it needs where these are more than KernelTable::scratch_bytes; null: never.
  std::size_t (*scratch)(const LayerShape&, const QueryTile&, const AttentionPolicy&) = nullptr;
  /// Where it is several kernels: the name of the one that `run` takes for these arguments. Null: it is one.
  const char* (*variant)(const AttendArgs&) = nullptr;
  const char* variant_name(const AttendArgs& a) const { return variant ? variant(a) : name; }
};

/// Several stages as one operation: it gives what they give one after the other, and the same blocks are chosen.
template <class Args>
struct FusedOp {
  bool (*accepts)(const Args&) = nullptr;       ///< null: the backend has no such operation
  void (*run)(const Args&, Stream*) = nullptr;  ///< throws LaunchError where it could not be queued and nothing is lost
  const char* (*variant)(const Args&) = nullptr;  ///< the name of what `run` takes for these arguments; null: "step"
};

/// The phases of a decode step's attention between the exchanges of the ranks that share its sequences, in order:
/// local_attention, exchange of lse; rank; normalise_partials, which needs lse_all alone, beside the exchange of
/// candidates; select, attend of sel into gated_partial_sel(); exchange of `gated`; merge_ranks. The same blocks are
/// chosen as stage by stage.
struct ShardedAttention {
  bool (*accepts)(const ShardedAttentionArgs&) = nullptr;  ///< null: the backend has no such operation
  /// cmp and win over the rows of this rank: scores, lse, and the window's (m, s) after the buckets.
  void (*local_attention)(const ShardedAttentionArgs&, Stream*) = nullptr;
  /// Writes the sum of cmp and win, normalised and gated, to `gated`.
  void (*normalise_partials)(const ShardedAttentionArgs&, Stream*) = nullptr;
  void (*merge_ranks)(const ShardedAttentionArgs&, Stream*) = nullptr;  ///< o from gated_all
};

/// fused_step: decode_attention, and append, compress, copy_rows, fill_rows and checksum.
enum class Fp8Support { none, fused_step, every_kernel };

struct KernelTable {
  void (*project)(const ProjectArgs&, Stream*);
  void (*append)(const AppendArgs&, Stream*);
  void (*compress)(const CompressArgs&, Stream*);
  std::span<const AttendKernel> attend[branches];  ///< never empty; the first accepts every shape
  void (*rank)(const RankArgs&, Stream*);
  void (*select)(const SelectArgs&, Stream*);
  void (*combine)(const CombineArgs&, Stream*);
  void (*output)(const OutputArgs&, Stream*);
  /// out [rows, dim] storage = x / sqrt(mean(x^2) + 1e-6), or x itself when `normalise` is false.
  void (*rmsnorm)(const LayerShape&, std::int64_t rows, const float* x, void* out, bool normalise, Stream*);
  /// x [count] += y.
  void (*add)(std::int64_t count, float* x, const float* y, Stream*);
  void (*copy_rows)(const CopyRowsArgs&, Stream*);
  void (*fill_rows)(const FillRowsArgs&, Stream*);
  void (*checksum)(const ChecksumArgs&, Stream*);
  void (*advance)(const AdvanceArgs&, Stream*);

  FusedOp<PrologueArgs> prologue = {};  ///< decode: tile.tokens = 1
  FusedOp<AttentionArgs> decode_attention = {};
  FusedOp<DecodeLayerArgs> decode_layer = {};
  FusedOp<AttentionArgs> prefill_attention = {};
  ShardedAttention sharded_attention = {};
  /// All of sharded attention, exchanges included. Every rank of the group runs it on the same tile in the same order.
  FusedOp<ShardedStepArgs> sharded_step = {};

  /// Which kernels read quantised caches of the shape (KvPrecision::fp8_e4m3), where so many ranks share the sequences.
  /// Where others run, the caches hold the same values in storage type (fp8_rounded). Null: none.
  Fp8Support (*fp8_support)(const LayerShape&, int ranks) = nullptr;
  /// Bytes of `scores` for a tile of that many rows when the rank holds `cmp_rows` memory rows of compressed tokens.
  /// None are needed with policy.recompute_scores.
  std::size_t (*score_bytes)(const LayerShape&, const QueryTile&, std::int64_t cmp_rows);
  /// Bytes of `scratch` that suffice for every stage on such a tile; AttendKernel::scratch says which kernel needs
  /// more.
  std::size_t (*scratch_bytes)(const LayerShape&, const QueryTile&, const AttentionPolicy&);
  /// Of a decode step of a ragged batch at these positions: the most K/V rows of compressed tokens that an SM or a
  /// cluster attends, over the mean of all that could. Null: work is dealt as threads become free.
  double (*schedule_imbalance)(const LayerShape&, const QueryTile&, std::span<const std::int64_t> positions) = nullptr;
  std::int32_t max_tile_tokens;   ///< rows of a prefill tile at most
  std::size_t tile_score_budget;  ///< bytes that the scores of a prefill tile may take
  std::size_t max_exchange_memory =
      0;  ///< bytes of device memory that a group of ranks takes at most to exchange through
};

}  // namespace nsa
