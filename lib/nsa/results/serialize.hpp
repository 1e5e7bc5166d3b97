#pragma once
// Serialises a result for the pipe between the sandboxed process, which reads a file with HDF5, and its parent.

#include <string>
#include <string_view>

#include "nsa/results/result_file.hpp"

namespace nsa {

/// In this machine's byte order; the format is not stored anywhere and may change.
std::string serialize(const ResultFile& result);

/// Throws h5::Error where the bytes are not those of a serialised result.
ResultFile deserialize(std::string_view bytes);

}  // namespace nsa
