#include "nsa/gate/csv.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/files.hpp"

namespace nsa {
namespace {

constexpr std::streamoff max_bytes = std::streamoff{4} << 20;

[[noreturn]] void fail(const std::string& where, const std::string& what, const std::string& advice) {
  throw UserError(fmt::format("cannot read {} ({}); {}", where, what, advice), ExitCode::file);
}

/// The cell as a message shows it: at most 40 characters, printable ASCII.
std::string printable(const std::string& cell) {
  std::string text = cell.substr(0, 40);
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c > 0x7e; }, '?');
  return "'" + text + (cell.size() > 40 ? "..." : "") + "'";
}

}  // namespace

bool Csv::has(std::string_view column) const {
  return std::find(columns.begin(), columns.end(), column) != columns.end();
}

std::vector<double> Csv::numbers(std::string_view column) const {
  const auto at = std::find(columns.begin(), columns.end(), column) - columns.begin();
  if (at == std::ssize(columns))
    fail(path, fmt::format("column {} is missing; it has {}", column, fmt::join(columns, ", ")),
         "give a CSV with nsa-vibe's columns");
  std::vector<double> values;
  for (const CsvRow& row : rows) {
    const std::string& cell = row.cells[static_cast<std::size_t>(at)];
    double value = std::numeric_limits<double>::quiet_NaN();
    const auto [end, error] = std::from_chars(cell.data(), cell.data() + cell.size(), value);
    if (!cell.empty() && (error != std::errc{} || end != cell.data() + cell.size() || !std::isfinite(value)))
      fail(fmt::format("{}:{}", path, row.line),
           fmt::format("column {} holds {}, which is no number", column, printable(cell)),
           "fix the line or leave the cell empty");
    values.push_back(value);
  }
  return values;
}

Csv parse_csv(std::string_view text, const std::string& path) {
  Csv csv{path, {}, {}};
  CsvReader reader(text, [&](std::int64_t line, CsvFault fault) {
    fail(fmt::format("{}:{}", path, line),
         fault == CsvFault::open_quote ? "a quote is not closed" : "text after a closing quote", "fix the line");
  });
  while (!reader.done()) {
    CsvRow row = reader.row();
    if (row.blank()) continue;
    if (csv.columns.empty()) {
      csv.columns = std::move(row.cells);
      continue;
    }
    if (row.cells.size() != csv.columns.size())
      fail(fmt::format("{}:{}", path, row.line),
           fmt::format("{} cells, the header has {} columns", row.cells.size(), csv.columns.size()), "fix the line");
    csv.rows.push_back(std::move(row));
  }
  std::set<std::string_view> unique;
  for (const std::string& column : csv.columns)
    if (!unique.insert(column).second)
      fail(path, fmt::format("column {} is in the header twice", printable(column)), "give each column once");
  if (csv.rows.empty()) fail(path, "it has no row of data", "give the CSV of a benchmark");
  return csv;
}

Csv read_csv(const std::string& path) {
  if (const std::string why = why_no_file(path); !why.empty()) fail(path, why, "give the CSV of a benchmark");
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (file.is_open() && file.tellg() > max_bytes) fail(path, "larger than 4 MiB", "give the CSV of a benchmark");
  file.seekg(0);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file.is_open() || file.bad()) fail(path, "it cannot be read", "check its permissions");
  return parse_csv(text.str(), path);
}

}  // namespace nsa
