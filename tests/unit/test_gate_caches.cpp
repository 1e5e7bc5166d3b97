// The verdict on FP8 caches, on synthetic records.

#include <sstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/caches.hpp"
#include "nsa/results/schema.hpp"

using namespace nsa;

namespace {

/// A decode point whose steps take `microseconds`, give or take 1%.
PointRecord decode_point(const char* precision, double microseconds, const QuantisationRecord& quantisation = {}) {
  PointRecord point;
  point.parameters = {{"task.kind", std::string("decode")},
                      {"run.context", std::int64_t{65536}},
                      {"run.batch", std::int64_t{32}},
                      {"model.precision", std::string("bf16")},
                      {"model.kv_precision", std::string(precision)},
                      {"model.cmp_precision", std::string(precision)},
                      {"output.file", std::string(precision)}};
  constexpr std::int64_t reps = 40;
  point.time = {{"total"}, 1, reps, std::vector<double>(static_cast<std::size_t>(stage_count * reps), 0.0)};
  for (std::int64_t i = 0; i < reps; ++i)
    point.time.seconds[static_cast<std::size_t>(static_cast<int>(Stage::step) * reps + i)] =
        1e-6 * microseconds * (1 + 0.01 * static_cast<double>(i * 17 % reps) / reps);
  point.quantisation = quantisation;
  return point;
}

GateFile file_of(std::vector<PointRecord> points, const char* commit = "abc") {
  GateFile file{"f.h5", {}};
  file.result.run.git_commit = commit;
  file.result.run.backend = "cuda";
  file.result.run.system.resize(1);
  file.result.run.system[0].gpu = "Test GPU";
  file.result.points = std::move(points);
  return file;
}

CachesVerdict verdict_of(const PointRecord& fp8, const std::vector<PointRecord>& same) {
  const auto verdicts = judge_caches({file_of(same), file_of({fp8})});
  REQUIRE(verdicts.size() == 1);
  return verdicts[0];
}

constexpr QuantisationRecord good = {0.99, 0.002, 0.04, -1};

}  // namespace

TEST_CASE("FP8 caches proceed where they are faster and change little") {
  const CachesVerdict v = verdict_of(decode_point("fp8_e4m3", 58, good), {decode_point("same", 97)});
  CHECK(v.verdict == Verdict::proceed);
  CHECK(v.device == "Test GPU");
  CHECK(v.points.at(0).caches == "fp8");
  CHECK(v.points.at(0).conditions.at(0).measured.value == Approx(97.0 / 58).epsilon(0.02));
  std::ostringstream page;
  print_caches(page, v);
  CHECK(page.str().find("FP8 caches on Test GPU (cuda backend, bf16, commit abc): PROCEED") != std::string::npos);
  CHECK(page.str().find("blocks as chosen 99.00%, at least 95.00%: met") != std::string::npos);
}

TEST_CASE("FP8 caches stay where a condition is not met") {
  const auto stays = [](double microseconds, const QuantisationRecord& q) {
    return verdict_of(decode_point("fp8_e4m3", microseconds, q), {decode_point("same", 97)});
  };
  CHECK(stays(95, good).verdict == Verdict::stay);
  CHECK(stays(95, good).points[0].why == "speed over unquantised caches");
  CHECK(stays(58, {0.9, 0.002, 0.04, -1}).points[0].why == "blocks as chosen");
  CHECK(stays(58, {0.99, 0.02, 0.04, -1}).points[0].why == "importance lost");
  CHECK(stays(58, {0.99, 0.002, 0.2, -1}).points[0].why == "change of o");
}

TEST_CASE("FP8 caches stay open where something is not known") {
  const PointRecord fp8 = decode_point("fp8_e4m3", 58, good);
  CHECK(verdict_of(fp8, {}).verdict == Verdict::inconclusive);
  CHECK(verdict_of(fp8, {}).points[0].why ==
        "speed over unquantised caches: no file has this point with unquantised caches");
  CHECK(verdict_of(decode_point("fp8_e4m3", 58), {decode_point("same", 97)}).verdict == Verdict::inconclusive);
  PointRecord rounded = fp8;
  rounded.route_reasons[sel] = "default; FP8 values in bf16 rows, which more kernels read than FP8 rows (ROUTES.md)";
  CHECK(verdict_of(rounded, {decode_point("same", 97)}).verdict == Verdict::inconclusive);
  PointRecord noisy = fp8;
  noisy.noisy = {"total: the median moved"};
  CHECK(verdict_of(noisy, {decode_point("same", 97)}).verdict == Verdict::inconclusive);
  CHECK(verdict_of(decode_point("fp8_e4m3", 97 / 1.2, good), {decode_point("same", 97)}).verdict ==
        Verdict::inconclusive);
  // Every block is chosen: ranking decides nothing.
  CHECK(verdict_of(decode_point("fp8_e4m3", 58, {-1, -1, 0.04, -1}), {decode_point("same", 97)}).verdict ==
        Verdict::proceed);
  // A point of another shape is no pair.
  PointRecord other = decode_point("same", 97);
  other.parameters[1].second = std::int64_t{4096};
  CHECK(verdict_of(fp8, {other}).verdict == Verdict::inconclusive);
}

TEST_CASE("files of other programs do not judge FP8 caches together") {
  std::string why;
  try {
    judge_caches({file_of({decode_point("same", 97)}), file_of({decode_point("fp8_e4m3", 58)}, "def")});
  } catch (const UserError& error) {
    why = error.what();
  }
  CHECK(why.find("different commits (abc and def)") != std::string::npos);
  CHECK_FALSE(has_fp8_caches(file_of({decode_point("same", 97)})));
  CHECK(has_fp8_caches(file_of({decode_point("fp8_e4m3", 58)})));
}
