#pragma once
// A result as bytes, for the pipe between the process that reads a file with HDF5 and the one that uses what it read.

#include <string>
#include <string_view>

#include "nsa/results/result_file.hpp"

namespace nsa {

/// In this machine's byte order; no format to keep.
std::string to_bytes(const ResultFile& result);

/// Throws h5::Error where the bytes are not to_bytes' of a result.
ResultFile from_bytes(std::string_view bytes);

}  // namespace nsa
