// Compares the sharded step of one launch a rank with the stages: the same blocks, the same reads, o of the heads that
// a rank finishes. The ranks are on one GPU, so few enough CTAs that all are resident.

#include <map>
#include <random>

#include "gpu/ranks/shards.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

// One group of each size for all cases: epochs go on while the shapes change.
const Group& group_of(int kv) {
  static std::map<int, std::unique_ptr<Group>> groups;
  std::unique_ptr<Group>& group = groups[kv];
  if (!group) group = std::make_unique<Group>(kv);
  return *group;
}

struct Answer {
  std::vector<std::int32_t> selected;
  std::vector<std::int64_t> reads;
  std::vector<std::vector<unsigned char>> o;
  bool operator==(const Answer&) const = default;
};
Answer answer(const Shards& shards) {
  Answer a{
      of_ranks<std::int32_t>(shards, &RankResults::selected), of_ranks<std::int64_t>(shards, &RankResults::reads), {}};
  for (const auto& o : shards.o_of) a.o.push_back(o->from_gpu<unsigned char>());
  return a;
}

// o of all heads, from the ranks that finish them.
std::vector<float> whole_o(const Shards& shards, const Case& c) {
  const std::int64_t heads = shards.s.heads(), columns = shards.s.d_v;
  std::vector<float> whole(static_cast<std::size_t>(c.batch * heads * columns));
  for (int rank = 0; rank < shards.kv; ++rank) {
    const HeadRange finished = finished_heads(shards.s, shards.kv, rank);
    const std::vector<float> part = values(*shards.o_of[static_cast<std::size_t>(rank)], c.type);
    for (std::int64_t row = 0; row < c.batch; ++row)
      std::copy_n(part.begin() + row * finished.count * columns, finished.count * columns,
                  whole.begin() + (row * heads + finished.first) * columns);
  }
  return whole;
}

void check(const Case& c, std::initializer_list<int> grid, std::initializer_list<int> leave_outs = {-1}) {
  for (const int kv : grid)
    for (const int leave_out : leave_outs) {
      INFO("groups=" << c.groups << " h=" << c.h << " D=" << c.d_k << " batch=" << c.batch << " position=" << c.position
                     << " chunk_blocks=" << c.chunk_blocks << " kv=" << kv << ", without branch " << leave_out);
      const Group& group = group_of(kv);
      const Alarm alarm(std::chrono::seconds(20), group.abort_flag);
      Shards shards(c, kv);
      shards.staged(leave_out);
      const auto selected = of_ranks<std::int32_t>(shards, &RankResults::selected);
      const auto reads = of_ranks<std::int64_t>(shards, &RankResults::reads);
      const auto o = values(*shards.o, c.type);
      REQUIRE(shards.try_one_launch(group, leave_out));
      shards.one_launch(group, leave_out);
      REQUIRE(*group.abort_flag == 0);
      const Answer first = answer(shards);
      CHECK(first.reads == reads);
      if (leave_out != sel) CHECK(first.selected == selected);
      CHECK(relative_error(whole_o(shards, c), o) < tolerance(c.type));
      shards.one_launch(group, leave_out, 1, std::chrono::microseconds(50));
      CHECK(answer(shards) == first);
      REQUIRE(*group.abort_flag == 0);
    }
}

// A step that appends by itself against one on caches to which the stages have appended.
void check_appends(const Case& c, std::initializer_list<int> grid) {
  for (const int kv : grid) {
    INFO("groups=" << c.groups << " h=" << c.h << " D=" << c.d_k << " batch=" << c.batch << " position=" << c.position
                   << " chunk_blocks=" << c.chunk_blocks << " kv=" << kv);
    const Group& group = group_of(kv);
    const Alarm alarm(std::chrono::seconds(20), group.abort_flag);
    Shards stages(c, kv), launch(c, kv);
    stages.append_by_stages();
    launch.append_in_launch();
    for (Shards* shards : {&stages, &launch}) {
      REQUIRE(shards->try_one_launch(group));
      shards->one_launch(group);
    }
    REQUIRE(*group.abort_flag == 0);
    const Answer expected = answer(stages), got = answer(launch);
    CHECK(got.selected == expected.selected);
    CHECK(got.o == expected.o);
    CHECK(of_ranks<std::int64_t>(launch, &RankResults::reads_log) == expected.reads);
    CHECK(of_ranks<std::int32_t>(launch, &RankResults::selected_log) == expected.selected);
    const auto same = [](const std::unique_ptr<MirroredKv>& a, const std::unique_ptr<MirroredKv>& b) {
      return a->memory.from_gpu<unsigned char>() == b->memory.from_gpu<unsigned char>();
    };
    for (int i = 0; i < kv; ++i) {
      const Rank &a = stages.rank(i), &b = launch.rank(i);
      for (int branch = 0; branch < branches; ++branch)
        CHECK((same(a.k[branch], b.k[branch]) && same(a.v[branch], b.v[branch])));
      CHECK((same(a.k_raw, b.k_raw) && same(a.v_raw, b.v_raw)));
    }
  }
}

}  // namespace

TEST_CASE("a sharded step of one launch equals its stages", "[shards][one_launch]") {
  for (const std::int64_t position : {0, 20, 130, 1023, 1040, 5000})
    for (const int chunk_blocks : {8, 16})
      check({DType::bf16, 1, 16, 128, 128, 2, position, chunk_blocks}, {2, 3, 4, 8});
  // A sequence that ends with a chunk, so that one rank has the halo of the next chunk and no token of it.
  for (const std::int64_t position : {1024 * 2 + 14, 1024 * 2 + 15, 1024 * 2 + 31, 1024 * 3, 1024 * 3 + 15})
    check({DType::bf16, 1, 16, 128, 128, 1, position, 16}, {2, 4});
}

TEST_CASE("a sharded step of one launch: heads, sizes, long items, without a branch", "[shards][one_launch]") {
  check({DType::bf16, 2, 5, 64, 64, 3, 2333, 8}, {2, 3}, {-1, cmp, sel, win});
  check({DType::bf16, 2, 16, 128, 128, 3, 2333, 16}, {2}, {-1, cmp, sel, win});
  check({DType::bf16, 1, 1, 128, 128, 1, 9000, 8}, {2, 4});
  check({DType::bf16, 2, 16, 128, 128, 2, 65535, 16}, {2});
  check({DType::bf16, 1, 16, 128, 128, 1, 300000, 16}, {2, 4});
}

// Positions before and at the first compressed token; at which a token completes that ends a chunk, so that the next
// rank has it in a halo; at which a chunk of the selected rows begins; and others, with and without a token.
TEST_CASE("a sharded step of one launch appends as the stages do", "[shards][one_launch]") {
  for (const std::int64_t position : {0, 30, 31, 511, 512, 527, 1039, 1040, 1551, 5000, 5007})
    check_appends({DType::bf16, 1, 16, 128, 128, 2, position, 8}, {2, 3});
  check_appends({DType::bf16, 2, 5, 64, 64, 3, 2063, 16}, {2, 4});
}

TEST_CASE("a sharded step of one launch chooses among ties as the stages do", "[shards][one_launch]") {
  for (const std::int64_t position : {1500, 5000, 40000})
    for (const Ties ties : {Ties::zero_queries, Ties::equal_chunks})
      check({DType::bf16, 1, 16, 128, 128, 2, position, 8, {}, ties}, {2, 3});
}

TEST_CASE("a sharded step of one launch gives the same bits every time", "[shards][one_launch][repeats]") {
  Shards shards({DType::bf16, 2, 16, 128, 128, 1, 40000, 16}, 2);
  const Group& group = group_of(2);
  const Alarm alarm(std::chrono::seconds(60), group.abort_flag);
  REQUIRE(shards.try_one_launch(group));
  shards.one_launch(group);
  const Answer first = answer(shards);
  int differ = 0;
  std::minstd_rand random(1);
  constexpr int steps = 10000;
  for (int i = 1; i < steps; ++i) {  // one rank is late by up to 60 us, now this one, now that
    const auto pause = std::chrono::microseconds(i % 8 == 0 ? random() % 60 : 0);
    shards.launch_ranks(group, -1, static_cast<int>(random() % 2), pause);
    Answer again = answer(shards);
    for (std::size_t j = 0; j < again.reads.size(); ++j) again.reads[j] -= i * first.reads[j];  // they add up
    differ += again != first;
  }
  CHECK(*group.abort_flag == 0);
  CHECK(differ == 0);
}
