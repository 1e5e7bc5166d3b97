#pragma once
// SHA-256 (FIPS 180-4), for the fingerprints of inputs and points.

#include <iosfwd>
#include <string>
#include <string_view>

namespace nsa {

/// 64 lower-case hexadecimal digits.
std::string sha256(std::string_view text);
std::string sha256(std::istream& in);  ///< of the stream up to its end

}  // namespace nsa
