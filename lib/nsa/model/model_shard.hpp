#pragma once
// One rank's share of a layer stack, ready to run: who it is, its weights and caches, its streams and peers.

#include <memory>
#include <vector>

#include "comm/collectives/process_grid.hpp"
#include "nsa/model/buffers.hpp"
#include "nsa/model/weights.hpp"
#include "nsa/routing/router.hpp"

namespace nsa {

/// Two streams and the events that order them: `side` runs beside `compute` between the two events.
struct Streams {
  explicit Streams(const DeviceOps& device);
  ~Streams();
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;
  const DeviceOps& device;
  Stream *compute, *side;
  Event *side_begins, *side_ends;
};

struct ModelShard {
  const Backend backend;
  const Config& config;
  const Point point;
  const Partition partition;
  std::shared_ptr<const GridComms> comms = std::make_shared<GridComms>();  ///< groups of one until connect
  MemoryAccount account;
  Streams streams;
  std::vector<Weights> weights;     ///< by layer; none in scope = attention
  std::vector<LayerCaches> caches;  ///< by layer
  Routes routes;
  Buffer checksum;  ///< uint64 [1], for cache_checksum

  /// Not collective: memory is had before anybody waits for a peer. Throws UserError(device) when it runs out.
  ModelShard(const Backend& backend, const ControlComm& world, const Config& config, const Point& point,
             const TensorSource& source);
  /// Finds the peers, and opens what is not open yet. Collective, once all ranks have their memory.
  void connect(ProcessGrid& grid);
  /// A plan: on dry_device(), with no peers and no values.
  ModelShard(const Backend& dry, const Config& config, const Point& point, const Partition& partition);
  const KernelTable& kernels() const { return *backend.kernels; }
  const DeviceOps& device() const { return *backend.device; }
  const LayerShape& shape() const { return partition.shape; }
  Allocator allocator() { return {device(), account}; }
  /// Before the first step of a phase. Returns the bytes of scratch that its stages need on such tiles.
  std::size_t choose_routes(Phase phase, const QueryTile& tile, const AttentionPolicy& policy);
  std::int64_t planes() const { return point.batch * shape().groups; }

 private:
  void allocate(const TensorSource* source);
};

}  // namespace nsa
