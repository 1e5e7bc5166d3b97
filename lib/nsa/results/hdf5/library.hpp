#pragma once
// Shared by the sources of this folder, the only ones that include hdf5.h: return codes, types, strings.

#include <hdf5.h>

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "nsa/results/hdf5/h5.hpp"

namespace nsa::h5 {

struct Reason {
  std::string text;
  Error::Kind kind = Error::other;
};

/// The innermost reason on HDF5's error stack, which is cleared. "unable to open file: ..., error message = 'Permission
/// denied'" is shortened to "unable to open file: Permission denied".
Reason last_reason();

/// Checks a return code of HDF5: a negative one is a failure and throws Error.
template <class T>
T check(T result, const std::string& doing) {
  if (result < 0) {
    const Reason reason = last_reason();
    throw Error(doing + ": " + reason.text, reason.kind);
  }
  return result;
}

inline Handle own(hid_t id, const std::string& doing) { return Handle(check(id, doing)); }

/// Strings of variable length, UTF-8.
Handle string_type();

/// The type in memory of T: std::string, float, double, std::int32_t, std::int64_t.
template <class T>
Handle memory_type() {
  if constexpr (std::is_same_v<T, std::string>) {
    return string_type();
  } else {
    const hid_t type = std::is_same_v<T, float>          ? H5T_NATIVE_FLOAT
                       : std::is_same_v<T, double>       ? H5T_NATIVE_DOUBLE
                       : std::is_same_v<T, std::int32_t> ? H5T_NATIVE_INT32
                                                         : H5T_NATIVE_INT64;
    return own(H5Tcopy(type), "type");
  }
}

/// C strings of the given strings, which must outlive them.
std::vector<const char*> pointers(const std::vector<std::string>& strings);

/// Reads `count` strings of variable length through `fetch(type, buffer)`.
std::vector<std::string> fetch_strings(std::size_t count, const Handle& file_type, const std::string& what,
                                       const std::function<herr_t(hid_t, void*)>& fetch);

}  // namespace nsa::h5
