#include "comm/watchdog/operation_dump.hpp"

#include <fmt/format.h>

#include "kernels/diagnostics/json_quote.hpp"

namespace nsa {

namespace {

constexpr double second = 1e-9;

}  // namespace

std::string operations_json(const RankView& view, std::int64_t now, const std::string& verdict) {
  std::string text = fmt::format(
      "{{\n  \"rank\": {},\n  \"host\": {},\n  \"device\": {},\n  \"verdict\": {},\n"
      "  \"operations\": [",
      view.rank, json_quote(view.host), json_quote(view.device), json_quote(verdict));
  for (const OperationRecord& o : view.operations) {
    const double begun = static_cast<double>(now - o.begin) * second;
    text += fmt::format(
        "{}\n    {{\"number\": {}, \"collective\": {}, \"name\": {}, \"phase\": {}, \"stage\": {}, \"bytes\": {}, "
        "\"seconds_ago\": {:.3f}, \"seconds\": {}}}",
        &o == &view.operations.front() ? "" : ",", o.number, o.kind != OperationKind::wait, json_quote(o.name),
        json_quote(o.phase), json_quote(o.stage), o.bytes, begun,
        o.end == 0 ? "null" : fmt::format("{:.3f}", static_cast<double>(o.end - o.begin) * second));
  }
  return text + "\n  ]\n}\n";
}

}  // namespace nsa
