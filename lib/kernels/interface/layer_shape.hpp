#pragma once
// What one layer is on this rank, and the query rows that a stage works on.

#include <cstdint>

#include "kernels/shared/block_rules.hpp"
#include "kernels/shared/dtype.hpp"

namespace nsa {

enum Branch : std::int32_t { cmp = 0, sel = 1, win = 2 };
constexpr std::int32_t branches = 3;
constexpr const char* branch_names[branches] = {"cmp", "sel", "win"};

enum class GateKind : std::int32_t { softmax, sigmoid };
enum class PhiKind : std::int32_t { mean, mlp };

/// In which order the log-sum-exp of the compressed scores is reduced: the same on every kv layout, so that every
/// layout forms the same bits. AttendArgs says how.
struct LseLayout {
  std::int64_t segment = 64;  ///< consecutive compressed tokens reduced left to right: those of a KV chunk
  std::int32_t buckets = 24;  ///< running (m, sum) that segments are dealt to by turns; kv divides it
};

/// One layer as this rank sees it.
struct LayerShape {
  std::int32_t groups = 1;           ///< local KV groups
  std::int32_t heads_per_group = 1;  ///< h
  std::int32_t d_k = 64, d_v = 64;
  std::int32_t dim = 256;  ///< model width
  DType dtype = DType::f32;
  KvPrecision kv_precision = KvPrecision::same;   ///< of the caches of sel and win
  KvPrecision cmp_precision = KvPrecision::same;  ///< of the compressed tokens
  GateKind gate = GateKind::softmax;
  PhiKind phi = PhiKind::mean;
  std::int32_t phi_hidden = 0;
  bool shared_kv = false;  ///< every branch uses the sel projections
  double rope_base = 10000.0;
  BlockRules rules;
  LseLayout lse;
  constexpr std::int32_t heads() const { return groups * heads_per_group; }
  /// Of the caches that attention of a branch reads.
  constexpr KvPrecision precision_of(Branch branch) const { return branch == cmp ? cmp_precision : kv_precision; }
  constexpr bool quantises() const { return kv_precision != KvPrecision::same || cmp_precision != KvPrecision::same; }
};

/// Bytes of a cached row of `width` values, its scale included.
constexpr std::int64_t row_bytes(DType type, KvPrecision precision, std::int64_t width) {
  return precision == KvPrecision::fp8_e4m3 ? width + 1 : width * static_cast<std::int64_t>(size_of(type));
}

/// The query rows a stage works on. Row r = i * tokens + j is sequence batch_begin + i at position
/// first_position(tile, i) + j. Decode: the query tokens of a step. Prefill: positions of one chunk.
struct QueryTile {
  std::int32_t batch_begin = 0, batches = 1, tokens = 1;
  const std::int64_t* first_position = nullptr;  ///< memory of the backend: [1], or [batches] of a ragged batch
  std::int64_t max_positions = 0;                ///< no position of any row reaches this: sizes launches and scratch
  std::int32_t position_stride = 0;              ///< between the positions of sequences: 0, or 1 of a ragged batch
  std::int64_t mean_positions = 0;               ///< of a ragged batch: positions of a sequence in the mean
  bool decodes = false;  ///< the rows are the query tokens of a decode step; one row a sequence always is
  constexpr std::int64_t rows() const { return std::int64_t{batches} * tokens; }
  /// Whether the rows are those of a decode step.
  constexpr bool is_step() const { return tokens == 1 || decodes; }
  /// Whether every sequence has a position of its own.
  constexpr bool ragged() const { return position_stride != 0; }
};

/// Position of the first row of the tile's i-th sequence.
NSA_HD std::int64_t first_position(const QueryTile& tile, std::int64_t i) {
  return tile.first_position[i * tile.position_stride];
}
/// Sequence of the tile that row r is of.
template <class Index>
NSA_HD Index sequence_of_row(const QueryTile& tile, Index r) {
  return tile.tokens == 1 ? r : r / tile.tokens;
}
/// Position of row r of the tile.
NSA_HD std::int64_t position_of_row(const QueryTile& tile, std::int64_t r) {
  return tile.tokens == 1 ? first_position(tile, r) : first_position(tile, r / tile.tokens) + r % tile.tokens;
}

}  // namespace nsa
