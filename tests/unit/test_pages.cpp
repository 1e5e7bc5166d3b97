// Page tables: who gets which page, and which tables are refused.

#include <set>
#include <string>
#include <vector>

#include "catch.hpp"
#include "kernels/diagnostics/error.hpp"
#include "nsa/model/pages.hpp"

using namespace nsa;

namespace {

std::string message_of(const PageLayout& pages) {
  try {
    check_pages(pages);
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

std::int32_t& entry(PageLayout& pages, std::int64_t sequence, std::int64_t at) {
  return pages.table[static_cast<std::size_t>(sequence * pages.per_sequence + at)];
}

Config config_of(const std::vector<std::string>& more) {
  std::vector<std::string> overrides = {"cache.layout=\"paged\"", "run.steps=5", "run.warmup=0",
                                        "parallel.kv_chunk_blocks=1"};
  overrides.insert(overrides.end(), more.begin(), more.end());
  const Config config = parse_config("[task]\nkind = \"decode\"\n", "pages.toml", overrides);
  validate(config);
  return config;
}

}  // namespace

TEST_CASE("sequences have pages of their own, but for the shared ones") {
  for (const PageOrder order : {PageOrder::sequential, PageOrder::shuffled}) {
    PageLayout pages = make_pages(64, {5, 3, 7}, 2, order, 1);
    CHECK(pages.per_sequence == 7);
    CHECK(pages.count == 2 + 3 + 1 + 5);
    CHECK(pages.used() == 15);
    CHECK(std::set<std::int32_t>(pages.table.begin(), pages.table.end()).size() == 12);  // -1 and every page
    for (const std::int64_t b : {1, 2})
      for (const std::int64_t at : {0, 1}) CHECK(entry(pages, b, at) == entry(pages, 0, at));
    CHECK(entry(pages, 1, 3) == -1);
    CHECK(message_of(pages) == "");
    CHECK((pages.table == make_pages(64, {5, 3, 7}, 2, PageOrder::sequential, 1).table) ==
          (order == PageOrder::sequential));
    CHECK(pages.table == make_pages(64, {5, 3, 7}, 2, order, 1).table);
  }
}

TEST_CASE("a page table that names no page, or a page twice, is refused") {
  const PageLayout good = make_pages(64, {4, 4}, 1, PageOrder::sequential, 1);
  PageLayout pages = good;
  entry(pages, 1, 2) = 7;
  CHECK(message_of(pages) ==
        "page table: entry 2 of sequence 1 names page 7 (the cache has pages 0 to 6); name one of these");
  pages = good;
  entry(pages, 0, 1) = -2;
  CHECK(message_of(pages) ==
        "page table: entry 1 of sequence 0 names page -2 (the cache has pages 0 to 6); name one of these");
  pages = good;
  entry(pages, 1, 3) = entry(pages, 0, 3);
  CHECK(
      message_of(pages) ==
      "page table: entry 3 of sequence 1 names page 3 of entry 3 of sequence 0 (only the first 1 entries are shared); "
      "give it a page of its own");
  pages = good;
  entry(pages, 1, 0) = 6;
  entry(pages, 1, 3) = 0;
  CHECK(message_of(pages) ==
        "page table: entry 0 of sequence 1 names page 6 (all sequences share their first 1 entries); name page 0, as "
        "sequence 0 does");
  pages = good;
  entry(pages, 0, 2) = entry(pages, 0, 1);
  CHECK(
      message_of(pages) ==
      "page table: entry 2 of sequence 0 names page 1 of entry 1 of sequence 0 (only the first 1 entries are shared); "
      "give it a page of its own");
  pages = good;
  entry(pages, 1, 1) = -1;
  CHECK(message_of(pages) == "page table: entry 1 of sequence 1 names no page (the next entry does); name one");
}

// l' = 64, d = 16, chunks of one block: 4 compressed tokens each, with a halo of one row on kv ranks.
TEST_CASE("pages are shared that the prefix fills, on every rank") {
  const Config config = config_of({"run.context=[640]", "run.batch=3", "cache.page=128", "cache.shared_prefix=330"});
  const Point point = sweep(config).at(0);
  Config one_rank = config, two = config;
  one_rank.parallel.heads = 2, two.parallel.kv = 2;
  const Partition whole = make_partition(one_rank, point, 2, 0), first = make_partition(two, point, 2, 0),
                  second = make_partition(two, point, 2, 1);
  const PageLayout tokens = sel_pages(config, whole, point);
  CHECK(tokens.rows == 128);
  CHECK(tokens.per_sequence == 6);  // 645 tokens
  CHECK(tokens.shared == 2);        // of 330 tokens, 256
  CHECK(tokens.count == 2 + 3 * 4);
  const PageLayout compressed = cmp_pages(config, whole, point);
  CHECK(compressed.rows == 4);
  CHECK(compressed.shared == 4);  // tokens 0 to 18 end within 330: 16 of them
  // Rank 0 has blocks 0, 2, 4, ...; rank 1 has blocks 1, 3, 5, ....
  CHECK(sel_pages(config, first, point).shared == 1);   // 0 and 2; 4 is complete, 6 is not in the prefix
  CHECK(sel_pages(config, second, point).shared == 1);  // 1 and 3
  CHECK(cmp_pages(config, first, point).rows == 5);
  CHECK(cmp_pages(config, first, point).shared == 2);   // chunks 0 and 2; chunk 4 has tokens 16 to 19
  CHECK(cmp_pages(config, second, point).shared == 2);  // chunks 1 and 3
}

TEST_CASE("of a ragged batch a sequence has pages for its own tokens") {
  const Config config = config_of({"batch.context=[1, 640, 60]"});
  const Point point = sweep(config).at(0);
  PageLayout pages = sel_pages(config, make_partition(config, point, 1, 0), point);
  CHECK(pages.count == 1 + 11 + 2);  // 6, 645 and 65 tokens
  CHECK(entry(pages, 0, 1) == -1);
}

TEST_CASE("every row of a paged cache has memory of its own") {
  const std::vector<std::int32_t> table = {5, 0, 3, 1, 2, 4};
  for (const std::int32_t kv : {1, 2}) {
    KvView view;
    if (kv == 2) view.map = {.chunk = 4, .stride = 5, .halo = 1, .kv = 2, .rank = 1};
    view.width = 3;
    view.pages = {table.data(), table.data(), 3, 5, 2};
    std::set<std::int64_t> offsets;
    std::int64_t rows = 0;
    for (std::int64_t plane = 0; plane < 4; ++plane)
      for (std::int64_t i = 0; i < (kv == 1 ? 15 : 24); ++i)
        if (has_row(view.map, i)) {
          offsets.insert(offset_of(view, plane, i));
          ++rows;
        }
    CHECK(std::ssize(offsets) == rows);
    CHECK(*offsets.rbegin() < 6 * 2 * 5 * 3);
    if (kv == 1) CHECK(offset_of(view, 3, 7) == ((2 * 2 + 1) * 5 + 2) * 3);  // sequence 1, group 1, page 2, row 2
  }
}
