#include "nsa/engine.hpp"

#include <string>

#include "kernels/error.hpp"

namespace nsa {

namespace {

const AttendKernel& chosen_route(const KernelTable& kernels, Branch branch, const RouteConfig& input) {
  const std::string& wanted = input.implementation[branch];
  if (wanted == "auto") return kernels.attend[branch].front();
  std::string known;
  for (const AttendKernel& kernel : kernels.attend[branch]) {
    if (kernel.name == wanted) return kernel;
    known += (known.empty() ? "" : ", ") + std::string(kernel.name);
  }
  throw UserError(std::string("route.") + branch_names[branch] + " = \"" + wanted + "\" (this backend has " + known +
                  "); choose one of these or \"auto\"");
}

}  // namespace

Streams::Streams(const DeviceOps& ops)
    : device(ops),
      compute(ops.create_stream()),
      exchange(ops.create_stream()),
      forked(ops.create_event()),
      joined(ops.create_event()) {}

Streams::~Streams() {
  device.destroy_event(joined);
  device.destroy_event(forked);
  device.destroy_stream(exchange);
  device.destroy_stream(compute);
}

Engine::Engine(const Backend& opened, const Control& world, const Config& input, const Point& at,
               const TensorSource& source)
    : backend(opened),
      config(input),
      point(at),
      partition(make_partition(input, world.size(), world.rank())),
      heads(opened, world.split(partition.kv_rank, partition.head_shard)),
      kv(opened, world.split(partition.head_shard, partition.kv_rank)),
      kv_control(world.split(partition.head_shard, partition.kv_rank)),
      streams(*opened.device) {
  allocate(&source);
}

Engine::Engine(const Backend& dry, const Config& input, const Point& at, const Partition& planned)
    : backend(dry), config(input), point(at), partition(planned), streams(*dry.device) {
  allocate(nullptr);
}

void Engine::allocate(const TensorSource* source) {
  for (std::int64_t layer = 0; layer < config.model.layers; ++layer) {
    if (config.run.scope == Scope::layer)
      weights.emplace_back(device(), streams.compute, account, config, partition, layer, source);
    caches.emplace_back(allocator(), partition, point.batch, total_positions(config, point));
  }
  for (const Branch branch : kv_column_order) route[branch] = &chosen_route(kernels(), branch, config.route);
}

}  // namespace nsa
