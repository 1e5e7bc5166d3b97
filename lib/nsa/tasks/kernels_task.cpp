// Measures a point of kind = "kernels".

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <thread>

#include "kernels/diagnostics/error.hpp"
#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/forward/stage_timer.hpp"
#include "nsa/tasks/kernel_bench.hpp"
#include "nsa/tasks/task.hpp"

namespace nsa {
namespace {

// Executions in a graph: enough that the cost of a graph launch does not affect their time.
constexpr std::int64_t executions_a_graph = 8;

/// A stream that is destroyed with its owner.
struct OwnStream {
  explicit OwnStream(const DeviceOps& ops) : device(ops), stream(ops.create_stream()) {}
  ~OwnStream() { device.destroy_stream(stream); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  const DeviceOps& device;
  Stream* stream;
};

/// Executions of one implementation over the copies of its inputs, in graphs where the backend captures graphs.
class Executions {
 public:
  Executions(const DeviceOps& device, const KernelBench& bench, const KernelChoice& choice, Stream* stream)
      : device_(device), bench_(bench), choice_(choice), stream_(stream) {
    if (!device.capture) return;
    const std::int64_t graphs = (bench.copies() + executions_a_graph - 1) / executions_a_graph;
    for (next_ = 0; next_ < graphs * executions_a_graph;)
      graphs_.push_back(device.capture(
          stream, [](void* self) { static_cast<Executions*>(self)->queue(executions_a_graph); }, this));
  }
  ~Executions() {
    for (Graph* graph : graphs_) device_.destroy_graph(graph);
  }
  Executions(const Executions&) = delete;
  Executions& operator=(const Executions&) = delete;

  /// Seconds of one execution, on the least recently read copy of the inputs.
  double sample(StageTimer& timer) {
    const StageTimes times = timer.step([&] {
      if (graphs_.empty())
        queue(1);
      else
        device_.launch(graphs_[static_cast<std::size_t>(next_graph_++ % graphs_.size())], stream_);
    });
    return times[static_cast<int>(Stage::step)] / static_cast<double>(graphs_.empty() ? 1 : executions_a_graph);
  }

 private:
  void queue(std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) bench_.run(choice_, next_++, stream_);
  }
  const DeviceOps& device_;
  const KernelBench& bench_;
  const KernelChoice& choice_;
  Stream* stream_;
  std::int64_t next_ = 0;
  std::size_t next_graph_ = 0;
  std::vector<Graph*> graphs_;
};

/// Runs every implementation once and compares it with float64 and with the reads that the shape requires.
void check(const Session& session, const KernelBench& bench, const std::vector<KernelChoice>& choices, Stream* stream,
           PointRecord& record) {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  const ExactOutputs exact = bench.oracle(stream, std::max(1, cores / std::max(1, session.world.local_size())));
  const std::int64_t expected = bench.expected_reads_total();
  for (const KernelChoice& choice : choices) {
    bench.clear(stream);
    bench.run(choice, 0, stream);
    const KernelError error = kernel_error(bench.output(stream), exact);
    const double largest = session.world.max(error.largest);
    record.kernels.mean_abs_err.push_back(session.world.max(error.mean));
    record.kernels.mean_abs_err_se.push_back(session.world.max(error.standard_error));
    record.kernels.max_abs_err.push_back(largest);
    record.max_abs_err = std::max(record.max_abs_err, largest);
    if (const double excess = session.world.max(error.excess); !(excess <= 1))
      record.fail(fmt::format("{}: error {:.3g} against float64, {:.3g} times what rounding explains", choice.label,
                              largest, excess));
    if (const std::int64_t counted = bench.reads(stream); counted != expected)
      record.fail(choice.label + ": " + std::to_string(counted) + " tokens read, not " + std::to_string(expected));
  }
}

}  // namespace

MemoryAccount run_kernels(const Session& session, const Config& config, const Point& point, PointRecord& record,
                          const Progress& progress) {
  const ControlComm& world = session.world;
  const PhaseScope phase("kernels");
  const DeviceOps& device = *session.backend.device;
  const std::vector<KernelChoice> choices = kernel_choices(*session.backend.kernels, config, point);
  MemoryAccount account;
  const OwnStream own(device);
  std::optional<KernelBench> bench;
  agreed(world, [&] {
    if (choices.empty())
      throw UserError("no implementation of this backend takes the shape (kernels.implementations); list others");
    bench.emplace(Allocator{device, account}, *session.backend.kernels, config, point);
    bench->fill(own.stream);
  });
  KernelRecord& k = record.kernels;
  for (const KernelChoice& choice : choices) {
    k.implementations.push_back(choice.label);
    k.variants.push_back(bench->variant(choice));
  }
  if (config.run.check)
    check(session, *bench, choices, own.stream, record);
  else
    k.mean_abs_err = k.mean_abs_err_se = k.max_abs_err = std::vector<double>(choices.size(), std::nan(""));

  StageTimer timer(device, own.stream);
  NoiseMeter meter(device, own.stream);
  std::vector<std::unique_ptr<Executions>> executions;
  agreed(world, [&] {
    for (const KernelChoice& choice : choices)
      executions.push_back(std::make_unique<Executions>(device, *bench, choice, own.stream));
  });
  const std::int64_t count = std::ssize(choices), reps = config.run.steps;
  std::vector<double> seconds(static_cast<std::size_t>(count * reps));
  ThrottleRecovery recovery(world, config.run);
  do {
    meter.begin();
    for (std::int64_t rep = 0; rep < reps; ++rep) {
      if (session.stop->check_periodically()) throw Interrupted();
      world.barrier();
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t turn = (i + rep) % count;  // the order rotates, and is reversed in every other rep
        const std::int64_t which = rep % 2 == 0 ? turn : count - 1 - turn;
        seconds[static_cast<std::size_t>(which * reps + rep)] =
            executions[static_cast<std::size_t>(which)]->sample(timer);
      }
      meter.stepped();
      progress(static_cast<double>(rep + 1), static_cast<double>(reps), "kernels");
    }
  } while (recovery.repeats(meter));
  record.noise = gather_noise(world, device, {"kernels"}, {meter.take()});
  const std::vector<double> all = world.gather(seconds);  // [rank][implementation][rep]
  k.ranks = world.size();
  k.reps = reps;
  k.seconds.resize(all.size());
  for (std::int64_t r = 0; !all.empty() && r < k.ranks; ++r)
    for (std::int64_t i = 0; i < count; ++i)
      std::copy_n(all.begin() + (r * count + i) * reps, reps, k.seconds.begin() + (i * k.ranks + r) * reps);
  if (const double shared = bench->blocks_shared(); !std::isnan(shared)) record.blocks_shared = shared;
  if (config.output.selection && point.kernel.branch == sel)
    record.tensors.push_back({"selected",
                              {1, bench->rows(), 1, point.kernel.blocks},
                              {"batch", "row", "group", "choice"},
                              {},
                              bench->selected()});
  record.warmup_reps = config.run.warmup;
  record.first_position = point.context - kernel_rows(point);
  record.stop_reason = "steps";
  return account;
}

}  // namespace nsa
