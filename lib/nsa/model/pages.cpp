#include "nsa/model/pages.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "kernels/diagnostics/error.hpp"

namespace nsa {

namespace {

/// The row of the sequence in memory row m of a local map.
std::int64_t row_at(const RowMap& m, std::int64_t memory_row) {
  if (m.kv == 1) return memory_row;
  const std::int64_t chunk = memory_row / m.stride * m.kv + m.rank;
  return chunk * m.chunk + memory_row % m.stride - m.halo;
}

/// Pages of `rows` memory rows whose rows are all among the first `last` of the sequence.
std::int64_t pages_within(const RowMap& map, std::int32_t rows, std::int64_t last) {
  std::int64_t pages = 0;
  while (row_at(map, (pages + 1) * rows - 1) < last) ++pages;
  return pages;
}

/// Positions that sequence b needs memory for.
std::int64_t positions_of(const Config& config, const Point& point, std::int64_t b) {
  return total_positions(config, point) - point.longest() + point.length(b);
}

/// Order in which sequences take pages: by a Fisher-Yates shuffle, the same with every standard library.
std::vector<std::int32_t> page_numbers(std::int64_t count, PageOrder order, std::uint64_t seed) {
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  std::mt19937_64 random(seed);
  for (std::size_t i = numbers.size(); order == PageOrder::shuffled && i > 1; --i)
    std::swap(numbers[i - 1], numbers[random() % i]);
  return numbers;
}

/// The pages of a cache under `map` whose sequences have rows_of(positions) rows.
template <class Rows>
PageLayout pages_of(const Config& config, const Partition& p, const Point& point, const RowMap& map, std::int64_t rows,
                    Rows&& rows_of) {
  std::vector<std::int64_t> entries;
  for (std::int64_t b = 0; b < point.batch; ++b)
    entries.push_back(
        std::max<std::int64_t>(1, (p.capacity(map, rows_of(positions_of(config, point, b))) + rows - 1) / rows));
  const auto page_rows = static_cast<std::int32_t>(rows);
  const std::int64_t shared = point.batch == 1 ? 0 : pages_within(map, page_rows, rows_of(config.cache.shared_prefix));
  PageLayout pages =
      make_pages(page_rows, entries, shared, config.cache.order, static_cast<std::uint64_t>(config.run.seed));
  if (pages.count * rows * p.shape.groups > std::numeric_limits<std::int32_t>::max())
    throw UserError(
        fmt::format("the pages of a cache hold {} rows (kernels number 2^31); use more ranks or a smaller "
                    "batch, or cache.layout = \"contiguous\"",
                    pages.count * rows * p.shape.groups));
  return pages;
}

}  // namespace

std::int64_t PageLayout::used() const {
  return std::ranges::count_if(table, [](std::int32_t page) { return page >= 0; });
}

PageLayout make_pages(std::int32_t rows, const std::vector<std::int64_t>& entries, std::int64_t shared, PageOrder order,
                      std::uint64_t seed) {
  PageLayout pages{rows, std::ssize(entries)};
  pages.per_sequence = std::ranges::max(entries);
  pages.shared = std::min(shared, std::ranges::min(entries));
  pages.count = pages.shared;
  for (const std::int64_t own : entries) pages.count += own - pages.shared;
  const std::vector<std::int32_t> numbers = page_numbers(pages.count, order, seed);
  pages.table.assign(static_cast<std::size_t>(pages.sequences * pages.per_sequence), -1);
  auto next = numbers.begin() + pages.shared;
  for (std::int64_t b = 0; b < pages.sequences; ++b) {
    const auto own = pages.table.begin() + b * pages.per_sequence;
    std::copy_n(numbers.begin(), pages.shared, own);
    const std::int64_t rest = entries[static_cast<std::size_t>(b)] - pages.shared;
    std::copy_n(next, rest, own + pages.shared);
    next += rest;
  }
  return pages;
}

void check_pages(const PageLayout& pages) {
  std::vector<std::int64_t> owner(static_cast<std::size_t>(pages.count), -1);  // index in the table
  const auto name = [&](std::int64_t at) {
    return fmt::format("entry {} of sequence {}", at % pages.per_sequence, at / pages.per_sequence);
  };
  for (std::int64_t at = 0; at < std::ssize(pages.table); ++at) {
    const std::int64_t page = pages.table[static_cast<std::size_t>(at)], entry = at % pages.per_sequence;
    if (entry < pages.shared && page != pages.table[static_cast<std::size_t>(entry)])
      throw UserError(
          fmt::format("page table: {} names page {} (all sequences share their first {} entries); name page "
                      "{}, as sequence 0 does",
                      name(at), page, pages.shared, pages.table[static_cast<std::size_t>(entry)]));
    if (page == -1 && entry + 1 < pages.per_sequence && pages.table[static_cast<std::size_t>(at + 1)] != -1)
      throw UserError(fmt::format("page table: {} names no page (the next entry does); name one", name(at)));
    if (page == -1) continue;
    if (page < 0 || page >= pages.count)
      throw UserError(fmt::format("page table: {} names page {} (the cache has pages 0 to {}); name one of these",
                                  name(at), page, pages.count - 1));
    std::int64_t& first = owner[static_cast<std::size_t>(page)];
    if (first >= 0 && (entry >= pages.shared || first % pages.per_sequence != entry))
      throw UserError(
          fmt::format("page table: {} names page {} of {} (only the first {} entries are shared); give it "
                      "a page of its own",
                      name(at), page, name(first), pages.shared));
    if (first < 0) first = at;
  }
}

PageLayout sel_pages(const Config& config, const Partition& p, const Point& point) {
  return pages_of(config, p, point, p.tokens(false), config.cache.page,
                  [](std::int64_t positions) { return positions; });
}

PageLayout cmp_pages(const Config& config, const Partition& p, const Point& point) {
  const RowMap map = p.compressed(false);
  return pages_of(config, p, point, map, p.kv == 1 ? p.shape.lse.segment : map.stride,
                  [&](std::int64_t positions) { return compressed_tokens(p.shape.rules, positions - 1); });
}

CachePages::CachePages(const Allocator& allocate, const Config& config, const Partition& partition, const Point& point)
    : sel(sel_pages(config, partition, point)),
      cmp(cmp_pages(config, partition, point)),
      groups_(partition.shape.groups) {
  const auto upload = [&](const PageLayout& pages) {
    check_pages(pages);
    Buffer memory = allocate(MemoryKind::caches, std::ssize(pages.table) * 4);
    allocate.device.copy(memory.data(), pages.table.data(), memory.bytes(), nullptr);
    allocate.device.synchronize(nullptr);
    return memory;
  };
  sel_memory_ = upload(sel);
  cmp_memory_ = upload(cmp);
}

PageTable CachePages::table_of(const PageLayout& pages, const Buffer& memory) const {
  return {memory.as<const std::int32_t>(), pages.table.data(), static_cast<std::int32_t>(pages.per_sequence),
          pages.rows, groups_};
}

KvView on_host(KvView view) {
  view.pages.pages = view.pages.on_host;
  return view;
}

}  // namespace nsa
