#pragma once
// The part of HDF5 that the result file needs: handles that close themselves, attributes, datasets with named and
// labelled dimensions. Only the sources of this folder include hdf5.h. Every function here may throw h5::Error.

#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace nsa::h5 {

/// An error of HDF5, without the file's name. The caller that knows the name turns it into a UserError: user_error.
class Error : public std::runtime_error {
 public:
  enum Kind { other, locked, truncated };
  explicit Error(const std::string& what, Kind kind = other) : std::runtime_error(what), kind_(kind) {}
  Kind kind() const { return kind_; }

 private:
  Kind kind_;
};

/// Throws UserError(ExitCode::file): "cannot <doing> <path> (<message of HDF5>); <advice>". A file whose lock was
/// refused and one that is cut off get their own advice.
[[noreturn]] void user_error(const Error& error, const std::string& doing, const std::string& path,
                             const std::string& advice);

/// The action's result; its Error becomes a user_error.
template <class Action>
auto attempt(const char* doing, const std::string& path, const std::string& advice, Action&& action) {
  try {
    return action();
  } catch (const Error& error) {
    user_error(error, doing, path, advice);
  }
}

/// An action in a child process calls `progress()` after each part of its work.
using SandboxedAction = std::function<std::string(const std::function<void()>& progress)>;

/// Runs `action` in a forked child process, from construction on: several run side by side. A damaged file may crash
/// HDF5, keep it in a loop or make it write out of bounds; the caller's memory is safe. Between two calls of `progress`
/// the child has `cpu_seconds` of processor time; waiting for a disk does not count.
class Sandbox {
 public:
  explicit Sandbox(SandboxedAction action, int cpu_seconds = 10);
  ~Sandbox();  ///< ends a child whose result nobody has taken
  Sandbox(const Sandbox&) = delete;
  Sandbox& operator=(const Sandbox&) = delete;
  /// Waits for the result; once. Throws Error: what `action` threw, or how the child ended; std::bad_alloc where the
  /// child ran out of memory. Where no child could be started the action runs here.
  std::string result();

 private:
  SandboxedAction action_;
  int cpu_seconds_, reply_ = -1;  ///< reply_: the end of a pipe; -1: no child
  int child_ = -1;
};

inline std::string run_sandboxed(SandboxedAction action, int cpu_seconds = 10) {
  return Sandbox(std::move(action), cpu_seconds).result();
}

/// An open file, group, dataset, type or dataspace. The destructor closes it.
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

Handle create_file(const std::string& path);  ///< throws where the file exists
Handle open_file(const std::string& path, bool writable = false);
void flush_and_close(Handle file);  ///< throws where not every byte could be written

Handle create_group(const Handle& at, const std::string& name);
Handle open_group(const Handle& at, const std::string& path);
void remove(const Handle& at, const std::string& name);
bool has(const Handle& at, const std::string& path);  ///< whether every link of the path exists
std::vector<std::string> names(const Handle& group);  ///< names of its members, in alphabetical order
bool is_dataset(const Handle& at, const std::string& name);

/// Attributes. Strings are of variable length, UTF-8.
using Value = std::variant<std::int64_t, double, std::string>;
void write_attribute(const Handle& at, const std::string& name, const Value& value);  ///< replaces an existing one
void write_attribute(const Handle& at, const std::string& name, const std::vector<std::string>& values);
std::vector<std::string> attribute_names(const Handle& at);  ///< in creation order, where the file records it
Value attribute(const Handle& at, const std::string& name);
std::vector<std::string> string_attributes(const Handle& at, const std::string& name);
/// T: std::int64_t, double, std::string.
template <class T>
T attribute_as(const Handle& at, const std::string& name) {
  const Value value = attribute(at, name);
  if (const T* found = std::get_if<T>(&value)) return *found;
  throw Error("attribute '" + name + "' has another type");
}

/// The attributes `units` and `long_name` of a dataset.
struct Text {
  std::string units, long_name;
};

/// Writes a dimension scale `name` of `group`, with a label for each index. T: std::string, std::int64_t, double.
template <class T>
void write_scale(const Handle& group, const std::string& name, const std::vector<T>& labels, const Text& text);
/// Writes a row-major dataset over existing dimension scales of the group: they give its shape, which must match the
/// number of values. T: those of write_scale, float, std::int32_t.
template <class T>
void write(const Handle& group, const std::string& name, const std::vector<T>& values,
           const std::vector<std::string>& dimensions, const Text& text);

std::vector<std::int64_t> shape(const Handle& at, const std::string& path);
bool is_floating_point(const Handle& at, const std::string& path);  ///< of any width
bool is_integer(const Handle& at, const std::string& path);         ///< of any width
/// A whole dataset, converted to T. Throws where the dataset claims to be larger than the file can be.
template <class T>
std::vector<T> read(const Handle& at, const std::string& path);
/// A whole dataset with its shape.
template <class T>
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<T> values;
};
/// The same as read; nothing where the group has no member of that name.
template <class T>
std::optional<Array<T>> read_if_there(const Handle& group, const std::string& name);
/// Elements [begin, begin + count) in each dimension, row-major. An integer that T cannot hold becomes its nearest.
/// T: float, std::int32_t.
template <class T>
std::vector<T> read_slab(const Handle& at, const std::string& path, const std::vector<std::int64_t>& begin,
                         const std::vector<std::int64_t>& count);

}  // namespace nsa::h5
