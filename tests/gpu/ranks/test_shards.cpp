// Compares the fused phases of ShardedAttention with the stages, which test_attention.cpp compares with the host.

#include "gpu/ranks/shards.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

// The lse buckets of all ranks in the order of a single rank.
std::vector<float> lse_buckets(const Shards& shards) {
  const auto all = shards.lse_all->from_gpu<float>();
  const std::int64_t slots = lse_slots(shards.s, shards.kv), lane = std::ssize(all) / (slots * shards.kv);
  std::vector<float> out;
  for (std::int64_t x = 0; x < shards.s.lse.buckets; ++x) {
    const auto from = all.begin() + (x % shards.kv * slots + x / shards.kv) * lane;
    out.insert(out.end(), from, from + lane);
  }
  return out;
}

struct Answer {
  std::vector<float> lanes, o;
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads, candidates;
};
Answer answer(const Shards& s) {
  return {lse_buckets(s), values(*s.o, s.s.dtype), of_ranks<std::int32_t>(s, &RankResults::selected),
          of_ranks<std::int64_t>(s, &RankResults::reads), of_ranks<std::int64_t>(s, &RankResults::candidates)};
}

void compare(const Answer& got, const Answer& want, DType type, int leave_out) {
  CHECK(got.lanes == want.lanes);
  CHECK(got.reads == want.reads);
  if (leave_out != sel) {
    CHECK(got.candidates == want.candidates);
    CHECK(got.selected == want.selected);
  }
  CHECK(relative_error(got.o, want.o) < tolerance(type));
}

void check(const Case& c, std::initializer_list<int> grid, std::initializer_list<int> leave_outs = {-1}) {
  INFO(name_of(c.type) << " groups=" << c.groups << " h=" << c.h << " Dk=" << c.d_k << " Dv=" << c.d_v
                       << " batch=" << c.batch << " position=" << c.position);
  Shards whole(c, 1);
  whole.staged();
  const Answer one = answer(whole);
  for (const int kv : grid)
    for (const int leave_out : leave_outs) {
      INFO("kv=" << kv << ", without branch " << leave_out);
      Shards shards(c, kv);
      shards.staged(leave_out);
      const Answer staged = answer(shards);
      CHECK(staged.lanes == one.lanes);
      if (leave_out != sel)
        CHECK(std::vector(staged.selected.begin(), staged.selected.begin() + std::ssize(one.selected)) == one.selected);
      if (leave_out < 0) CHECK(relative_error(staged.o, one.o) < tolerance(c.type));
      for (const bool gated : {true, false}) {
        INFO((gated ? "gated partials" : "ordinary partials"));
        shards.sharded(gated, leave_out);
        compare(answer(shards), staged, c.type, leave_out);
      }
    }
}

}  // namespace

TEST_CASE("a fused sharded step equals its stages", "[shards]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const std::int64_t position : {0, 20, 130, 1023, 1040, 5000})
      for (const int chunk_blocks : {2, 8}) check({type, 1, 16, 128, 128, 2, position, chunk_blocks}, {2, 3, 8});
}

TEST_CASE("a sharded step of other head counts and sizes, and without a branch", "[shards]") {
  for (const auto& [type, h, d_k, d_v] : {std::tuple{DType::bf16, 5, 64, 64},
                                          {DType::f32, 5, 64, 64},
                                          {DType::f16, 20, 128, 128},
                                          {DType::f16, 16, 192, 128},
                                          {DType::f32, 1, 128, 128}})
    for (const int chunk_blocks : {2, 16})
      check({type, 2, h, d_k, d_v, 3, 2333, chunk_blocks}, {2, 4}, {-1, cmp, sel, win});
}

// Many splits per work item, and work items of more tiles than the last CTA merges: a separate launch merges the
// partials. In a layout of short work items the last CTA forms the lse buckets.
TEST_CASE("long work items are split into many and select the same blocks", "[shards]") {
  check({DType::bf16, 1, 4, 64, 64, 1, 40000, 16}, {2, 4});
  check({DType::bf16, 2, 16, 64, 64, 1, 300000, 16}, {2, 8});
  check({DType::f32, 1, 4, 64, 64, 1, 300000, 4}, {2, 3});
}

// Halos of no, one or several rows; chunks that end within a sector of scores; a sequence that ends with a chunk, so
// that one rank has the halo of the next chunk and no token of it.
TEST_CASE("a sharded step of other block geometries", "[shards]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const BlockRules& rules : {BlockRules{32, 32, 64, 8, 1, 1, 128},
                                    {8, 4, 32, 6, 2, 2, 4096},
                                    {64, 16, 64, 16, 1, 2, 128},
                                    {32, 16, 48, 5, 1, 2, 512},
                                    {4, 1, 8, 40, 1, 2, 64}})
      for (const std::int64_t position : {100, 1030, 2063})
        check({type, 1, 16, 128, 128, 2, position, 3, rules}, {2, 4});
  for (const std::int64_t position : {1024 * 2 + 15, 1024 * 2 + 31, 1024 * 3 + 15})
    check({DType::bf16, 1, 16, 128, 128, 1, position, 16}, {2, 4});
  // Blocks scored by tile, by sums of the KV mainloop and, because so many are chosen, by raw scores.
  for (const DType type : {DType::bf16, DType::f32})
    for (const BlockRules& rules : {BlockRules{8, 4, 16, 12, 0, 1, 128}, {32, 16, 64, 20, 1, 2, 512}})
      for (const std::int64_t position : {511, 1039, 2063, 9000})
        check({type, 2, 7, 64, 64, 2, position, 8, rules}, {2, 4});
}

TEST_CASE("a sharded step gives the same bits every time", "[shards][repeats]") {
  Shards shards({DType::bf16, 2, 16, 128, 128, 1, 40000, 16}, 2);
  shards.sharded(true);
  const Answer first = answer(shards);
  int differ = 0;
  for (int i = 0; i < 200; ++i) {
    shards.sharded(true);
    const Answer again = answer(shards);
    differ += again.lanes != first.lanes || again.candidates != first.candidates || again.o != first.o;
  }
  CHECK(differ == 0);
}

TEST_CASE("a small sharded step", "[shards][small]") {
  check({DType::bf16, 1, 4, 64, 64, 1, 700}, {2});
  check({DType::bf16, 1, 4, 64, 64, 1, 2100, 8}, {2});
  check({DType::bf16, 1, 4, 64, 64, 1, 20000, 4}, {2});
}
