#pragma once
// Rows of comma-separated values, for every reader of CSV.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace nsa {

struct CsvRow {
  std::int64_t line;               ///< line number in the file, from 1, of its first cell
  std::vector<std::string> cells;  ///< without the blanks around them and without quotes

  bool blank() const { return cells.size() == 1 && cells[0].empty(); }
};

enum class CsvFault { open_quote, text_after_quote };

/// Reads the text row by row. A cell in quotes may hold commas, line ends and doubled quotes. The reader accepts LF,
/// CRLF and a byte order mark.
class CsvReader {
 public:
  /// `refuse(line, fault)` throws.
  CsvReader(std::string_view text, std::function<void(std::int64_t, CsvFault)> refuse);
  bool done() const { return text_.empty(); }
  CsvRow row();

 private:
  std::string plain();
  std::string quoted();
  void skip_blanks();
  void end_of_line();

  std::string_view text_;  ///< what is left of it
  std::function<void(std::int64_t, CsvFault)> refuse_;
  std::int64_t line_ = 1;
};

}  // namespace nsa
