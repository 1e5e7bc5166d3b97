#pragma once
// HDF5, as much of it as the result file needs: handles that close themselves, attributes, columns with named
// and labelled dimensions. hdf5.h is seen in results/hdf5/h5.cpp alone. Everything here throws h5::Error.

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace nsa::h5 {

/// What HDF5 objects to. Whoever knows the file's name turns it into a UserError: see user_error.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// "cannot <doing> <path> (<what HDF5 said>); <advice>", as UserError(ExitCode::file). A lock that was refused
/// gets its own advice.
[[noreturn]] void user_error(const Error& error, const std::string& doing, const std::string& path,
                             const std::string& advice);

/// What `answer` returns, called in a forked process: a damaged file may crash HDF5, keep it in a loop or make it write
/// where it should not, and the caller's memory stays as it is. Throws Error: what `answer` threw, or how the child
/// ended. The child has `cpu_seconds` of processor time; waiting for a disk does not count.
std::string ask_child(const std::function<std::string()>& answer, int cpu_seconds = 10);

/// An open file, group, dataset, type or space; closed when it goes.
class Handle {
 public:
  Handle() = default;
  explicit Handle(std::int64_t id) : id_(id) {}
  ~Handle();
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  std::int64_t id() const { return id_; }
  std::int64_t release() { return std::exchange(id_, -1); }

 private:
  std::int64_t id_ = -1;
};

Handle create_file(const std::string& path);  ///< must not exist
Handle open_file(const std::string& path, bool writable = false);
void flush_and_close(Handle file);  ///< and says so when not every byte could be written

Handle create_group(const Handle& at, const std::string& name);
Handle open_group(const Handle& at, const std::string& path);
void remove(const Handle& at, const std::string& name);
bool has(const Handle& at, const std::string& path);  ///< every link on the way exists
std::vector<std::string> names(const Handle& group);  ///< what it holds, by name
bool is_dataset(const Handle& at, const std::string& name);

/// Attributes. Strings are of variable length, UTF-8.
using Value = std::variant<std::int64_t, double, std::string>;
void write_attribute(const Handle& at, const std::string& name, const Value& value);  ///< replaces
void write_attribute(const Handle& at, const std::string& name, const std::vector<std::string>& values);
std::vector<std::string> attribute_names(const Handle& at);  ///< in the order they were written, where known
Value attribute(const Handle& at, const std::string& name);
std::vector<std::string> string_attributes(const Handle& at, const std::string& name);
/// T: std::int64_t, double, std::string.
template <class T>
T attribute_as(const Handle& at, const std::string& name) {
  const Value value = attribute(at, name);
  if (const T* found = std::get_if<T>(&value)) return *found;
  throw Error("attribute '" + name + "' has another type");
}

/// What `units` and `long_name` of a dataset say.
struct Text {
  std::string units, long_name;
};

/// A dimension of `group`, called `name`, with a label for each index. T: std::string, std::int64_t, double.
template <class T>
void write_scale(const Handle& group, const std::string& name, const std::vector<T>& labels, const Text& text);
/// A row-major dataset over dimensions that the group has: they give its shape, which must fit the values.
/// T: those of write_scale, float, std::int32_t.
template <class T>
void write(const Handle& group, const std::string& name, const std::vector<T>& values,
           const std::vector<std::string>& dimensions, const Text& text);

std::vector<std::int64_t> shape(const Handle& at, const std::string& path);
bool is_floating_point(const Handle& at, const std::string& path);  ///< of whatever width
/// A whole dataset, converted to T. Refuses to allocate more than the file can hold.
template <class T>
std::vector<T> read(const Handle& at, const std::string& path);
/// Elements [begin, begin + count) in each dimension, row-major.
std::vector<float> read_slab(const Handle& at, const std::string& path, const std::vector<std::int64_t>& begin,
                             const std::vector<std::int64_t>& count);

}  // namespace nsa::h5
