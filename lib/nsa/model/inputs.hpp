#pragma once
// Stores given values (x, or q, k, v and gates) in backend memory.

#include <cstdint>
#include <string>

#include "nsa/model/model_shard.hpp"

namespace nsa {

/// Columns [begin, begin + count) of a tensor whose trailing dimensions are flattened.
struct Columns {
  std::vector<std::int64_t> shape;         ///< of the whole tensor: [batch, positions, ...]
  std::vector<std::int64_t> begin, count;  ///< of the trailing dimensions
};
Columns x_columns(const Config& config, const Point& point);
Columns q_columns(const Config& config, const Point& point, const Partition& partition);
Columns kv_columns(const Config& config, const Point& point, const Partition& partition, bool value);
Columns gate_columns(const Config& config, const Point& point, const Partition& partition);

/// A given tensor and the memory that holds this rank's columns of it.
struct GivenTensor {
  std::string name;
  Columns columns;
  DType type;  ///< of the memory: storage or fp32
  const Buffer* memory;
};

/// The sequences [begin, begin + count) of a batch.
struct SequenceRange {
  std::int64_t begin = 0, count = 0;
};
/// Those that have rows in common: all, or, of a ragged batch, one after the other.
std::vector<SequenceRange> equal_sequences(const Point& point);
/// One after the other.
std::vector<SequenceRange> single_sequences(const Point& point);
/// The end of their rows in caches that hold the first `positions` of every sequence; of a ragged batch, whose caches
/// are filled to its longest sequence, their own length.
std::int64_t end_of(const Point& point, const SequenceRange& equal, std::int64_t positions);
/// The view of these sequences alone, of `groups` planes each. It keeps the strides.
KvView of_sequences(const KvView& view, const SequenceRange& sequences, std::int64_t groups, DType type);

/// Rows [first, first + rows) of the sequences as [sequence][rows][columns], fp32.
std::vector<float> given_rows(const TensorSource& source, const std::string& name, const Columns& columns,
                              std::int64_t first, std::int64_t rows, const SequenceRange& sequences);
/// The same of every sequence.
std::vector<float> given_rows(const TensorSource& source, const std::string& name, const Columns& columns,
                              std::int64_t first, std::int64_t rows);

/// The same of a synthetic source, bit for bit, generated in backend memory: the rows of [first, last) that `to` holds,
/// storage or fp32, [batch][rows][columns] under its map, times `scale`. All head shards have the same number of
/// columns. Null `sequences`: all.
void make_rows(ModelShard& shard, const TensorSource& source, const std::string& name, const Columns& columns,
               DType type, const KvView& to, std::int64_t first, std::int64_t last,
               const SequenceRange* sequences = nullptr, float scale = 1.0f);

/// Rows as a cache stores them: storage type; or, of a quantised cache, E4M3 with a scale each (shared/e4m3.hpp).
struct StoredRows {
  std::vector<std::byte> data;
  std::vector<std::uint8_t> scales;
};
/// Values [rows][view.width] as rows of the view, and back. A quantised row is one of its values in storage type.
StoredRows to_cache(const std::vector<float>& values, const KvView& view, DType type);
std::vector<float> from_cache(const StoredRows& rows, const KvView& view, DType type);
/// Room for `count` rows, all zero.
StoredRows empty_rows(std::int64_t count, const KvView& view, DType type);
/// Queues the copy of rows[index] to row i of chunk c or of its halo; of row i in its own chunk to rows[index].
void put_row(ModelShard& shard, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i,
             const StoredRows& rows, std::int64_t index);
void get_row(ModelShard& shard, const KvView& view, std::int64_t plane, std::int64_t i, StoredRows& rows,
             std::int64_t index);

/// "given/k_sel", "given/v_win", ...: the given tensor that serves `branch`.
std::string kv_name(const LayerShape& shape, Branch branch, bool value);

/// Fills the rows of [first, last) that the pair holds, its halos too, with the given K and V of a branch. Null
/// `sequences`: all.
void fill_kv(ModelShard& shard, const TensorSource& source, Branch branch, KvPair& pair, std::int64_t first,
             std::int64_t last, const SequenceRange* sequences = nullptr);
/// The same of compressed tokens, which are then no means of anything.
void fill_compressed(ModelShard& shard, const TensorSource& source, KvPair& pair, std::int64_t first, std::int64_t last,
                     const SequenceRange& sequences);

/// Copies host values to the device, rounded to storage or as fp32.
void upload(ModelShard& shard, const std::vector<float>& values, DType type, void* to);
/// Copies `count` storage or fp32 elements to the host.
std::vector<float> download(ModelShard& shard, const void* from, std::int64_t count, DType type);
std::vector<std::int32_t> download_ints(ModelShard& shard, const void* from, std::int64_t count);
std::vector<std::int64_t> download_longs(ModelShard& shard, const void* from, std::int64_t count);

}  // namespace nsa
