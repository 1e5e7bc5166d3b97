#include "nsa/config/csv_rows.hpp"

#include <algorithm>
#include <utility>

namespace nsa {

CsvReader::CsvReader(std::string_view text, std::function<void(std::int64_t, CsvFault)> refuse)
    : text_(text), refuse_(std::move(refuse)) {
  constexpr std::string_view byte_order_mark = "\xef\xbb\xbf";  // spreadsheets write it
  if (text_.starts_with(byte_order_mark)) text_.remove_prefix(byte_order_mark.size());
}

CsvRow CsvReader::row() {
  CsvRow row{line_, {}};
  while (true) {
    skip_blanks();
    row.cells.push_back(text_.starts_with('"') ? quoted() : plain());
    if (text_.starts_with(',')) {
      text_.remove_prefix(1);
      continue;
    }
    end_of_line();
    return row;
  }
}

std::string CsvReader::plain() {
  const std::string_view cell = text_.substr(0, text_.find_first_of(",\r\n"));
  text_.remove_prefix(cell.size());
  return std::string(cell.substr(0, cell.find_last_not_of(" \t") + 1));
}

std::string CsvReader::quoted() {
  std::string cell;
  const std::int64_t first_line = line_;
  for (text_.remove_prefix(1); !text_.empty(); text_.remove_prefix(1)) {
    if (text_.starts_with("\"\"")) {
      text_.remove_prefix(1);
    } else if (text_.front() == '"') {
      text_.remove_prefix(1);
      skip_blanks();
      if (!text_.empty() && std::string_view(",\r\n").find(text_.front()) == std::string_view::npos)
        refuse_(line_, CsvFault::text_after_quote);
      return cell;
    }
    line_ += text_.front() == '\n';
    cell += text_.front();
  }
  refuse_(first_line, CsvFault::open_quote);
  return cell;
}

void CsvReader::skip_blanks() { text_.remove_prefix(std::min(text_.find_first_not_of(" \t"), text_.size())); }

void CsvReader::end_of_line() {
  if (text_.starts_with('\r')) text_.remove_prefix(1);
  if (text_.starts_with('\n')) text_.remove_prefix(1);
  ++line_;
}

}  // namespace nsa
