#include "nsa/tasks/mixed_chunk.hpp"

#include <utility>

namespace nsa {

MixedChunk::MixedChunk(const Session& session, const ModelShard& rows, const Part& chunk, const TensorSource& source,
                       PointRecord& record)
    : session_(session),
      part_(chunk),
      source_(source),
      record_(record),
      shard_(rows, part_.config, part_.point,
             make_partition(part_.config, part_.point, session.world.size(), session.world.rank())),
      counted_(static_cast<std::size_t>(branches * part_.config.run.steps), 0) {}

void MixedChunk::fill_prefix(const Progress& progress) {
  if (part_.config.run.prefix == 0) return shard_.connect(*session_.grid);
  fill_caches(session_, shard_, source_, part_.config.run.prefix, progress);
}

void MixedChunk::open() {
  prefill_.emplace(shard_, prefill_range(part_.config, part_.point), part_.config.records());
  passes_.emplace(session_, shard_, *prefill_, source_, record_);
  passes_->load();
}

void MixedChunk::run_layer(std::int64_t layer, const StepOptions& options, StageTimer& timer) {
  if (layer == 0) prefill_->start();
  PrefillRunner::OnTile on_tile;
  if (recording_) on_tile = [&](const StepContext& ctx, const PrefillTile& tile) { passes_->take_tile(ctx, tile); };
  prefill_->run_layer(layer, timer, options, on_tile);
}

void MixedChunk::begin_recording() {
  passes_->begin_recording();
  recording_ = true;
}

// Its tensors have names of their own; the weights are those of the decode rows.
void MixedChunk::end_recording() {
  recording_ = false;
  std::vector<TensorRecord> tensors_of_rows = std::exchange(record_.tensors, {});
  passes_->end_recording();
  std::vector<TensorRecord> own = std::exchange(record_.tensors, std::move(tensors_of_rows));
  for (TensorRecord& tensor : own) {
    if (tensor.name.starts_with("weights/")) continue;
    tensor.name = "chunk/" + tensor.name;
    record_.tensors.push_back(std::move(tensor));
  }
}

void MixedChunk::end_step(std::int64_t step, bool compares) {
  const RankReads reads = passes_->reads();
  for (int c = 0; c < branches; ++c) counted_[c * part_.config.run.steps + step] = reads.counted[c];
  if (compares && problem_.empty()) problem_ = passes_->problem();
}

std::string MixedChunk::take_problem() {
  const std::string problem = std::exchange(problem_, "");
  return problem.empty() ? "" : "chunk: " + problem;
}

void MixedChunk::add_reads(RankReads& reads) const {
  const RankReads own = passes_->reads();
  for (std::int64_t i = 0; i < std::ssize(counted_); ++i) {
    reads.counted[i] += counted_[i];
    reads.expected[i] += own.expected[i / reads.steps];
  }
}

void MixedChunk::add_totals(std::vector<std::int64_t>& totals) const {
  const std::vector<std::int64_t> own = total_reads(part_.config, part_.point);
  for (std::int64_t i = 0; i < std::ssize(totals); ++i) totals[i] += own[i / part_.config.run.steps];
}

void MixedChunk::finish() {
  record_.chunk = agreed_routes(session_.world, shard_, Phase::prefill);
  for (const std::string& line : shard_.routes.fallbacks(Phase::prefill)) record_.fallbacks.push_back("chunk " + line);
}

}  // namespace nsa
