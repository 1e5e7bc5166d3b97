#pragma once
// The pages of paged caches. The caches that grow, selected K and V and compressed tokens, have one page table each,
// which is the same for K, V and every layer. A page of selected K and V holds cache.page tokens. A page of compressed
// tokens holds those of a KV chunk, on kv ranks with the halo in front of it: then an LSE segment, which every layout
// reduces in one order, is never in two pages.
//
// Sequences share the pages that the shared prefix fills. A page that holds rows after the prefix too is a sequence's
// own from the start, with a copy of the prefix's rows in it.

#include <cstdint>
#include <vector>

#include "nsa/model/buffers.hpp"

namespace nsa {

/// The pages of one cache on one rank.
struct PageLayout {
  std::int32_t rows = 1;                 ///< of a page
  std::int64_t sequences = 0;            ///< that have them
  std::int64_t per_sequence = 0;         ///< entries of the table
  std::int64_t shared = 0;               ///< first entries of every sequence that name the same pages
  std::int64_t count = 0;                ///< pages in memory
  std::vector<std::int32_t> table = {};  ///< [sequence][per_sequence]; -1: none, after the last page of a sequence

  /// Entries that name a page: pages in memory if none were shared.
  std::int64_t used() const;
};

/// Gives sequence b entries[b] pages, in order or in one that `seed` shuffles; the first `shared` of each are common.
PageLayout make_pages(std::int32_t rows, const std::vector<std::int64_t>& entries, std::int64_t shared, PageOrder order,
                      std::uint64_t seed);

/// Throws UserError where a table names a page that does not exist, leaves out one before the last, or gives a page to
/// two sequences, or to one twice, that do not share it.
void check_pages(const PageLayout& pages);

/// Those of selected K and V, and of compressed tokens, at a point.
PageLayout sel_pages(const Config& config, const Partition& partition, const Point& point);
PageLayout cmp_pages(const Config& config, const Partition& partition, const Point& point);

/// The page tables of a rank in backend memory.
class CachePages {
 public:
  CachePages(const Allocator& allocate, const Config& config, const Partition& partition, const Point& point);
  const PageLayout sel, cmp;
  PageTable sel_table() const { return table_of(sel, sel_memory_); }
  PageTable cmp_table() const { return table_of(cmp, cmp_memory_); }

 private:
  PageTable table_of(const PageLayout& pages, const Buffer& memory) const;
  std::int32_t groups_;
  Buffer sel_memory_, cmp_memory_;
};

/// The view as host code reads it: with its page table in host memory.
KvView on_host(KvView view);

}  // namespace nsa
