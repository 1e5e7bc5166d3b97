// Files, groups and datasets.

#include <hdf5_hl.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/hdf5/library.hpp"

namespace nsa::h5 {

Reason last_reason() {
  Reason found;
  const auto keep = [](unsigned n, const H5E_error2_t* entry, void* out) -> herr_t {
    Reason& to = *static_cast<Reason*>(out);
    if (n == 0 && entry->desc != nullptr) to.text = entry->desc;
    if (entry->min_num == H5E_CANTLOCKFILE) to.kind = Error::locked;
    if (entry->min_num == H5E_TRUNCATED) to.kind = Error::truncated;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep, &found);
  H5Eclear2(H5E_DEFAULT);
  std::string& reason = found.text;
  const std::string mark = "error message = '";
  if (const auto at = reason.find(mark); at != std::string::npos) {
    const std::string what = reason.substr(0, reason.find(':'));
    const std::string system = reason.substr(at + mark.size());
    reason = what.substr(0, what.find(", errno")) + ": " + system.substr(0, system.find('\''));
  }
  return found;
}

Handle string_type() {
  Handle type = own(H5Tcopy(H5T_C_S1), "string type");
  check(H5Tset_size(type.id(), H5T_VARIABLE), "string type");
  check(H5Tset_cset(type.id(), H5T_CSET_UTF8), "string type");
  return type;
}

std::vector<const char*> pointers(const std::vector<std::string>& strings) {
  std::vector<const char*> result(strings.size());
  std::transform(strings.begin(), strings.end(), result.begin(), [](const std::string& s) { return s.c_str(); });
  return result;
}

std::vector<std::string> fetch_strings(std::size_t count, const Handle& file_type, const std::string& what,
                                       const std::function<herr_t(hid_t, void*)>& fetch) {
  if (check(H5Tis_variable_str(file_type.id()), what) == 0) throw Error(what + " is no string of variable length");
  // The type in memory has the character set of the file: HDF5 does not convert between them.
  const Handle type = own(H5Tcopy(H5T_C_S1), what);
  check(H5Tset_size(type.id(), H5T_VARIABLE), what);
  check(H5Tset_cset(type.id(), H5Tget_cset(file_type.id())), what);
  std::vector<char*> buffer(count, nullptr);
  check(fetch(type.id(), buffer.data()), what);
  std::vector<std::string> result(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::unique_ptr<char, herr_t (*)(void*)> text(buffer[i], [](void* p) { return H5free_memory(p); });
    if (text) result[i] = text.get();
  }
  return result;
}

namespace {

/// The error of a handle that could not be written when it was closed: HDF5 writes small datasets only then, and a
/// destructor cannot throw. flush_and_close throws it.
std::string unwritten_error;

/// HDF5 prints its error stack by default; here the exception holds the reason. The library's exit handler is disabled:
/// it would only close objects that could not be written, and crashes on those.
void initialise() {
  static const bool done = [] {
    H5dont_atexit();
    return true;
  }();
  static_cast<void>(done);
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  unwritten_error.clear();
}

/// Properties of a group, or of a file's root group, that record the creation order of links and attributes.
Handle ordered(hid_t property_class) {
  constexpr unsigned order = H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED;
  Handle properties = own(H5Pcreate(property_class), "properties");
  check(H5Pset_link_creation_order(properties.id(), order), "link order");
  check(H5Pset_attr_creation_order(properties.id(), order), "attribute order");
  return properties;
}

/// Closing a file closes all its objects, so that a remaining handle cannot hold back bytes.
Handle file_access() {
  Handle properties = own(H5Pcreate(H5P_FILE_ACCESS), "file access");
  check(H5Pset_fclose_degree(properties.id(), H5F_CLOSE_STRONG), "file access");
  return properties;
}

Handle open_dataset(const Handle& at, const std::string& path) {
  if (!has(at, path)) throw Error("dataset '" + path + "' is missing");
  return own(H5Dopen2(at.id(), path.c_str(), H5P_DEFAULT), "dataset '" + path + "'");
}

std::vector<hsize_t> extent(const Handle& dataset, const std::string& path) {
  const Handle space = own(H5Dget_space(dataset.id()), "'" + path + "'");
  std::vector<hsize_t> dims(check(H5Sget_simple_extent_ndims(space.id()), "rank of '" + path + "'"));
  check(H5Sget_simple_extent_dims(space.id(), dims.data(), nullptr), "shape of '" + path + "'");
  return dims;
}

Handle create_dataset(const Handle& group, const std::string& name, hid_t type, const std::vector<hsize_t>& dims) {
  const std::string what = "dataset '" + name + "'";
  const Handle space = own(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), what);
  const Handle properties = own(H5Pcreate(H5P_DATASET_CREATE), what);
  check(H5Pset_attr_creation_order(properties.id(), H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED), what);
  return own(H5Dcreate2(group.id(), name.c_str(), type, space.id(), H5P_DEFAULT, properties.id(), H5P_DEFAULT), what);
}

template <class T>
Handle store(const Handle& group, const std::string& name, const std::vector<T>& values,
             const std::vector<hsize_t>& dims, const Text& text) {
  const Handle type = memory_type<T>();
  Handle dataset = create_dataset(group, name, type.id(), dims);
  const void* data = values.data();
  std::vector<const char*> strings;
  if constexpr (std::is_same_v<T, std::string>) {
    strings = pointers(values);
    data = strings.data();
  }
  if (!values.empty())
    check(H5Dwrite(dataset.id(), type.id(), H5S_ALL, H5S_ALL, H5P_DEFAULT, data), "writing '" + name + "'");
  write_attribute(dataset, "units", text.units);
  write_attribute(dataset, "long_name", text.long_name);
  return dataset;
}

/// Throws where a dataset claims to be larger than its file can hold; deflate compresses by 1032 : 1 at most.
void check_plausible(const Handle& dataset, const std::string& path, const std::vector<hsize_t>& dims) {
  constexpr hsize_t small = 4096;  // values; most datasets have fewer, and the checks below take a third of reading one
  if (std::all_of(dims.begin(), dims.end(), [](hsize_t n) { return n <= small; }) &&
      std::accumulate(dims.begin(), dims.end(), 1.0, std::multiplies<>()) <= small)
    return;
  const Handle file = own(H5Iget_file_id(dataset.id()), path);
  hsize_t limit = 0;
  check(H5Fget_filesize(file.id(), &limit), path);
  const Handle layout = own(H5Dget_create_plist(dataset.id()), path);
  if (H5Pget_layout(layout.id()) == H5D_CHUNKED) limit *= 1032;
  const Handle type = own(H5Dget_type(dataset.id()), path);
  hsize_t bytes = H5Tget_size(type.id());
  for (const hsize_t n : dims) {
    if (n > 0 && bytes > limit / n) throw Error("dataset '" + path + "' says it is larger than its file");
    bytes *= n;
  }
}

}  // namespace

void user_error(const Error& error, const std::string& doing, const std::string& path, const std::string& advice) {
  const char* own = nullptr;
  if (error.kind() == Error::locked)
    own = "close the program that has it open, or set HDF5_USE_FILE_LOCKING=FALSE where the file system has no locks";
  if (error.kind() == Error::truncated) own = "the file is cut off: copy it again from where it is whole";
  throw UserError("cannot " + doing + " " + path + " (" + error.what() + "); " + (own ? own : advice), ExitCode::file);
}

Handle::~Handle() {
  if (id_ >= 0 && H5Idec_ref(id_) < 0 && unwritten_error.empty()) unwritten_error = last_reason().text;
}

Handle create_file(const std::string& path) {
  initialise();
  const Handle creation = ordered(H5P_FILE_CREATE), access = file_access();
  return own(H5Fcreate(path.c_str(), H5F_ACC_EXCL, creation.id(), access.id()), "creating");
}

Handle open_file(const std::string& path, bool writable) {
  initialise();
  const Handle access = file_access();
  return own(H5Fopen(path.c_str(), writable ? H5F_ACC_RDWR : H5F_ACC_RDONLY, access.id()), "opening");
}

void flush_and_close(Handle file) {
  const std::string unwritten = std::exchange(unwritten_error, {});
  if (!unwritten.empty()) throw Error("writing: " + unwritten);
  check(H5Fflush(file.id(), H5F_SCOPE_GLOBAL), "flushing");
  check(H5Fclose(file.release()), "closing");
}

Handle create_group(const Handle& at, const std::string& name) {
  const Handle properties = ordered(H5P_GROUP_CREATE);
  return own(H5Gcreate2(at.id(), name.c_str(), H5P_DEFAULT, properties.id(), H5P_DEFAULT), "group '" + name + "'");
}

Handle open_group(const Handle& at, const std::string& path) {
  if (path != "/" && path != "." && !has(at, path)) throw Error("group '" + path + "' is missing");
  return own(H5Gopen2(at.id(), path.c_str(), H5P_DEFAULT), "group '" + path + "'");
}

void remove(const Handle& at, const std::string& name) {
  check(H5Ldelete(at.id(), name.c_str(), H5P_DEFAULT), "removing '" + name + "'");
}

bool has(const Handle& at, const std::string& path) {
  for (std::size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    if (H5Lexists(at.id(), part.c_str(), H5P_DEFAULT) <= 0) return false;
    if (H5Oexists_by_name(at.id(), part.c_str(), H5P_DEFAULT) <= 0) return false;
    if (slash == std::string::npos) return true;
  }
}

std::vector<std::string> names(const Handle& group) {
  std::vector<std::string> result;
  const auto keep = [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->push_back(name);
    return 0;
  };
  check(H5Literate(group.id(), H5_INDEX_NAME, H5_ITER_INC, nullptr, keep, &result), "links");
  return result;
}

bool is_dataset(const Handle& at, const std::string& name) {
  const Handle object = own(H5Oopen(at.id(), name.c_str(), H5P_DEFAULT), "'" + name + "'");
  return H5Iget_type(object.id()) == H5I_DATASET;
}

template <class T>
void write_scale(const Handle& group, const std::string& name, const std::vector<T>& labels, const Text& text) {
  const Handle scale = store(group, name, labels, {labels.size()}, text);
  check(H5DSset_scale(scale.id(), name.c_str()), "dimension '" + name + "'");
}

template <class T>
void write(const Handle& group, const std::string& name, const std::vector<T>& values,
           const std::vector<std::string>& dimensions, const Text& text) {
  std::vector<hsize_t> dims;
  std::vector<Handle> scales;
  for (const std::string& dimension : dimensions) {
    dims.push_back(extent(scales.emplace_back(open_dataset(group, dimension)), dimension).at(0));
  }
  if (std::accumulate(dims.begin(), dims.end(), hsize_t{1}, std::multiplies<>()) != values.size())
    throw InternalError("dataset '" + name + "' has " + std::to_string(values.size()) +
                        " values, which is not what its dimensions hold");
  const Handle dataset = store(group, name, values, dims, text);
  for (std::size_t i = 0; i < scales.size(); ++i) {
    check(H5DSattach_scale(dataset.id(), scales[i].id(), static_cast<unsigned>(i)), "dimensions of '" + name + "'");
  }
}

std::vector<std::int64_t> shape(const Handle& at, const std::string& path) {
  const std::vector<hsize_t> dims = extent(open_dataset(at, path), path);
  return {dims.begin(), dims.end()};
}

namespace {
bool is_of_class(const Handle& at, const std::string& path, H5T_class_t wanted) {
  const Handle type = own(H5Dget_type(open_dataset(at, path).id()), path);
  return H5Tget_class(type.id()) == wanted;
}
}  // namespace

bool is_floating_point(const Handle& at, const std::string& path) { return is_of_class(at, path, H5T_FLOAT); }

bool is_integer(const Handle& at, const std::string& path) { return is_of_class(at, path, H5T_INTEGER); }

namespace {

template <class T>
std::vector<T> read_dataset(const Handle& dataset, const std::vector<hsize_t>& dims, const std::string& path) {
  check_plausible(dataset, path, dims);
  const std::size_t count = std::accumulate(dims.begin(), dims.end(), std::size_t{1}, std::multiplies<>());
  const auto fetch = [&](hid_t type, void* to) {
    return H5Dread(dataset.id(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, to);
  };
  if constexpr (std::is_same_v<T, std::string>) {
    const Handle type = own(H5Dget_type(dataset.id()), path);
    return fetch_strings(count, type, "dataset '" + path + "'", fetch);
  } else {
    std::vector<T> values(count);
    check(fetch(memory_type<T>().id(), values.data()), "reading '" + path + "'");
    return values;
  }
}

}  // namespace

template <class T>
std::vector<T> read(const Handle& at, const std::string& path) {
  const Handle dataset = open_dataset(at, path);
  return read_dataset<T>(dataset, extent(dataset, path), path);
}

template <class T>
std::optional<Array<T>> read_if_there(const Handle& group, const std::string& name) {
  if (check(H5Lexists(group.id(), name.c_str(), H5P_DEFAULT), "'" + name + "'") == 0) return std::nullopt;
  const Handle dataset = own(H5Dopen2(group.id(), name.c_str(), H5P_DEFAULT), "dataset '" + name + "'");
  const std::vector<hsize_t> dims = extent(dataset, name);
  return Array<T>{{dims.begin(), dims.end()}, read_dataset<T>(dataset, dims, name)};
}

template <class T>
std::vector<T> read_slab(const Handle& at, const std::string& path, const std::vector<std::int64_t>& begin,
                         const std::vector<std::int64_t>& count) {
  const Handle dataset = open_dataset(at, path);
  const std::vector<hsize_t> start(begin.begin(), begin.end()), size(count.begin(), count.end());
  const Handle space = own(H5Dget_space(dataset.id()), path);
  if (start.size() != size.size() || start.size() != extent(dataset, path).size())
    throw InternalError("slab of '" + path + "' has another number of dimensions");
  check(H5Sselect_hyperslab(space.id(), H5S_SELECT_SET, start.data(), nullptr, size.data(), nullptr), path);
  if (check(H5Sselect_valid(space.id()), path) == 0) throw InternalError("slab of '" + path + "' leaves its shape");
  const Handle memory = own(H5Screate_simple(static_cast<int>(size.size()), size.data(), nullptr), path);
  std::vector<T> values(std::accumulate(size.begin(), size.end(), std::size_t{1}, std::multiplies<>()));
  check(H5Dread(dataset.id(), memory_type<T>().id(), memory.id(), space.id(), H5P_DEFAULT, values.data()),
        "reading '" + path + "'");
  return values;
}

#define NSA_H5_SCALE(T) \
  template void write_scale(const Handle&, const std::string&, const std::vector<T>&, const Text&);
#define NSA_H5_WRITE(T)                                                                                          \
  template void write(const Handle&, const std::string&, const std::vector<T>&, const std::vector<std::string>&, \
                      const Text&);
#define NSA_H5_READ(T)                                             \
  template std::vector<T> read(const Handle&, const std::string&); \
  template std::optional<Array<T>> read_if_there(const Handle&, const std::string&);
#define NSA_H5_ALL(T) NSA_H5_SCALE(T) NSA_H5_WRITE(T) NSA_H5_READ(T)
NSA_H5_ALL(std::string)
NSA_H5_ALL(std::int64_t)
NSA_H5_ALL(double)
NSA_H5_WRITE(float)
NSA_H5_WRITE(std::int32_t)
#define NSA_H5_SLAB(T)                                                                                   \
  template std::vector<T> read_slab(const Handle&, const std::string&, const std::vector<std::int64_t>&, \
                                    const std::vector<std::int64_t>&);
NSA_H5_SLAB(float)
NSA_H5_SLAB(std::int32_t)

}  // namespace nsa::h5
