#pragma once
// Text as a string of JSON and of TOML, which agree on what has to be escaped.

#include <fmt/format.h>

#include <string>

namespace nsa {

/// With its quotes.
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
