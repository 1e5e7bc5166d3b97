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

// Every member of a record. One that gains a member no longer fits its binding and does not compile.

template <Is<RankSystem> R>
auto members(R& r) {
  auto& [host, cpu, gpu, uuid, driver, cuda, nccl, mpi, clock_before, clock_after, ecc_before, ecc_after, environment,
         threads, cores, sharers] = r;
  return std::tie(host, cpu, gpu, uuid, driver, cuda, nccl, mpi, clock_before, clock_after, ecc_before, ecc_after,
                  environment, threads, cores, sharers);
}

template <Is<RunRecord> R>
auto members(R& r) {
  auto& [uuid, start, end, argv, toml, sha256, commit, compiler, backend, status, config, file_sha256, resumed,
         system] = r;
  return std::tie(uuid, start, end, argv, toml, sha256, commit, compiler, backend, status, config, file_sha256, resumed,
                  system);
}

template <Is<TimeTable> R>
auto members(R& r) {
  auto& [modes, ranks, reps, seconds] = r;
  return std::tie(modes, ranks, reps, seconds);
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

template <Is<PointRecord> R>
auto members(R& r) {
  auto& [index, parameters, fingerprint, valid, reason, stop_reason, heads, kv, first_position, warmup_reps, time,
         reads, bytes, copy_bandwidth, memory, routes, route_reasons, route_kernels, exchange, fallbacks, max_abs_err,
         tensors, needle, kernels] = r;
  return std::tie(index, parameters, fingerprint, valid, reason, stop_reason, heads, kv, first_position, warmup_reps,
                  time, reads, bytes, copy_bandwidth, memory, routes, route_reasons, route_kernels, exchange, fallbacks,
                  max_abs_err, tensors, needle, kernels);
}

template <Is<ResultFile> R>
auto members(R& r) {
  auto& [run, points] = r;
  return std::tie(run, points);
}

class Packer {
 public:
  std::string bytes;

  template <class T>
  requires std::is_arithmetic_v<T>
  void put(const T& value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void put(const std::string& text) {
    put(text.size());
    bytes += text;
  }
  template <class T>
  void put(const std::vector<T>& values) {
    put(values.size());
    for (const T& value : values) put(value);
  }
  template <class T, std::size_t n>
  void put(const std::array<T, n>& values) {
    for (const T& value : values) put(value);
  }
  template <class K, class V>
  void put(const std::map<K, V>& map) {
    put(map.size());
    for (const auto& [key, value] : map) put(key), put(value);
  }
  void put(const Parameter& parameter) {
    put(parameter.first);
    put(static_cast<char>(parameter.second.index()));
    std::visit([&](const auto& value) { put(value); }, parameter.second);
  }
  template <class R>
  requires requires(const R& r) { members(r); }
  void put(const R& record) {
    std::apply([&](const auto&... member) { (put(member), ...); }, members(record));
  }
};

class Unpacker {
 public:
  explicit Unpacker(std::string_view bytes) : rest_(bytes) {}
  bool done() const { return rest_.empty(); }

  template <class T>
  requires std::is_arithmetic_v<T>
  void get(T& value) { std::memcpy(&value, take(sizeof value).data(), sizeof value); }
  void get(std::string& text) { text = take(size()); }
  template <class T>
  void get(std::vector<T>& values) {
    for (std::size_t n = size(); n > 0; --n) get(values.emplace_back());
  }
  template <class T, std::size_t n>
  void get(std::array<T, n>& values) {
    for (T& value : values) get(value);
  }
  template <class K, class V>
  void get(std::map<K, V>& map) {
    for (std::size_t n = size(); n > 0; --n) {
      K key;
      get(key);
      get(map[key]);
    }
  }
  void get(Parameter& parameter) {
    get(parameter.first);
    char kind = 0;
    get(kind);
    if (kind == 0) parameter.second = get<std::int64_t>();
    if (kind == 1) parameter.second = get<double>();
    if (kind == 2) parameter.second = get<std::string>();
  }
  template <class R>
  requires requires(R& r) { members(r); }
  void get(R& record) {
    std::apply([&](auto&... member) { (get(member), ...); }, members(record));
  }

 private:
  template <class T>
  T get() {
    T value{};
    get(value);
    return value;
  }
  /// Of a string or a list, whose elements are bytes each.
  std::size_t size() {
    const auto n = get<std::size_t>();
    if (n > rest_.size()) throw h5::Error("damaged: what was read of it ends early");
    return n;
  }
  std::string_view take(std::size_t n) {
    if (n > rest_.size()) throw h5::Error("damaged: what was read of it ends early");
    const std::string_view taken = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return taken;
  }

  std::string_view rest_;
};

}  // namespace

std::string to_bytes(const ResultFile& result) {
  Packer packer;
  packer.put(result);
  return std::move(packer.bytes);
}

ResultFile from_bytes(std::string_view bytes) {
  Unpacker unpacker(bytes);
  ResultFile result;
  unpacker.get(result);
  if (!unpacker.done()) throw h5::Error("damaged: what was read of it has no end");
  return result;
}

}  // namespace nsa
