#pragma once
// This rank's weights and inputs: from the synthetic generator, or from a file that another program wrote.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/interface/buffer.hpp"
#include "kernels/shared/random.hpp"
#include "nsa/model/partition.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {

/// The source of a run's tensors, by their names in files (docs/SCHEMA.md). `file` empty: synthetic, with variance
/// 1 / fan-in for matrices and 1 for x.
class TensorSource {
 public:
  TensorSource(const Config& config, const std::string& file);
  bool from_file() const { return file_ != nullptr; }
  std::uint64_t key(const std::string& name) const { return tensor_key(seed_, name.c_str()); }
  /// How often a row of the synthetic tensor repeats the one before it, of 2^32: run.overlap for given/q.
  std::uint64_t repeat(const std::string& name) const { return name == "given/q" ? repeat_ : 0; }
  /// First rows of every sequence of the tensor that are those of sequence 0: cache.shared_prefix.
  std::int64_t shared_rows(const std::string& name) const;
  /// A slab of the whole tensor, row-major fp32, not yet rounded to storage.
  /// Throws UserError(file) when the file lacks the tensor, or it has another shape or a value that is not finite.
  std::vector<float> slab(const std::string& name, const std::vector<std::int64_t>& shape, float scale,
                          const std::vector<std::int64_t>& begin, const std::vector<std::int64_t>& count) const;

 private:
  std::vector<float> read_file(const std::string& name, const std::vector<std::int64_t>& shape,
                               const std::vector<std::int64_t>& begin, const std::vector<std::int64_t>& count) const;

  std::uint64_t seed_, repeat_;
  std::int64_t shared_prefix_;
  std::unique_ptr<TensorFile> file_;
};

/// A weight tensor of one layer: its name in the file and its whole shape.
struct WeightSpec {
  std::string name;  ///< "weights/w_q", or "weights/layer0/w_q" when the model has several layers
  std::vector<std::int64_t> shape;
  float scale;
};
std::vector<WeightSpec> weight_specs(const Config& config, std::int64_t layer);

/// One layer's weights in backend memory.
class Weights {
 public:
  /// Allocates without values when `source` is null.
  Weights(const DeviceOps& device, Stream* stream, MemoryAccount& account, const Config& config,
          const Partition& partition, std::int64_t layer, const TensorSource* source);
  const LayerWeights& layer() const { return layer_; }

 private:
  std::vector<Buffer> buffers_;
  LayerWeights layer_;
};

/// Number of elements of a shape.
std::int64_t elements_of(const std::vector<std::int64_t>& shape);

/// fp32 values rounded to storage, as bytes; and back.
std::vector<std::byte> to_storage(const std::vector<float>& values, DType type);
std::vector<float> from_storage(const void* data, std::size_t count, DType type);

}  // namespace nsa
