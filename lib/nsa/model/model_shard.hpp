#pragma once
// One rank's shard of a layer stack, ready to run: its partition, weights, caches, streams and communicators.

#include <memory>
#include <optional>
#include <vector>

#include "comm/collectives/process_grid.hpp"
#include "nsa/model/buffers.hpp"
#include "nsa/model/pages.hpp"
#include "nsa/model/weights.hpp"
#include "nsa/routing/router.hpp"

namespace nsa {

/// Two streams and the events that order them: `side` runs concurrently with `compute` between the two events.
struct Streams {
  explicit Streams(const DeviceOps& device);
  ~Streams();
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;
  const DeviceOps& device;
  Stream *compute, *side;
  Event *side_begins, *side_ends;

  /// Queues `work(side)` behind what `compute` holds by now. wait_side() lets `compute` wait for it.
  template <class Work>
  void on_side(Work&& work) const {
    device.record(side_begins, compute);
    device.wait(side, side_begins);
    work(side);
    device.record(side_ends, side);
  }
  void wait_side() const { device.wait(compute, side_ends); }
};

/// The partition with FP8 caches as the kernels that the config runs can read them (KernelTable::fp8_support).
Partition stored_by(const KernelTable& kernels, const Config& config, const Point& point, Partition partition);

/// What the batches of one model have in common on a rank.
struct ModelResources {
  explicit ModelResources(const DeviceOps& device) : streams(device) {}
  MemoryAccount account;
  Streams streams;
  std::vector<Weights> weights;  ///< by layer; none in scope = attention
  bool connected = false;        ///< whether the account counts the memory of the communicators
};

struct ModelShard {
 private:
  std::shared_ptr<ModelResources> resources_;  ///< outlives the caches, which the account counts

 public:
  const Backend backend;
  const Config& config;
  const Point point;
  const Partition partition;
  std::shared_ptr<const GridComms> comms = std::make_shared<GridComms>();  ///< groups of one until connect
  MemoryAccount& account;
  const Streams& streams;
  const std::vector<Weights>& weights;
  std::optional<CachePages> pages;  ///< of paged caches
  std::vector<LayerCaches> caches;  ///< by layer
  Routes routes;
  Buffer checksum;  ///< uint64 [1], for cache_checksum

  /// Not collective: a rank allocates before it waits for peers. Throws UserError(device) when memory runs out.
  ModelShard(const Backend& backend, const ControlComm& world, const Config& config, const Point& point,
             const TensorSource& source);
  /// Another batch of the model that `other` holds: they share weights, streams and account. Not collective either.
  ModelShard(const ModelShard& other, const Config& config, const Point& point, const Partition& partition);
  /// Takes the communicators of the grid, which opens the missing ones. Collective, after all ranks have allocated.
  void connect(ProcessGrid& grid);
  /// A plan: on dry_device(), without peers and values.
  ModelShard(const Backend& dry, const Config& config, const Point& point, const Partition& partition);
  const KernelTable& kernels() const { return *backend.kernels; }
  const DeviceOps& device() const { return *backend.device; }
  const LayerShape& shape() const { return partition.shape; }
  Allocator allocator() { return {device(), account}; }
  /// Called before the first step of a phase. Returns the scratch that its stages need on such tiles, bytes.
  std::size_t choose_routes(Phase phase, const QueryTile& tile, const AttentionPolicy& policy);
  std::int64_t planes() const { return point.batch * shape().groups; }

 private:
  ModelShard(std::shared_ptr<ModelResources> resources, const Backend& backend, const Config& config,
             const Point& point, const Partition& partition);
  void make_weights(const TensorSource* source);
};

/// A copy of the ring caches of every layer. Steps overwrite rings; other caches only grow.
class RingSnapshot {
 public:
  explicit RingSnapshot(ModelShard& shard);
  void save();     ///< queues the copy of the rings
  void restore();  ///< queues the copy back

 private:
  ModelShard& shard_;
  std::vector<Buffer> copies_;
};

}  // namespace nsa
