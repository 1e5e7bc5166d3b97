#include "nsa/gate/asked.hpp"

#include "kernels/diagnostics/error.hpp"
#include "nsa/config/config.hpp"

namespace nsa {

std::optional<std::vector<PointRecord>> asked_points(const RunRecord& run) {
  if (run.config.empty()) return {};
  try {
    const Config config = parse_config(run.config, "the input in the file", {});
    std::vector<PointRecord> asked;
    for (const Point& point : sweep(config)) {
      PointRecord record;
      record.index = std::ssize(asked);
      record.parameters = parameters(config, point);
      asked.push_back(std::move(record));
    }
    return asked;
  } catch (const UserError&) {  // another version's keys
    return {};
  }
}

}  // namespace nsa
