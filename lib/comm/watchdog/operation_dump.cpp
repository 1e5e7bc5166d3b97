#include "comm/watchdog/operation_dump.hpp"

#include <fmt/format.h>

#include "kernels/diagnostics/json_quote.hpp"

namespace nsa {

namespace {

constexpr double seconds_per_ns = 1e-9;

}  // namespace

std::string operations_json(const RankStatus& status, std::int64_t now, const std::string& diagnosis) {
  std::string text = fmt::format(
      "{{\n  \"rank\": {},\n  \"host\": {},\n  \"device\": {},\n  \"verdict\": {},\n"
      "  \"operations\": [",
      status.rank, json_quote(status.host), json_quote(status.device), json_quote(diagnosis));
  for (const OperationRecord& o : status.operations) {
    const double seconds_ago = static_cast<double>(now - o.begin) * seconds_per_ns;
    text += fmt::format(
        "{}\n    {{\"number\": {}, \"collective\": {}, \"name\": {}, \"phase\": {}, \"stage\": {}, \"bytes\": {}, "
        "\"seconds_ago\": {:.3f}, \"seconds\": {}}}",
        &o == &status.operations.front() ? "" : ",", o.number, o.kind != OperationKind::wait, json_quote(o.name),
        json_quote(o.phase), json_quote(o.stage), o.bytes, seconds_ago,
        o.end == 0 ? "null" : fmt::format("{:.3f}", static_cast<double>(o.end - o.begin) * seconds_per_ns));
  }
  return text + "\n  ]\n}\n";
}

}  // namespace nsa
