#include "nsa/model/inputs.hpp"

#include <algorithm>

namespace nsa {

Columns x_columns(const Config& c, const Point& point) {
  return {{point.batch, total_positions(c, point), c.model.dim}, {0}, {c.model.dim}};
}

Columns q_columns(const Config& c, const Point& point, const Partition& p) {
  const std::int64_t first = std::int64_t{p.group_begin} * p.shape.heads_per_group;
  return {{point.batch, total_positions(c, point), c.model.n_heads, c.model.d_k},
          {first, 0},
          {p.shape.heads(), c.model.d_k}};
}

Columns kv_columns(const Config& c, const Point& point, const Partition& p, bool value) {
  const std::int64_t width = value ? c.model.d_v : c.model.d_k;
  return {{point.batch, total_positions(c, point), c.model.n_kv_groups, width},
          {p.group_begin, 0},
          {p.shape.groups, width}};
}

Columns gate_columns(const Config& c, const Point& point, const Partition& p) {
  return {{point.batch, total_positions(c, point), c.model.n_kv_groups, 3}, {p.group_begin, 0}, {p.shape.groups, 3}};
}

std::vector<SequenceRange> equal_sequences(const Point& point) {
  if (!point.ragged()) return {{0, point.batch}};
  return single_sequences(point);
}

std::vector<SequenceRange> single_sequences(const Point& point) {
  std::vector<SequenceRange> list;
  for (std::int64_t b = 0; b < point.batch; ++b) list.push_back({b, 1});
  return list;
}

std::int64_t end_of(const Point& point, const SequenceRange& equal, std::int64_t positions) {
  return point.ragged() ? point.length(equal.begin) : positions;
}

KvView of_sequences(const KvView& view, const SequenceRange& sequences, std::int64_t groups, DType type) {
  KvView part = view;
  if (view.pages.pages) {
    part.pages.first_sequence += static_cast<std::int32_t>(sequences.begin);
    return part;
  }
  part.data = static_cast<std::byte*>(view.data) +
              sequences.begin * groups * view.plane_stride * static_cast<std::int64_t>(size_of(type));
  return part;
}

std::vector<float> given_rows(const TensorSource& source, const std::string& name, const Columns& columns,
                              std::int64_t first, std::int64_t rows) {
  return given_rows(source, name, columns, first, rows, {0, columns.shape[0]});
}

std::vector<float> given_rows(const TensorSource& source, const std::string& name, const Columns& columns,
                              std::int64_t first, std::int64_t rows, const SequenceRange& sequences) {
  std::vector<std::int64_t> begin{sequences.begin, first}, count{sequences.count, rows};
  begin.insert(begin.end(), columns.begin.begin(), columns.begin.end());
  count.insert(count.end(), columns.count.begin(), columns.count.end());
  return source.slab(name, columns.shape, 1.0f, begin, count);
}

std::string kv_name(const LayerShape& shape, Branch branch, bool value) {
  return std::string(value ? "given/v_" : "given/k_") + branch_names[shape.shared_kv ? sel : branch];
}

namespace {

// Loads rows of a file, some positions at a time: the whole tensor is never in host memory.
void load_rows(ModelShard& shard, const TensorSource& source, const std::string& name, const Columns& columns,
               const KvView& view, std::int64_t first, std::int64_t last, const SequenceRange& sequences) {
  constexpr std::int64_t max_rows = 4096;
  const std::int64_t groups = shard.shape().groups, size = static_cast<std::int64_t>(size_of(shard.shape().dtype));
  for (std::int64_t at = first; at < last; at += max_rows) {
    const std::int64_t rows = std::min(max_rows, last - at);
    const std::vector<float> values = given_rows(source, name, columns, at, rows, sequences);
    const std::vector<std::byte> stored = to_storage(values, shard.shape().dtype);
    for (std::int64_t plane = 0; plane < sequences.count * groups; ++plane)
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t from = ((plane / groups * rows + r) * groups + plane % groups) * view.width;
        const std::int64_t chunk = chunk_of(view.map, at + r);
        // A row is in its own chunk, in the halo before the next one, or in the halo after the previous one.
        for (std::int64_t c = std::max<std::int64_t>(0, chunk - 1); c <= chunk + 1; ++c) {
          const std::int64_t local = at + r - (view.map.kv > 1 ? c * view.map.chunk : 0) + view.map.halo;
          if ((view.map.kv == 1 && c != chunk) || !has_chunk(view.map, c) || local < 0 || local >= view.map.stride)
            continue;
          if (!writes_row(on_host(view), plane, c, at + r)) continue;
          shard.device().copy(
              static_cast<std::byte*>(view.data) + offset_in_chunk(on_host(view), plane, c, at + r) * size,
              stored.data() + from * size, static_cast<std::size_t>(view.width * size), shard.streams.compute);
        }
      }
    shard.device().synchronize(shard.streams.compute);
  }
}

void fill_kv(ModelShard& shard, const TensorSource& source, Branch branch, KvPair& pair, std::int64_t first,
             std::int64_t last, const SequenceRange* some, std::int64_t shared_rows) {
  const SequenceRange sequences = some ? *some : SequenceRange{0, shard.point.batch};
  for (const bool value : {false, true}) {
    const std::string name = kv_name(shard.shape(), branch, value);
    const KvView view = of_sequences(value ? pair.v : pair.k, sequences, shard.shape().groups, shard.shape().dtype);
    if (source.from_file()) {
      load_rows(shard, source, name, kv_columns(shard.config, shard.point, shard.partition, value), view, first, last,
                sequences);
      continue;
    }
    FillRowsArgs args;
    args.dtype = shard.shape().dtype;
    args.dst = view;
    args.batch = static_cast<std::int32_t>(sequences.count);
    args.batch_begin = static_cast<std::int32_t>(sequences.begin);
    args.groups = shard.shape().groups;
    args.group_begin = shard.partition.group_begin;
    args.first = first;
    args.last = last;
    args.key = source.key(name);
    args.shared_rows = shared_rows;
    shard.kernels().fill_rows(args, shard.streams.compute);
  }
}

}  // namespace

void fill_kv(ModelShard& shard, const TensorSource& source, Branch branch, KvPair& pair, std::int64_t first,
             std::int64_t last, const SequenceRange* some) {
  fill_kv(shard, source, branch, pair, first, last, some, shard.config.cache.shared_prefix);
}

void fill_compressed(ModelShard& shard, const TensorSource& source, KvPair& pair, std::int64_t first, std::int64_t last,
                     const SequenceRange& some) {
  fill_kv(shard, source, cmp, pair, first, last, &some,
          compressed_tokens(shard.shape().rules, shard.config.cache.shared_prefix - 1));
}

void make_rows(ModelShard& shard, const TensorSource& source, const std::string& name, const Columns& columns,
               DType type, const KvView& to, std::int64_t first, std::int64_t last, const SequenceRange* some,
               float scale) {
  const SequenceRange sequences = some ? *some : SequenceRange{0, shard.point.batch};
  std::int64_t column = 0;  // the first one, among all columns of a position
  for (std::size_t i = 0; i < columns.begin.size(); ++i) column = column * columns.shape[i + 2] + columns.begin[i];
  FillRowsArgs args;
  args.dtype = type;
  args.dst = of_sequences(to, sequences, 1, type);
  args.batch = static_cast<std::int32_t>(sequences.count);
  args.batch_begin = static_cast<std::int32_t>(sequences.begin);
  args.group_begin = static_cast<std::int32_t>(column / to.width);  // all shards have the same number
  args.first = first;
  args.last = last;
  args.key = source.key(name);
  args.scale = scale;
  args.repeat = source.repeat(name);
  args.shared_rows = shard.config.cache.shared_prefix;
  shard.kernels().fill_rows(args, shard.streams.compute);
}

void upload(ModelShard& shard, const std::vector<float>& values, DType type, void* to) {
  const std::vector<std::byte> stored = to_storage(values, type);
  shard.device().copy(to, stored.data(), stored.size(), shard.streams.compute);
  shard.device().synchronize(shard.streams.compute);
}

std::vector<float> download(ModelShard& shard, const void* from, std::int64_t count, DType type) {
  std::vector<std::byte> stored(static_cast<std::size_t>(count) * size_of(type));
  shard.device().copy(stored.data(), from, stored.size(), shard.streams.compute);
  shard.device().synchronize(shard.streams.compute);
  return from_storage(stored.data(), static_cast<std::size_t>(count), type);
}

namespace {

template <class T>
std::vector<T> download_as(ModelShard& shard, const void* from, std::int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  shard.device().copy(values.data(), from, values.size() * sizeof(T), shard.streams.compute);
  shard.device().synchronize(shard.streams.compute);
  return values;
}

}  // namespace

std::vector<std::int32_t> download_ints(ModelShard& shard, const void* from, std::int64_t count) {
  return download_as<std::int32_t>(shard, from, count);
}

std::vector<std::int64_t> download_longs(ModelShard& shard, const void* from, std::int64_t count) {
  return download_as<std::int64_t>(shard, from, count);
}

}  // namespace nsa
