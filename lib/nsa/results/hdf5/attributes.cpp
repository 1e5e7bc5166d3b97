// Attributes of files, groups and datasets.

#include "nsa/results/hdf5/library.hpp"

namespace nsa::h5 {

void write_attribute(const Handle& at, const std::string& name, const std::vector<std::string>& values) {
  const std::string what = "attribute '" + name + "'";
  if (check(H5Aexists(at.id(), name.c_str()), what) > 0) check(H5Adelete(at.id(), name.c_str()), what);
  const hsize_t size = values.size();
  const Handle type = string_type(), space = own(H5Screate_simple(1, &size, nullptr), what);
  const Handle written = own(H5Acreate2(at.id(), name.c_str(), type.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT), what);
  check(H5Awrite(written.id(), type.id(), pointers(values).data()), what);
}

void write_attribute(const Handle& at, const std::string& name, const Value& value) {
  const std::string what = "attribute '" + name + "'";
  if (check(H5Aexists(at.id(), name.c_str()), what) > 0) check(H5Adelete(at.id(), name.c_str()), what);
  const Handle space = own(H5Screate(H5S_SCALAR), what);
  std::visit(
      [&](const auto& v) {
        using T = std::decay_t<decltype(v)>;
        const Handle type = memory_type<T>();
        const Handle written =
            own(H5Acreate2(at.id(), name.c_str(), type.id(), space.id(), H5P_DEFAULT, H5P_DEFAULT), what);
        const void* data = &v;
        const char* text = nullptr;
        if constexpr (std::is_same_v<T, std::string>) {
          text = v.c_str();
          data = &text;
        }
        check(H5Awrite(written.id(), type.id(), data), what);
      },
      value);
}

std::vector<std::string> attribute_names(const Handle& at) {
  std::vector<std::string> result;
  const auto keep = [](hid_t, const char* name, const H5A_info_t*, void* out) -> herr_t {
    static_cast<std::vector<std::string>*>(out)->push_back(name);
    return 0;
  };
  // A file that another tool has rewritten may lack the creation order.
  if (H5Aiterate2(at.id(), H5_INDEX_CRT_ORDER, H5_ITER_INC, nullptr, keep, &result) >= 0) return result;
  result.clear();
  check(H5Aiterate2(at.id(), H5_INDEX_NAME, H5_ITER_INC, nullptr, keep, &result), "attributes");
  return result;
}

namespace {

Handle open_attribute(const Handle& at, const std::string& name, const std::string& what) {
  Handle attribute(H5Aopen(at.id(), name.c_str(), H5P_DEFAULT));
  if (attribute.id() >= 0) return attribute;
  const std::string why = last_reason().text;
  throw Error(what + (H5Aexists(at.id(), name.c_str()) == 0 ? " is missing" : ": " + why));
}

std::vector<std::string> strings_of(const Handle& attribute, const std::string& what) {
  const Handle type = own(H5Aget_type(attribute.id()), what), space = own(H5Aget_space(attribute.id()), what);
  const auto count = check(H5Sget_simple_extent_npoints(space.id()), what);
  // Lists in a result file are short; a damaged file may claim any length.
  if (H5Tget_class(type.id()) != H5T_STRING || count > 4096) throw Error(what + " is no list of strings");
  return fetch_strings(static_cast<std::size_t>(count), type, what,
                       [&](hid_t t, void* to) { return H5Aread(attribute.id(), t, to); });
}

}  // namespace

std::vector<std::string> string_attributes(const Handle& at, const std::string& name) {
  const std::string what = "attribute '" + name + "'";
  return strings_of(open_attribute(at, name, what), what);
}

Value attribute(const Handle& at, const std::string& name) {
  const std::string what = "attribute '" + name + "'";
  const Handle attribute = open_attribute(at, name, what);
  const Handle type = own(H5Aget_type(attribute.id()), what), space = own(H5Aget_space(attribute.id()), what);
  if (check(H5Sget_simple_extent_npoints(space.id()), what) != 1) throw Error(what + " is no single value");
  std::int64_t integer = 0;
  double real = 0;
  switch (H5Tget_class(type.id())) {
    case H5T_INTEGER:
      check(H5Aread(attribute.id(), H5T_NATIVE_INT64, &integer), what);
      return integer;
    case H5T_FLOAT:
      check(H5Aread(attribute.id(), H5T_NATIVE_DOUBLE, &real), what);
      return real;
    case H5T_STRING:
      return strings_of(attribute, what)[0];
    default:
      throw Error(what + " is no number and no string");
  }
}

}  // namespace nsa::h5
