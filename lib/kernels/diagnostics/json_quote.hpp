#pragma once
// Quoted strings of JSON and TOML, which escape the same characters.

#include <fmt/format.h>

#include <string>

namespace nsa {

/// `text` escaped and in double quotes.
inline std::string json_quote(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace nsa
