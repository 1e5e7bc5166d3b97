#pragma once
// Comma-separated values with a header line, as benchmarks write them: quotes, CRLF, a byte order mark and blank
// lines are understood. What cannot be read is a UserError(file) that names file, line and column.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nsa {

struct CsvRow {
  std::int64_t line;  ///< 1-based, of the file
  std::vector<std::string> cells;
};

struct Csv {
  std::string path;
  std::vector<std::string> columns;
  std::vector<CsvRow> rows;

  bool has(std::string_view column) const;
  /// The column as numbers, NaN where a cell is empty. Throws when the column is missing or a cell is no finite
  /// number.
  std::vector<double> numbers(std::string_view column) const;
};

/// Throws when a row has not as many cells as the header, a quote stays open, or the header repeats a name.
Csv parse_csv(std::string_view text, const std::string& path);

/// Throws when the file is missing, not plain or larger than 4 MiB.
Csv read_csv(const std::string& path);

}  // namespace nsa
