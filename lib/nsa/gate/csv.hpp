#pragma once
// Reads comma-separated values with a header line. The reader accepts quotes, CRLF, a byte order mark and blank lines.
// Errors are UserError(file) and name file, line and column.

#include <string>
#include <string_view>
#include <vector>

#include "nsa/config/csv_rows.hpp"

namespace nsa {

struct Csv {
  std::string path;
  std::vector<std::string> columns;
  std::vector<CsvRow> rows;

  bool has(std::string_view column) const;
  /// The column as numbers; an empty cell is NaN. Throws when the column is missing or a cell is not a finite number.
  std::vector<double> numbers(std::string_view column) const;
};

/// Throws when the number of cells in a row differs from the header, a quote is not closed, or the header repeats a
/// name.
Csv parse_csv(std::string_view text, const std::string& path);

/// Throws when the file is missing, not a regular file or larger than 4 MiB.
Csv read_csv(const std::string& path);

}  // namespace nsa
