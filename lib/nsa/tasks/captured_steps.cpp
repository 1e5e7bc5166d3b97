#include "nsa/tasks/captured_steps.hpp"

#include "kernels/diagnostics/fault_injection.hpp"

namespace nsa {

CapturedSteps::CapturedSteps(ModelShard& shard, DecodeRunner& decode, StageTimer& timer, const ModeRun& run, bool mixed)
    : shard_(shard), decode_(decode), timer_(timer), run_(run) {
  if (run.timed == Timed::stages || mixed || !shard.device().capture) return;
  const std::size_t known = shard.routes.fallbacks(Phase::decode).size();
  try {
    capture();
  } catch (const UserError&) {
    // A launch that fails may invalidate the capture it is part of. The step is then captured without it.
    if (shard_.routes.fallbacks(Phase::decode).size() == known) throw;
    capture();
  }
}

CapturedSteps::~CapturedSteps() {
  if (graph_) shard_.device().destroy_graph(graph_);
}

void CapturedSteps::run() {
  fault::at("decode.step");
  if (graph_)
    shard_.device().launch(graph_, shard_.streams.compute);
  else
    queue();
}

void CapturedSteps::capture() {
  graph_ = shard_.device().capture(
      shard_.streams.compute, [](void* self) { static_cast<CapturedSteps*>(self)->queue(); }, this);
}

void CapturedSteps::queue() {
  const bool stamps = run_.timed == Timed::device || run_.timed == Timed::queued;
  if (stamps) decode_.stamp();
  for (std::int64_t i = 0; i < run_.steps_a_sample; ++i) decode_.step(run_.options, timer_);
  if (stamps) decode_.stamp();
}

}  // namespace nsa
