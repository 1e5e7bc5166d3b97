#pragma once
// Paged copies of the caches of a WholeDecode.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "gpu/whole_decode.hpp"

namespace nsa::test {

/// Scratch that every implementation of every branch takes.
inline std::size_t scratch_of_routes(const WholeDecode& whole) {
  std::size_t bytes = whole.scratch_bytes;
  for (const Branch c : {cmp, sel, win})
    for (const AttendKernel& kernel : whole.backend.kernels->attend[c])
      if (kernel.scratch && kernel.accepts(whole.s, whole.tile))
        bytes = std::max(bytes, kernel.scratch(whole.s, whole.tile, {}));
  return bytes;
}

/// Copies of a batch's contiguous caches in pages, which lie anywhere among others that hold NaN. The first `shared`
/// pages of every sequence are those of sequence 0, with its rows, which are copied back to the contiguous caches.
class PagedCaches {
 public:
  PagedCaches(const WholeDecode& whole, std::int32_t tokens, std::int64_t shared)
      : whole_(whole), memory_{whole.backend, {}, {}} {
    memory_.buffers.reserve(64);
    const LayerShape& s = whole.s;
    set = whole.sets[0];
    const std::int64_t context = whole.tile.max_positions, n = compressed_tokens(s.rules, context - 1);
    page(sel, tokens, context, shared);
    page(cmp, static_cast<std::int32_t>(s.lse.segment), n, shared * tokens / s.rules.d / s.lse.segment);
    device()->synchronize(nullptr);
  }
  WholeDecode::Set set;

 private:
  void page(Branch c, std::int32_t rows, std::int64_t count, std::int64_t shared) {
    const std::int64_t batch = whole_.tile.rows(), entries = std::max<std::int64_t>(1, (count + rows - 1) / rows),
                       pages = 2 * batch * entries + 1;
    std::vector<std::int32_t> numbers(static_cast<std::size_t>(pages)), table;
    std::iota(numbers.begin(), numbers.end(), 0);
    std::shuffle(numbers.begin(), numbers.end(), std::mt19937(static_cast<unsigned>(rows)));
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t e = 0; e < entries; ++e)
        table.push_back(numbers[static_cast<std::size_t>((e < shared ? 0 : b) * entries + e)]);
    auto* on_device = memory_.make<std::int32_t>(std::ssize(table) * 4);
    device()->copy(on_device, table.data(), table.size() * 4, nullptr);
    const PageTable where{on_device, nullptr, static_cast<std::int32_t>(entries), rows, whole_.s.groups};
    for (const bool value : {false, true}) {
      const KvView& from = value ? whole_.sets[0].v[c] : whole_.sets[0].k[c];
      KvView& to = value ? set.v[c] : set.k[c];
      const std::int64_t size = element_bytes(from, whole_.s.dtype), width = from.width,
                         scales = is_quantised(from) ? pages * whole_.s.groups * rows : 0,
                         bytes = pages * whole_.s.groups * rows * width * size + scales;
      to.data = memory_.make(bytes + padding_rows * width * size);
      if (is_quantised(from)) to.scales = static_cast<std::uint8_t*>(to.data) + bytes - scales;
      to.pages = where;
      to.plane_stride = entries * rows * width;
      device()->fill(to.data, 0xFF, static_cast<std::size_t>(bytes), nullptr);
      copy(from, to, count);
      if (value && count % rows > 0) clear_ends(to, table, entries, count % rows);
      if (shared > 0) copy(to, from, count);
      device()->synchronize(nullptr);
    }
  }
  // V is finite in the rest of a page that holds a token: see AttendArgs::v.
  void clear_ends(const KvView& v, const std::vector<std::int32_t>& table, std::int64_t entries, std::int64_t used) {
    const std::int64_t row = v.width * element_bytes(v, whole_.s.dtype);
    for (std::int64_t b = 0; b < whole_.tile.rows(); ++b)
      for (std::int32_t g = 0; g < whole_.s.groups; ++g) {
        const std::int64_t page = table[static_cast<std::size_t>((b + 1) * entries - 1)];
        device()->fill(static_cast<std::byte*>(v.data) + ((page * whole_.s.groups + g) * v.pages.rows + used) * row, 0,
                       static_cast<std::size_t>((v.pages.rows - used) * row), nullptr);
      }
  }
  void copy(const KvView& from, const KvView& to, std::int64_t count) const {
    whole_.backend.kernels->copy_rows(
        {whole_.s.dtype, from, to, whole_.tile.rows() * whole_.s.groups, 0, count, 0, count}, nullptr);
  }
  const DeviceOps* device() const { return whole_.backend.device; }
  const WholeDecode& whole_;
  WorkMemory memory_;
};

}  // namespace nsa::test
