// Reads tensors that another program, or a run with output.tensors, wrote: docs/SCHEMA.md, "Tensors".

#include <fmt/format.h>

#include <cmath>

#include "kernels/diagnostics/error.hpp"
#include "nsa/results/files.hpp"
#include "nsa/results/hdf5/h5.hpp"
#include "nsa/results/result_file.hpp"

namespace nsa {
namespace {

constexpr const char* advice = "give x and weights as docs/SCHEMA.md says (examples/make_input.py makes such a file)";

std::string text_of(const std::vector<std::int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

/// Index in the whole tensor of element `flat` of the slab.
std::vector<std::int64_t> index_of(std::int64_t flat, const std::vector<std::int64_t>& begin,
                                   const std::vector<std::int64_t>& count) {
  std::vector<std::int64_t> index(begin);
  for (std::size_t i = index.size(); i-- > 0; flat /= count[i]) index[i] += flat % count[i];
  return index;
}

/// Opens every tensor below the group and reads its first element. `left`: how many tensors count as progress: more
/// than any model has, and fewer than a group that is linked into itself shows.
void probe_tensors(const h5::Handle& group, const std::function<void()>& progress, int& left, int depth = 0) {
  constexpr int deepest = 4;  // weights/layer0/w_q is 2; a damaged file may link a group into itself
  for (const std::string& name : h5::names(group)) {
    try {
      if (!h5::is_dataset(group, name)) {
        if (depth < deepest) probe_tensors(h5::open_group(group, name), progress, left, depth + 1);
      } else if (h5::is_floating_point(group, name)) {
        const std::size_t rank = h5::shape(group, name).size();
        h5::read_slab<float>(group, name, std::vector<std::int64_t>(rank, 0), std::vector<std::int64_t>(rank, 1));
        if (left-- > 0) progress();
      }
    } catch (const std::exception&) {  // reading this tensor reports the error
    }
  }
}

}  // namespace

struct TensorFile::Impl {
  std::string path;
  h5::Handle file, tensors;
  bool has_tensors = true;  ///< the file has a group of tensors

  [[noreturn]] void fail(const std::string& why) const {
    throw UserError(fmt::format("cannot use {} ({}); {}", path, why, advice), ExitCode::file);
  }
  template <class Action>
  auto attempt(Action&& action) const {
    return h5::attempt("use", path, advice, action);
  }
};

TensorFile::TensorFile(const std::string& path) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  if (const std::string why = why_no_file(path); !why.empty()) impl_->fail(why);
  const auto open = [&] {
    impl_->file = h5::open_file(path);
    const std::string dump = "points/0000/tensors";
    const auto at_root = [&](const char* name) { return h5::has(impl_->file, name); };
    const bool plain = at_root("x") || at_root("weights") || at_root("given") || !at_root(dump.c_str());
    impl_->tensors = h5::open_group(impl_->file, plain ? "/" : dump);
  };
  impl_->attempt([&] {
    h5::run_sandboxed([&](const auto& progress) {  // tensors are too large for a pipe: what the sandbox reads without
                                                   // damage is read here
      open();
      int most_tensors = 100'000;
      probe_tensors(impl_->tensors, progress, most_tensors);
      return std::string();
    });
    open();
  });
}

TensorFile::TensorFile(const std::string& path, OfPoints) : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->has_tensors = false;
  impl_->attempt([&] { impl_->file = h5::open_file(path); });
}

void TensorFile::select_point(std::int64_t index) {
  impl_->attempt([&] {
    const std::string group = fmt::format("points/{:04}/tensors", index);
    impl_->has_tensors = h5::has(impl_->file, group);
    if (impl_->has_tensors) impl_->tensors = h5::open_group(impl_->file, group);
  });
}
TensorFile::~TensorFile() = default;

bool TensorFile::has(const std::string& name) const { return impl_->has_tensors && h5::has(impl_->tensors, name); }

std::vector<std::int64_t> TensorFile::shape(const std::string& name) const {
  if (!has(name)) impl_->fail("no tensor '" + name + "'");
  return impl_->attempt([&] {
    if (!h5::is_floating_point(impl_->tensors, name)) impl_->fail("tensor '" + name + "' is not floating point");
    return h5::shape(impl_->tensors, name);
  });
}

std::vector<float> TensorFile::read(const std::string& name, const std::vector<std::int64_t>& expected_shape,
                                    const std::vector<std::int64_t>& begin,
                                    const std::vector<std::int64_t>& count) const {
  const std::vector<std::int64_t> found = shape(name);
  if (found != expected_shape)
    impl_->fail(
        fmt::format("tensor '{}' has shape {}, this input needs {}", name, text_of(found), text_of(expected_shape)));
  std::vector<float> values = impl_->attempt([&] { return h5::read_slab<float>(impl_->tensors, name, begin, count); });
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]))
      impl_->fail(fmt::format("tensor '{}' is {} at {}, as a 32-bit float", name, values[i],
                              text_of(index_of(static_cast<std::int64_t>(i), begin, count))));
  }
  return values;
}

}  // namespace nsa
