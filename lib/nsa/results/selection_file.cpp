#include "nsa/results/selection_file.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/hdf5/h5.hpp"

namespace nsa {
namespace {

constexpr const char* advice =
    "give a file of `nsa run --record-selection`, or one as docs/SCHEMA.md says, \"Selections\"";

struct Dataset {
  std::string path;
  SelectionShape shape;
};

/// Adds the dataset `selected` of a group, if it has one.
void add_dataset(const h5::Handle& file, const std::string& group, std::vector<Dataset>& list) {
  const std::string path = group + "selected";
  if (!h5::has(file, path)) return;
  const std::vector<std::int64_t> shape = h5::shape(file, path);
  if (!h5::is_integer(file, path) || shape.size() != 4)
    throw h5::Error(path + " is not an array of integers over sequence, position, group and choice");
  if (std::ranges::min(shape) < 1) throw h5::Error(path + " is empty");
  std::int64_t first = 0;
  const h5::Handle at = h5::open_group(file, group);
  for (const std::string& name : h5::attribute_names(at))
    if (name == "first_position") first = h5::attribute_as<std::int64_t>(at, name);
  constexpr std::int64_t most = std::int64_t{1} << 31;  // more positions than any run has
  if (first < 0 || first > most || shape[1] > most)
    throw h5::Error(fmt::format("{} begins at position {} and has {}", path, first, shape[1]));
  list.push_back({path, {shape[0], shape[1], shape[2], shape[3], first}});
}

std::vector<Dataset> find_datasets(const h5::Handle& file) {
  std::vector<Dataset> list;
  add_dataset(file, "/", list);
  if (list.empty() && h5::has(file, "points"))
    for (const std::string& name : h5::names(h5::open_group(file, "points")))
      if (h5::has(file, "points/" + name + "/tensors")) add_dataset(file, "/points/" + name + "/tensors/", list);
  return list;
}

}  // namespace

struct SelectionFile::Impl {
  std::string path;
  h5::Handle file;
  std::vector<Dataset> datasets;
  std::vector<SelectionShape> shapes;

  template <class Action>
  auto attempt(Action&& action) const {
    return h5::attempt("use", path, advice, action);
  }
  std::vector<std::int32_t> read(const Dataset& d, const std::vector<std::int64_t>& begin,
                                 const std::vector<std::int64_t>& count) const {
    return attempt([&] { return h5::read_slab<std::int32_t>(file, d.path, begin, count); });
  }
};

SelectionFile::SelectionFile(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  if (const std::string why = why_no_file(path); !why.empty()) fail(why);
  impl_->attempt([&] {
    h5::run_sandboxed([&](const auto&) {  // what the sandbox reads without damage is read here
      const h5::Handle file = h5::open_file(path);
      for (const Dataset& d : find_datasets(file))
        h5::read_slab<std::int32_t>(file, d.path, {0, 0, 0, 0}, {1, 1, 1, 1});
      return std::string();
    });
    impl_->file = h5::open_file(path);
    impl_->datasets = find_datasets(impl_->file);
  });
  for (const Dataset& d : impl_->datasets) impl_->shapes.push_back(d.shape);
  if (impl_->shapes.empty()) fail("it holds no selected blocks");
}

SelectionFile::~SelectionFile() = default;

const std::vector<SelectionShape>& SelectionFile::shapes() const { return impl_->shapes; }

std::vector<std::int32_t> SelectionFile::read(std::size_t index, std::int64_t first, std::int64_t count) const {
  const Dataset& d = impl_->datasets[index];
  return impl_->read(d, {0, first, 0, 0}, {d.shape.batch, count, d.shape.groups, d.shape.n});
}

std::vector<std::int32_t> SelectionFile::read_rows(std::size_t index, std::int64_t first, std::int64_t count) const {
  const Dataset& d = impl_->datasets[index];
  return impl_->read(d, {0, first, 0, 0}, {1, count, 1, d.shape.n});
}

void SelectionFile::fail(const std::string& why) const {
  throw UserError(fmt::format("cannot use {} ({}); {}", impl_->path, why, advice), ExitCode::file);
}

}  // namespace nsa
