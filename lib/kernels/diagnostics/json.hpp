#pragma once
// JSON documents. The library's header takes seconds to compile: only sources include this one.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace nsa {

using Json = nlohmann::ordered_json;  ///< keys stay in the order in which they are written

/// The document, `indent` spaces a level, or on one line where it is -1. A number that is not finite becomes null, a
/// byte that is no UTF-8 U+FFFD. Doubles are written so that they parse back to the same double.
inline std::string json_text(const Json& document, int indent = -1) {
  return document.dump(indent, ' ', false, Json::error_handler_t::replace);
}

/// The array of what `write` makes of each item.
template <class Item>
Json json_list(const std::vector<Item>& items, Json (*write)(const Item&)) {
  Json list = Json::array();
  for (const Item& item : items) list.push_back(write(item));
  return list;
}

}  // namespace nsa
