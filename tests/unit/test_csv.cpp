// The CSV reader and the audit of a benchmark's numbers.

#include <filesystem>
#include <fstream>
#include <sstream>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/gate/csv_audit.hpp"

using namespace nsa;

namespace {

constexpr const char* header = "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected\n";

/// nsa-vibe's published decode_gpu_v2.csv.
constexpr const char* nsa_vibe_csv =
    "S,ms_total,ms_cmp,ms_sel,ms_win,reads_actual,reads_expected\n"
    "128,5.862,5.944,6.003,6.001,1159,1193\n"
    "256,5.932,5.952,5.965,6.024,1159,1329\n"
    "512,5.893,5.981,5.998,5.988,1159,1569\n"
    "1024,5.987,6.070,6.122,6.132,1159,1601\n";

CsvAudit audit(const std::string& text) { return audit_csv(parse_csv(text, "a.csv")); }

std::string refusal(const std::string& text) {
  try {
    audit(text);
  } catch (const UserError& error) {
    CHECK(error.code() == ExitCode::file);
    return error.what();
  }
  FAIL("accepted: " << text);
  return {};
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  UNSCOPED_INFO("'" << text << "' lacks '" << part << "'");
  return false;
}

}  // namespace

TEST_CASE("csv: quotes, CRLF, a byte order mark, spaces and blank lines", "[csv]") {
  const Csv csv = parse_csv("\xEF\xBB\xBF\"a\", b ,c\r\n\r\n1,\"2\r\n\"\"x\",\r\n\n 3 ,4e1,-5\n", "a.csv");
  CHECK(csv.columns == std::vector<std::string>{"a", "b", "c"});
  REQUIRE(csv.rows.size() == 2);
  CHECK(csv.rows[0].cells == std::vector<std::string>{"1", "2\r\n\"x", ""});
  CHECK(csv.rows[1].line == 6);
  CHECK(csv.numbers("a") == std::vector<double>{1, 3});
  CHECK(std::isnan(csv.numbers("c")[0]));
  CHECK(csv.numbers("c")[1] == -5);
}

TEST_CASE("csv: an error names file, line and column", "[csv]") {
  const auto refused = [](const std::string& text) { return refusal(text); };
  CHECK(contains(refused(""), "cannot read a.csv (it has no row of data)"));
  CHECK(contains(refused(header), "it has no row of data"));
  CHECK(contains(refused("S,ms_total\n1,2\n"), "a.csv (column ms_cmp is missing; it has S, ms_total)"));
  CHECK(contains(refused(std::string(header) + "1,2,3\n"), "a.csv:2 (3 cells, the header has 7 columns)"));
  CHECK(contains(refused(std::string(header) + "1,2,3,4,5,6,7\n1,2,3,fast,5,6,7\n"),
                 "a.csv:3 (column ms_sel holds 'fast', which is no number)"));
  CHECK(contains(refused(std::string(header) + "1,2,3,inf,5,6,7\n"), "column ms_sel holds 'inf'"));
  CHECK(contains(refused(std::string(header) + "1,2,3,4ms,5,6,7\n"), "column ms_sel holds '4ms'"));
  CHECK(contains(refused(std::string(header) + "1,2,3,\x01\xff,5,6,7\n"),
                 "holds '?"
                 "?'"));
  CHECK(
      contains(refused(std::string(header) + "1,0,3,4,5,6,7\n"), "a.csv:2 (column ms_total holds 0); give a positive"));
  CHECK(contains(refused(std::string(header) + "1,2,3,4,5,-6,7\n"), "column reads_actual holds -6"));
  CHECK(contains(refused(std::string(header) + "1,2,3,4,5,6,7\n,2,3,4,5,6,7\n"),
                 "a.csv:3 (column S is empty); give the row's context"));
  CHECK(contains(refused("a,a\n1,2\n"), "column 'a' is in the header twice"));
  CHECK(contains(refused("a,b\n1,\"2\n"), "a.csv:2 (a quote is not closed)"));
  CHECK(contains(refused("a,b\n1,\"2\"x\n"), "a.csv:2 (text after a closing quote)"));
}

TEST_CASE("csv: a file that is none is refused by name", "[csv]") {
  const auto refused = [](const std::string& path) {
    try {
      read_csv(path);
    } catch (const UserError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  CHECK(contains(refused("/none.csv"), "cannot read /none.csv (no such file)"));
  CHECK(contains(refused("/"), "it is a folder"));
  const std::string path = std::filesystem::temp_directory_path() / ("nsa-" + std::to_string(getpid()) + ".csv");
  std::ofstream(path) << "a\n";
  std::filesystem::resize_file(path, (4 << 20) + 1);
  CHECK(contains(refused(path), "larger than 4 MiB"));
  std::filesystem::remove(path);
}

TEST_CASE("audit: nsa-vibe's CSV is no evidence, for three reasons", "[csv][gate]") {
  const CsvAudit a = audit(nsa_vibe_csv);
  CHECK_FALSE(a.evidence());
  REQUIRE(a.findings.size() == 3);
  CHECK(contains(a.findings[0], "add up to 305% of the total (302.4 to 306.2%)"));
  CHECK(contains(a.findings[0], "one-hot gates"));
  CHECK(contains(a.findings[1], "reads_actual is 1159 at every S from 128 to 1024"));
  CHECK(contains(a.findings[1], "for a sequence of 128 tokens"));
  CHECK(contains(a.findings[2], "in 4 of 4 rows (S = 128: 1159, 1193)"));
  std::ostringstream page;
  print_audit(page, a);
  CHECK(contains(page.str(), "VERDICT: NOT EVIDENCE (a.csv:"));
  CHECK(contains(page.str(), "nsa run inputs/gate/m4_decode.toml"));
}

TEST_CASE("audit: each finding alone", "[csv][gate]") {
  const auto findings = [](const std::string& rows) { return audit(header + rows).findings; };
  const std::string good = "128,10,2,3,2,329,329\n1024,11,3,3,2,1569,1569\n";
  CHECK(findings(good).empty());
  // Parts may exceed a short step, which overlaps what stages apart do not.
  CHECK(findings("128,0.030,0.015,0.020,0.014,329,329\n").empty());
  const auto sum = findings("128,10,2,16,3,329,329\n");
  REQUIRE(sum.size() == 1);
  CHECK(contains(sum[0], "add up to 210% of the total"));
  CHECK(sum[0].find("one-hot") == std::string::npos);
  const auto constant = findings("128,10,2,3,2,900,329\n1024,11,3,3,2,900,1569\n");
  REQUIRE(constant.size() == 2);  // and so they differ
  CHECK(contains(constant[0], "900 at every S"));
  CHECK(constant[0].find("gives for a sequence") == std::string::npos);  // no length gives 900
  const auto gap = findings("128,10,2,3,2,900,329\n512,10,2,3,2,,900\n1024,11,3,3,2,900,1569\n");
  REQUIRE(gap.size() == 2);
  CHECK(contains(gap[0], "900 at every S"));  // the row that was not counted hides nothing
  const auto mismatch = findings("128,10,2,3,2,329,329\n1024,11,3,3,2,1568,1569\n");
  REQUIRE(mismatch.size() == 1);
  CHECK(contains(mismatch[0], "in 1 of 2 rows (S = 1024: 1568, 1569)"));
  const auto empty = findings("128,10,,,,,\n");
  REQUIRE(empty.size() == 1);
  CHECK(contains(empty[0], "there is no share to see"));
}
