#include "nsa/results/serialize.hpp"

#include <concepts>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "nsa/results/hdf5/h5.hpp"

namespace nsa {
namespace {

template <class R, class T>
concept Is = std::same_as<std::remove_const_t<R>, T>;

// Every member of a record. A record that gains a member no longer fits its binding and does not compile.

template <Is<RankSystem> R>
auto members(R& r) {
  auto& [host, cpu, gpu, uuid, driver, cuda, nccl, mpi, clock_before, clock_after, ecc_before, ecc_after, environment,
         threads, cores, sharers] = r;
  return std::tie(host, cpu, gpu, uuid, driver, cuda, nccl, mpi, clock_before, clock_after, ecc_before, ecc_after,
                  environment, threads, cores, sharers);
}

template <Is<RunRecord> R>
auto members(R& r) {
  auto& [uuid, start, end, argv, toml, sha256, commit, compiler, backend, status, config, file_sha256, selection_sha256,
         resumed, program, system] = r;
  return std::tie(uuid, start, end, argv, toml, sha256, commit, compiler, backend, status, config, file_sha256,
                  selection_sha256, resumed, program, system);
}

template <Is<TimeTable> R>
auto members(R& r) {
  auto& [modes, ranks, reps, seconds] = r;
  return std::tie(modes, ranks, reps, seconds);
}

template <Is<PhaseRecord> R>
auto members(R& r) {
  auto& [phases, ranks, reps, seconds] = r;
  return std::tie(phases, ranks, reps, seconds);
}

template <Is<ReadTable> R>
auto members(R& r) {
  auto& [ranks, steps, counted, expected, nsa_vibe] = r;
  return std::tie(ranks, steps, counted, expected, nsa_vibe);
}

template <Is<TensorRecord> R>
auto members(R& r) {
  auto& [name, shape, dims, values, integers] = r;
  return std::tie(name, shape, dims, values, integers);
}

template <Is<MemoryRecord> R>
auto members(R& r) {
  auto& [kinds, planned, measured_peak, process_peak] = r;
  return std::tie(kinds, planned, measured_peak, process_peak);
}

template <Is<KernelRecord> R>
auto members(R& r) {
  auto& [implementations, ranks, reps, seconds, mean, max, se, variants] = r;
  return std::tie(implementations, ranks, reps, seconds, mean, max, se, variants);
}

template <Is<NoiseRecord> R>
auto members(R& r) {
  auto& [modes, ranks, seconds, voluntary, involuntary, minor, major, steal, clock, throttle, throttled, cv, outliers,
         clock_max, cache] = r;
  return std::tie(modes, ranks, seconds, voluntary, involuntary, minor, major, steal, clock, throttle, throttled, cv,
                  outliers, clock_max, cache);
}

template <Is<BatchRecord> R>
auto members(R& r) {
  auto& [lengths, reads, reads_expected, length_imbalance, schedule_imbalance] = r;
  return std::tie(lengths, reads, reads_expected, length_imbalance, schedule_imbalance);
}

template <Is<PageRecord> R>
auto members(R& r) {
  auto& [caches, ranks, rows, pages, entries, shared, bytes] = r;
  return std::tie(caches, ranks, rows, pages, entries, shared, bytes);
}

template <Is<QuantisationRecord> R>
auto members(R& r) {
  auto& [agreement, lost, o_change, y_change] = r;
  return std::tie(agreement, lost, o_change, y_change);
}

template <Is<RouteRecord> R>
auto members(R& r) {
  auto& [routes, reasons, kernels] = r;
  return std::tie(routes, reasons, kernels);
}

template <Is<PointRecord> R>
auto members(R& r) {
  auto& [index, parameters, fingerprint, valid, reason, stop_reason, heads, kv, first_position, warmup_reps, time,
         phases, reads, bytes, tokens_kept, copy_bandwidth, memory, routes, route_reasons, route_kernels, exchange,
         fallbacks, max_abs_err, blocks_shared, tensors, noise, noisy, needle, kernels, batch, pages, quantisation,
         chunk] = r;
  return std::tie(index, parameters, fingerprint, valid, reason, stop_reason, heads, kv, first_position, warmup_reps,
                  time, phases, reads, bytes, tokens_kept, copy_bandwidth, memory, routes, route_reasons, route_kernels,
                  exchange, fallbacks, max_abs_err, blocks_shared, tensors, noise, noisy, needle, kernels, batch, pages,
                  quantisation, chunk);
}

template <Is<ResultFile> R>
auto members(R& r) {
  auto& [run, points] = r;
  return std::tie(run, points);
}

class Serializer {
 public:
  std::string bytes;

  template <class T>
  requires std::is_arithmetic_v<T>
  void write(const T& value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void write(const std::string& text) {
    write(text.size());
    bytes += text;
  }
  template <class T>
  void write(const std::vector<T>& values) {
    write(values.size());
    if constexpr (std::is_arithmetic_v<T>)
      bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
    else
      for (const T& value : values) write(value);
  }
  template <class T, std::size_t n>
  void write(const std::array<T, n>& values) {
    for (const T& value : values) write(value);
  }
  template <class K, class V>
  void write(const std::map<K, V>& map) {
    write(map.size());
    for (const auto& [key, value] : map) write(key), write(value);
  }
  void write(const Parameter& parameter) {
    write(parameter.first);
    write(static_cast<char>(parameter.second.index()));
    std::visit([&](const auto& value) { write(value); }, parameter.second);
  }
  template <class R>
  requires requires(const R& r) { members(r); }
  void write(const R& record) {
    std::apply([&](const auto&... member) { (write(member), ...); }, members(record));
  }
};

class Deserializer {
 public:
  explicit Deserializer(std::string_view bytes) : rest_(bytes) {}
  bool done() const { return rest_.empty(); }

  template <class T>
  requires std::is_arithmetic_v<T>
  void read(T& value) { std::memcpy(&value, consume(sizeof value).data(), sizeof value); }
  void read(std::string& text) { text = consume(size()); }
  template <class T>
  void read(std::vector<T>& values) {
    const std::size_t n = size();
    if constexpr (std::is_arithmetic_v<T>) {
      if (n > rest_.size() / sizeof(T)) too_short();
      values.resize(n);
      if (n > 0) std::memcpy(values.data(), consume(n * sizeof(T)).data(), n * sizeof(T));
    } else {
      for (std::size_t i = 0; i < n; ++i) read(values.emplace_back());
    }
  }
  template <class T, std::size_t n>
  void read(std::array<T, n>& values) {
    for (T& value : values) read(value);
  }
  template <class K, class V>
  void read(std::map<K, V>& map) {
    for (std::size_t n = size(); n > 0; --n) {
      K key;
      read(key);
      read(map[key]);
    }
  }
  void read(Parameter& parameter) {
    read(parameter.first);
    char kind = 0;
    read(kind);
    if (kind == 0) parameter.second = read<std::int64_t>();
    if (kind == 1) parameter.second = read<double>();
    if (kind == 2) parameter.second = read<std::string>();
  }
  template <class R>
  requires requires(R& r) { members(r); }
  void read(R& record) {
    std::apply([&](auto&... member) { (read(member), ...); }, members(record));
  }

 private:
  template <class T>
  T read() {
    T value{};
    read(value);
    return value;
  }
  [[noreturn]] static void too_short() { throw h5::Error("damaged: what was read of it ends early"); }
  /// Length of a string or list. Every element takes at least one byte.
  std::size_t size() {
    const auto n = read<std::size_t>();
    if (n > rest_.size()) too_short();
    return n;
  }
  std::string_view consume(std::size_t n) {
    if (n > rest_.size()) too_short();
    const std::string_view consumed = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return consumed;
  }

  std::string_view rest_;
};

}  // namespace

std::string serialize(const ResultFile& result) {
  Serializer serializer;
  serializer.write(result);
  return std::move(serializer.bytes);
}

ResultFile deserialize(std::string_view bytes) {
  Deserializer deserializer(bytes);
  ResultFile result;
  deserializer.read(result);
  if (!deserializer.done()) throw h5::Error("damaged: what was read of it has no end");
  return result;
}

}  // namespace nsa
