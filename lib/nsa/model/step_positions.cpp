#include "nsa/model/step_positions.hpp"

namespace nsa {

Acceptance acceptance_of(const Config& config, const Point& point) {
  return {static_cast<std::int32_t>(point.query_tokens), repeats(config.run.accept),
          tensor_key(static_cast<std::uint64_t>(config.run.seed), "accept")};
}

StepPositions::StepPositions(const Config& config, const Point& point)
    : point_(point), acceptance_(acceptance_of(config, point)), steps_(config.run.steps) {
  if (accepts_all(acceptance_)) return;
  moved_.assign(static_cast<std::size_t>((steps_ + 1) * point.batch), 0);
  for (std::int64_t i = 0; i < steps_ * point.batch; ++i)
    moved_[i + point.batch] = moved_[i] + kept_tokens(acceptance_, i / point.batch, i % point.batch);
}

std::int64_t StepPositions::operator()(std::int64_t step, std::int64_t b) const {
  return point_.length(b) + (moved_.empty() ? step * acceptance_.tokens : moved_[step * point_.batch + b]);
}

std::int64_t StepPositions::kept(std::int64_t step, std::int64_t b) const {
  return (*this)(step + 1, b) - (*this)(step, b);
}

std::vector<std::int64_t> StepPositions::ends() const {
  std::vector<std::int64_t> list;
  for (std::int64_t b = 0; b < point_.batch; ++b) list.push_back((*this)(steps_, b));
  return list;
}

}  // namespace nsa
