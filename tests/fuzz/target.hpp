#pragma once
// What the fuzz targets share. A target takes any bytes and may refuse them with a UserError; a crash, a leak, another
// exception or memory out of proportion is a defect of the reader.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/diagnostics/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace nsa::fuzz {

/// Runs the reader; that it refuses its input is an answer.
template <class Read>
int attempt(Read&& read) {
  try {
    read();
  } catch (const UserError&) {
  }
  return 0;
}

/// The bytes as a file, for readers that open a path; one name a process, in memory where the system has /dev/shm.
class File {
 public:
  File(const std::uint8_t* data, std::size_t size, const char* suffix)
      : path_((access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + std::string("/nsa-fuzz.") +
              std::to_string(getpid()) + suffix) {
    std::FILE* file = std::fopen(path_.c_str(), "wb");
    if (!file || std::fwrite(data, 1, size, file) != size || std::fclose(file) != 0) std::abort();
  }
  ~File() { unlink(path_.c_str()); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace nsa::fuzz
