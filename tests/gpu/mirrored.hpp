#pragma once
// Memory mirrored on the host and on the GPU, for tests that run the same stage on both.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cuda/runtime/cuda.hpp"
#include "kernels/host/runtime/host.hpp"
#include "kernels/interface/backend.hpp"
#include "kernels/shared/float16.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::test {

inline const Backend& gpu() {
  static const Backend backend = open_cuda(0);
  return backend;
}
inline const Backend& cpu() {
  static const Backend backend = {BackendKind::host, &host_kernels(), &host_device()};
  return backend;
}

inline float value_at(DType type, const void* data, std::int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(data)[i];
  if (type == DType::bf16) return to_float(static_cast<const Bf16*>(data)[i]);
  return to_float(static_cast<const Fp16*>(data)[i]);
}

/// `bytes` on both sides, which the backends' allocate fills with NaN.
class MirroredBuffer {
 public:
  explicit MirroredBuffer(std::int64_t bytes)
      : bytes_(static_cast<std::size_t>(bytes)),
        host_(cpu().device->allocate(bytes_)),
        device_(gpu().device->allocate(bytes_)) {}
  ~MirroredBuffer() {
    cpu().device->release(host_);
    gpu().device->release(device_);
  }
  MirroredBuffer(const MirroredBuffer&) = delete;
  MirroredBuffer& operator=(const MirroredBuffer&) = delete;
  template <class T = void>
  T* on(const Backend& backend) const {
    return static_cast<T*>(backend.kind == BackendKind::host ? host_ : device_);
  }
  template <class T>
  T* host() const {
    return static_cast<T*>(host_);
  }
  std::size_t bytes() const { return bytes_; }
  void clear() const {
    std::memset(host_, 0, bytes_);
    to_gpu();
  }
  void to_gpu() const { move(device_, host_); }
  void to_host() const { move(host_, device_); }
  /// What the GPU holds.
  template <class T>
  std::vector<T> from_gpu() const {
    std::vector<T> values(bytes_ / sizeof(T));
    move(values.data(), device_);
    return values;
  }

 private:
  void move(void* to, const void* from) const {
    gpu().device->synchronize(nullptr);
    gpu().device->copy(to, from, bytes_, nullptr);
    gpu().device->synchronize(nullptr);
  }
  std::size_t bytes_;
  void* host_;
  void* device_;
};

/// Whether both sides hold the same bits; for stages that only move data.
inline bool same_bits(const MirroredBuffer& buffer) {
  const auto device = buffer.from_gpu<unsigned char>();
  return std::memcmp(device.data(), buffer.host<unsigned char>(), device.size()) == 0;
}

/// |a - b| / |b| over all elements; infinite when either holds a NaN.
inline double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return INFINITY;
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

/// `count` values of storage type on both sides, as floats: {GPU's, host's}.
inline std::pair<std::vector<float>, std::vector<float>> values_of(const MirroredBuffer& buffer, DType type,
                                                                   std::int64_t count) {
  const auto device = buffer.from_gpu<unsigned char>();
  std::pair<std::vector<float>, std::vector<float>> out;
  for (std::int64_t i = 0; i < count; ++i) {
    out.first.push_back(value_at(type, device.data(), i));
    out.second.push_back(value_at(type, buffer.host<void>(), i));
  }
  return out;
}
inline double relative_error(const MirroredBuffer& buffer, DType type) {
  const auto [device, host] = values_of(buffer, type, static_cast<std::int64_t>(buffer.bytes() / size_of(type)));
  return relative_error(device, host);
}

/// A K or V cache of `planes` planes for `rows` rows under a map, synthetic rows [0, rows) on both sides.
struct MirroredKv {
  MirroredBuffer memory;
  KvView view;
  DType type;
  static std::int64_t capacity(const RowMap& map, std::int64_t rows) {
    if (map.ring > 0) return map.ring;
    if (map.chunk == INT64_MAX) return rows;
    std::int64_t max_chunks = 0;
    for (std::int32_t r = 0; r < map.kv; ++r) {
      const std::int64_t chunks = owned_chunks(map, rows + map.halo, r);
      if (chunks > max_chunks) max_chunks = chunks;
    }
    return max_chunks * map.stride;
  }
  MirroredKv(DType storage, const RowMap& map, std::int64_t planes, std::int64_t rows, std::int32_t width)
      : memory(((map.rank == all_ranks && map.ring == 0 ? map.kv : 1) * planes * capacity(map, rows) + padding_rows) *
               width * static_cast<std::int64_t>(size_of(storage))),
        type(storage) {
    view.map = map;
    view.width = width;
    view.plane_stride = capacity(map, rows) * width;
    view.rank_stride = planes * view.plane_stride;
  }
  KvView on(const Backend& backend) const {
    KvView v = view;
    v.data = memory.on<void>(backend);
    return v;
  }
  void fill(std::int32_t batch, std::int32_t groups, std::int64_t rows, const char* name, float scale = 1.0f) const {
    for (const Backend* b : {&cpu(), &gpu()})
      b->kernels->fill_rows({type, on(*b), batch, groups, 0, 0, rows, tensor_key(7, name), scale}, nullptr);
    gpu().device->synchronize(nullptr);
  }
};

}  // namespace nsa::test
