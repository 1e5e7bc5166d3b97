#pragma once
// What the tests of result files have in common: a folder of their own, a sample file, the text of an error.

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/results/result_file.hpp"
#include "sample_record.hpp"

namespace nsa {

namespace fs = std::filesystem;

/// A folder of its own for each test.
struct Folder {
  Folder() {
    std::string name = fs::temp_directory_path() / "nsa-test-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  std::string file(const std::string& name) const { return path / name; }
  std::vector<std::string> list() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path)) names.push_back(entry.path().filename());
    return names;
  }
  fs::path path;
};

template <class Work>
std::string file_error(Work&& work) {
  try {
    work();
  } catch (const UserError& error) {
    CHECK(error.code() == ExitCode::file);
    return error.what();
  }
  FAIL("no UserError");
  return {};
}

inline bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  UNSCOPED_INFO("'" << text << "' lacks '" << part << "'");
  return false;
}

inline void write_sample(const std::string& path, std::int64_t points = 2) {
  ResultWriter writer(path, sample_run(), 0);
  for (std::int64_t i = 0; i < points; ++i) writer.seal(sample_point(i));
  writer.finish(sample_run());
}

}  // namespace nsa
