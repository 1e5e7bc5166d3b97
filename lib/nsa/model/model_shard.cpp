#include "nsa/model/model_shard.hpp"

#include <algorithm>
#include <utility>

#include "nsa/model/selections.hpp"

namespace nsa {

Streams::Streams(const DeviceOps& ops)
    : device(ops),
      compute(ops.create_stream()),
      side(ops.create_stream()),
      side_begins(ops.create_event()),
      side_ends(ops.create_event()) {}

Streams::~Streams() {
  device.destroy_event(side_ends);
  device.destroy_event(side_begins);
  device.destroy_stream(side);
  device.destroy_stream(compute);
}

namespace {

// Whether fused decode steps of one query token alone read the caches: stages are not timed, blocks are not given, no
// prefill attends.
bool runs_fused_steps_alone(const Config& c, const Point& point) {
  const bool stages = std::ranges::find(c.run.modes, Mode::branches) != c.run.modes.end(),
             fills = c.run.fill == CacheFill::synthetic || c.model.layers == 1;
  const auto fused = [](const std::string& route) { return route == "auto" || route == "fused"; };
  return c.kind == TaskKind::decode && point.query_tokens == 1 && !stages && !replays(c) && fills &&
         std::ranges::all_of(c.route.implementation, fused);
}

}  // namespace

Partition stored_by(const KernelTable& kernels, const Config& config, const Point& point, Partition p) {
  const Fp8Support support = kernels.fp8_support ? kernels.fp8_support(p.shape, p.kv) : Fp8Support::none;
  if (support == Fp8Support::every_kernel) return p;
  if (support == Fp8Support::fused_step && runs_fused_steps_alone(config, point)) return p;
  for (KvPrecision* precision : {&p.shape.kv_precision, &p.shape.cmp_precision})
    if (*precision == KvPrecision::fp8_e4m3) *precision = KvPrecision::fp8_rounded;
  return p;
}

ModelShard::ModelShard(std::shared_ptr<ModelResources> resources, const Backend& of, const Config& input,
                       const Point& at, const Partition& share)
    : resources_(std::move(resources)),
      backend(of),
      config(input),
      point(at),
      partition(stored_by(*of.kernels, input, at, share)),
      account(resources_->account),
      streams(resources_->streams),
      weights(resources_->weights) {
  // Throws before any allocation where the backend lacks a requested route. The phases choose again for their tiles.
  for (const Phase phase : {Phase::prefill, Phase::decode})
    choose_routes(phase, {0, static_cast<std::int32_t>(point.batch), 1, nullptr, total_positions(config, point)}, {});
  checksum = allocator()(MemoryKind::workspace, 8);
  if (config.cache.paged()) pages.emplace(allocator(), config, partition, point);
  for (std::int64_t layer = 0; layer < config.model.layers; ++layer)
    caches.emplace_back(allocator(), partition, point.batch, total_positions(config, point), pages ? &*pages : nullptr);
}

ModelShard::ModelShard(const Backend& opened, const ControlComm& world, const Config& input, const Point& at,
                       const TensorSource& source)
    : ModelShard(std::make_shared<ModelResources>(*opened.device), opened, input, at,
                 make_partition(input, at, world.size(), world.rank())) {
  make_weights(&source);
}

ModelShard::ModelShard(const Backend& dry, const Config& input, const Point& at, const Partition& planned)
    : ModelShard(std::make_shared<ModelResources>(*dry.device), dry, input, at, planned) {
  make_weights(nullptr);
}

ModelShard::ModelShard(const ModelShard& other, const Config& input, const Point& at, const Partition& share)
    : ModelShard(other.resources_, other.backend, input, at, share) {}

void ModelShard::make_weights(const TensorSource* source) {
  if (config.run.scope != Scope::layer) return;
  for (std::int64_t layer = 0; layer < config.model.layers; ++layer)
    resources_->weights.emplace_back(device(), streams.compute, account, config, partition, layer, source);
}

// The communicators outlive the shard, but while it exists their memory counts as memory of the point, once.
void ModelShard::connect(ProcessGrid& grid) {
  const bool counted = std::exchange(resources_->connected, true);
  comms = grid.comms(partition.kv);
  if (!counted) account.add(MemoryKind::workspace, comms->heads.memory_bytes() + comms->kv.memory_bytes());
}

std::size_t ModelShard::choose_routes(Phase phase, const QueryTile& tile, const AttentionPolicy& policy) {
  routes.choose(backend, config, phase, shape(), tile);
  return routes.scratch_bytes(kernels(), phase, shape(), tile, policy);
}

namespace {

std::vector<const Buffer*> rings_of(const std::vector<LayerCaches>& caches) {
  std::vector<const Buffer*> rings;
  for (const LayerCaches& cache : caches)
    for (const KvPair* pair : {&cache.win, &cache.raw}) rings.insert(rings.end(), {&pair->k_memory, &pair->v_memory});
  return rings;
}

}  // namespace

RingSnapshot::RingSnapshot(ModelShard& shard) : shard_(shard) {
  for (const Buffer* ring : rings_of(shard.caches))
    copies_.push_back(shard.allocator()(MemoryKind::activations, static_cast<std::int64_t>(ring->bytes())));
}

void RingSnapshot::save() {
  std::size_t i = 0;
  for (const Buffer* ring : rings_of(shard_.caches))
    shard_.device().copy(copies_[i++].data(), ring->data(), ring->bytes(), shard_.streams.compute);
}

void RingSnapshot::restore() {
  std::size_t i = 0;
  for (const Buffer* ring : rings_of(shard_.caches))
    shard_.device().copy(ring->data(), copies_[i++].data(), ring->bytes(), shard_.streams.compute);
}

}  // namespace nsa
