// JSON that the program writes.

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "kernels/diagnostics/json.hpp"
#include "nsa/report/report.hpp"

using namespace nsa;

TEST_CASE("a document keeps its keys in order and is JSON whatever its values are", "[json]") {
  const double third = 1.0 / 3;
  const Json document{{"z", "\"\\\n\x01"},
                      {"a", {std::nan(""), std::numeric_limits<double>::infinity(), 1e-9, 5.0, third}},
                      {"path", "bad\xff.h5"},
                      {"big", std::numeric_limits<std::int64_t>::max()}};
  const std::string text = json_text(document);
  CHECK(text == R"({"z":"\"\\\n\u0001","a":[null,null,1e-09,5.0,0.3333333333333333],"path":"bad)"
                "\xEF\xBF\xBD"
                R"(.h5","big":9223372036854775807})");
  CHECK(Json::parse(text)["a"][4].get<double>() == third);
}

TEST_CASE("a run's figures are numbers as the FOM lines print them", "[json]") {
  std::vector<PointRecord> points(2);
  points[0].parameters = {{"run.context", std::int64_t{64}}, {"run.batch", std::int64_t{1}}};
  points[1].parameters = {{"run.context", std::int64_t{128}}, {"run.batch", std::int64_t{1}}};
  for (PointRecord& point : points) {
    point.max_abs_err = 0.25;
    point.blocks_shared = 0.5;
  }
  points[1].valid = false;
  points[1].reason = "reads differ";
  points[1].max_abs_err = std::numeric_limits<double>::infinity();
  const Json document = Json::parse(to_json({}, "a.h5", points));
  CHECK(document["result"] == "INVALID");
  CHECK(document["file"] == "a.h5");
  const Json& figures = document["figures"];
  CHECK(json_text(figures.begin().value()) == R"({"value":0.25,"unit":"1"})");
  std::vector<std::string> nulls;
  for (const auto& [name, figure] : figures.items())
    if (figure["value"].is_null()) nulls.push_back(name);
  CHECK(figures.size() == 4);
  CHECK(nulls == std::vector<std::string>{"step_max_abs_err_context_128"});
}
