#include "comm/watchdog/operation_dump.hpp"

#include <cmath>

#include "kernels/diagnostics/json.hpp"

namespace nsa {

namespace {

/// Seconds of a time in ns, in whole milliseconds.
double seconds(std::int64_t ns) { return std::round(static_cast<double>(ns) * 1e-6) * 1e-3; }

Json operation_json(const OperationRecord& o, std::int64_t now) {
  return {{"number", o.number},
          {"collective", o.kind != OperationKind::wait},
          {"name", o.name},
          {"phase", o.phase},
          {"stage", o.stage},
          {"bytes", o.bytes},
          {"seconds_ago", seconds(now - o.begin)},
          {"seconds", o.end == 0 ? Json() : Json(seconds(o.end - o.begin))}};
}

}  // namespace

std::string operations_json(const RankStatus& status, std::int64_t now, const std::string& diagnosis) {
  Json operations = Json::array();
  for (const OperationRecord& o : status.operations) operations.push_back(operation_json(o, now));
  const Json dump{{"rank", status.rank},
                  {"host", status.host},
                  {"device", status.device},
                  {"verdict", diagnosis},
                  {"operations", std::move(operations)}};
  return json_text(dump, 2) + "\n";
}

}  // namespace nsa
