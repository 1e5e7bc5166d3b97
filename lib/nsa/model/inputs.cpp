#include "nsa/model/inputs.hpp"

#include <algorithm>

#include "kernels/shared/e4m3.hpp"

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
  if (view.pages.pages) {
    KvView part = view;
    part.pages.first_sequence += static_cast<std::int32_t>(sequences.begin);
    return part;
  }
  const std::int64_t planes = sequences.begin * groups;
  return moved_by(view, planes * view.plane_stride, planes * scales_of_plane(view.plane_stride / view.width), type);
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

std::int64_t stored_bytes(const KvView& view, DType type) {
  return view.width * (is_quantised(view) ? 1 : static_cast<std::int64_t>(size_of(type)));
}

std::byte* stored_at(const KvView& view, std::int64_t element, DType type) {
  return static_cast<std::byte*>(view.data) + element * stored_bytes(view, type) / view.width;
}

}  // namespace

StoredRows empty_rows(std::int64_t count, const KvView& view, DType type) {
  return {std::vector<std::byte>(static_cast<std::size_t>(count * stored_bytes(view, type))),
          std::vector<std::uint8_t>(static_cast<std::size_t>(is_quantised(view) ? count : 0))};
}

StoredRows to_cache(const std::vector<float>& values, const KvView& view, DType type) {
  const std::vector<std::byte> stored = to_storage(values, type);
  if (view.rounded) {
    KvView quantised = view;
    std::uint8_t any = 0;
    quantised.scales = &any, quantised.rounded = false;
    return {to_storage(from_cache(to_cache(values, quantised, type), quantised, type), type), {}};
  }
  if (!is_quantised(view)) return {stored, {}};
  const std::vector<float> rounded = from_storage(stored.data(), values.size(), type);
  StoredRows rows = empty_rows(std::ssize(values) / view.width, view, type);
  for (std::size_t row = 0; row < rows.scales.size(); ++row) {
    const auto first = rounded.begin() + static_cast<std::ptrdiff_t>(row) * view.width, last = first + view.width;
    std::uint32_t largest = 0;
    for (auto x = first; x != last; ++x) largest = std::max(largest, magnitude_bits(*x));
    const std::uint8_t scale = rows.scales[row] = row_scale_byte(largest);
    std::transform(first, last, rows.data.begin() + (first - rounded.begin()),
                   [&](float x) { return std::byte{e4m3_of(x * row_factor(scale))}; });
  }
  return rows;
}

std::vector<float> from_cache(const StoredRows& rows, const KvView& view, DType type) {
  if (!is_quantised(view)) return from_storage(rows.data.data(), rows.data.size() / size_of(type), type);
  std::vector<float> values(rows.data.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = e4m3_value(static_cast<std::uint8_t>(rows.data[i])) *
                row_scale(rows.scales[i / static_cast<std::size_t>(view.width)]);
  return values;
}

void put_row(ModelShard& shard, const KvView& view, std::int64_t plane, std::int64_t c, std::int64_t i,
             const StoredRows& rows, std::int64_t index) {
  const DType type = shard.shape().dtype;
  const std::int64_t bytes = stored_bytes(view, type);
  const KvView pages = on_host(view);
  shard.device().copy(stored_at(view, offset_in_chunk(pages, plane, c, i), type), rows.data.data() + index * bytes,
                      static_cast<std::size_t>(bytes), shard.streams.compute);
  if (is_quantised(view))
    shard.device().copy(view.scales + scale_in_chunk(pages, plane, c, i), rows.scales.data() + index, 1,
                        shard.streams.compute);
}

void get_row(ModelShard& shard, const KvView& view, std::int64_t plane, std::int64_t i, StoredRows& rows,
             std::int64_t index) {
  const DType type = shard.shape().dtype;
  const std::int64_t bytes = stored_bytes(view, type);
  const KvView pages = on_host(view);
  shard.device().copy(rows.data.data() + index * bytes, stored_at(view, offset_of(pages, plane, i), type),
                      static_cast<std::size_t>(bytes), shard.streams.compute);
  if (is_quantised(view))
    shard.device().copy(rows.scales.data() + index, view.scales + scale_of(pages, plane, i), 1, shard.streams.compute);
}

namespace {

// Loads rows of a file, some positions at a time: the whole tensor is never in host memory.
void load_rows(ModelShard& shard, const TensorSource& source, const std::string& name, const Columns& columns,
               const KvView& view, std::int64_t first, std::int64_t last, const SequenceRange& sequences) {
  constexpr std::int64_t max_rows = 4096;
  const std::int64_t groups = shard.shape().groups;
  for (std::int64_t at = first; at < last; at += max_rows) {
    const std::int64_t rows = std::min(max_rows, last - at);
    const std::vector<float> values = given_rows(source, name, columns, at, rows, sequences);
    const StoredRows stored = to_cache(values, view, shard.shape().dtype);
    for (std::int64_t plane = 0; plane < sequences.count * groups; ++plane)
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t from = (plane / groups * rows + r) * groups + plane % groups;
        const std::int64_t chunk = chunk_of(view.map, at + r);
        // A row is in its own chunk, in the halo before the next one, or in the halo after the previous one.
        for (std::int64_t c = std::max<std::int64_t>(0, chunk - 1); c <= chunk + 1; ++c) {
          const std::int64_t local = at + r - (view.map.kv > 1 ? c * view.map.chunk : 0) + view.map.halo;
          if ((view.map.kv == 1 && c != chunk) || !has_chunk(view.map, c) || local < 0 || local >= view.map.stride)
            continue;
          if (writes_row(on_host(view), plane, c, at + r)) put_row(shard, view, plane, c, at + r, stored, from);
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
