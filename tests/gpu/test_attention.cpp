// Compares every attention stage of the CUDA backend with that of the host, over head counts, head sizes, lengths,
// layouts of the KV shards and types.

#include <algorithm>
#include <limits>
#include <memory>
#include <string>

#include "catch.hpp"
#include "gpu/attention_run.hpp"

using namespace nsa;
using namespace nsa::test;
using namespace nsa::test::attention;

TEST_CASE("cuda attention equals the host's over head counts, head sizes and types") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16})
    for (const auto& [h, d_k, d_v] : {std::tuple{1, 32, 32},
                                      {2, 64, 64},
                                      {4, 64, 64},
                                      {16, 128, 128},
                                      {16, 64, 64},
                                      {8, 96, 128},
                                      {16, 192, 128},
                                      {4, 256, 256},
                                      {5, 24, 8},
                                      {3, 10, 6},
                                      {20, 64, 32},
                                      {16, 128, 64}}) {
      Case decode{shape_of(type, 2, h, d_k, d_v), 2, 1, 2333};
      run_and_check(decode);
      Case prefill{shape_of(type, 1, h, d_k, d_v), 1, 37, 1200};
      run_and_check(prefill);
    }
}

TEST_CASE("cuda attention equals the host's at every length") {
  for (const DType type : {DType::f32, DType::bf16})
    for (const std::int64_t first : {0, 1, 30, 31, 32, 47, 63, 64, 127, 511, 512, 1023, 1024, 1040, 4095, 9000}) {
      Case c{shape_of(type, 2, 4, 64, 64), 1, 1, first};
      run_and_check(c);
      CHECK(Run(c).fused);
      c.shape.heads_per_group = 16;
      c.batch = 3;
      c.ring = true;
      run_and_check(c);
      c.batch = 1;
      c.ring = false;
      c.tokens = 70;
      run_and_check(c);
    }
}

TEST_CASE("cuda attention equals the host's for other block geometries") {
  for (const DType type : {DType::f32, DType::bf16})
    for (const BlockRules& r : {BlockRules{16, 16, 16, 4, 0, 1, 1},
                                {32, 32, 64, 8, 1, 1, 100},
                                {8, 4, 32, 6, 2, 2, 4096},
                                {64, 16, 64, 16, 1, 2, 77},
                                {32, 16, 48, 5, 1, 2, 512},
                                {4, 1, 8, 40, 1, 2, 64}})
      for (const std::int64_t first : {0, 100, 1500}) {
        Case c{shape_of(type, 1, 16, 128, 128), 2, 1, first};
        c.shape.rules = r;
        run_and_check(c);
        c.batch = 1;
        c.tokens = 33;
        run_and_check(c);
      }
}

TEST_CASE("every kv layout selects the same blocks bit for bit and has the same outputs") {
  const int chunk_blocks = GENERATE(2, 8);  // without and with whole tiles
  for (const DType type : {DType::f32, DType::bf16})
    for (const std::int64_t first : {20, 130, 257, 1023, 1038, 1040, 5000, 33008}) {
      Case c{shape_of(type, 1, 16, 128, 128), 2, 1, first};
      c.chunk_blocks = chunk_blocks;
      for (std::size_t kernel = 0; kernel < gpu().kernels->attend[cmp].size(); ++kernel) {
        c.kv = 1;
        c.ring = false;
        const Run one(c, kernel);
        check(one);
        const auto one_scores = one.p_slc[0]->from_gpu<float>();
        for (const int kv : {2, 3, 4, 8}) {
          c.kv = kv;
          c.ring = true;
          const Run tiled(c, kernel);
          check(tiled);
          INFO("first=" << first << " kv=" << kv << " " << name_of(type) << " "
                        << gpu().kernels->attend[cmp][kernel].name);
          CHECK(tiled.gpu_selected == one.gpu_selected);
          std::vector<float> sum(one_scores.size(), 0.0f);
          for (const auto& p_slc : tiled.p_slc) {
            const auto values = p_slc->from_gpu<float>();
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];  // each block belongs to one rank
          }
          CHECK(sum == one_scores);
        }
      }
      c.ring = false;
      c.gathered = true;
      c.tokens = 17;
      for (const int kv : {1, 2, 4}) {
        c.kv = kv;
        run_and_check(c);
      }
    }
}

// Prefill tiles of the head sizes of the tuned kernels: starts, ends and lengths that are no multiple of a tile; few
// heads; chunks of one block to many; more than one tile of 128 tokens in every branch.
TEST_CASE("cuda prefill tiles equal the host's", "[prefill]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const int d : {64, 128})
      for (const int h : {16, 5, 1})
        for (const auto& [first, tokens] :
             {std::pair{0, 1}, {0, 70}, {15, 33}, {500, 19}, {1023, 66}, {2040, 129}, {5003, 40}}) {
          Case c{shape_of(type, 2, h, d, d), 1, tokens, first};
          c.chunk_blocks = 4;
          run_and_check(c);
          if (h == 5) c.batch = 2, run_and_check(c), c.batch = 1;
          c.scored = true;
          if (h == 16) run_and_check(c);
        }
}

// Every number of queries in a product, with idle rows and without: rows before the first compressed token, queries of
// which some see a second KV tile, blocks that are eligible before any of their tokens is visible.
TEST_CASE("cuda prefill tiles of few heads equal the host's", "[prefill][few]") {
  int index = 0;
  for (const int h : {12, 8, 7, 4, 3, 2, 1})
    for (const auto& [first, tokens] : {std::pair{0, 70}, {2047, 23}, {2040, 129}, {5003, 40}}) {
      ++index;
      Case c{shape_of(index % 2 ? DType::bf16 : DType::f16, 2, h, 128, 128), index % 3 ? 1 : 2, tokens, first};
      c.chunk_blocks = 4;
      check(Run(c));
    }
  for (const int h : {7, 4}) check(Run({shape_of(DType::bf16, 4, h, 64, 64), 1, 203, 1990}));
}

// Head sizes that the tiled kernels pad, of K and V each, and blocks of 128 tokens.
TEST_CASE("cuda prefill takes every head size up to 256, and blocks of 128", "[prefill][padded_prefill]") {
  int index = 0;
  for (const auto& [d_k, d_v] : {std::pair{16, 16},
                                 {48, 48},
                                 {80, 80},
                                 {96, 96},
                                 {112, 112},
                                 {64, 128},
                                 {128, 16},
                                 {32, 96},
                                 {192, 128},
                                 {144, 48},
                                 {176, 112}})
    for (const int h : {16, 3})
      for (const auto& [first, tokens] : {std::pair{0, 70}, {500, 19}, {2040, 129}}) {
        ++index;
        Case c{shape_of(index % 2 ? DType::bf16 : DType::f16, 2, h, d_k, d_v), 1, tokens, first};
        c.chunk_blocks = 4;
        run_and_check(c);
      }
  for (const int d_k : {96, 128, 192})
    for (const auto& [n, first, tokens] : {std::tuple{16, 0, 203}, {5, 5003, 150}, {8, 2050, 300}}) {
      Case c{shape_of(DType::bf16, 4, 16, d_k, std::min(d_k, 128)), 1, tokens, first};
      c.shape.rules.l_sel = 128, c.shape.rules.n_sel = n;
      const Run run(c);
      CHECK(run.fused);
      check(run);
      c.scored = true;
      check(Run(c));
    }
}

// Groups and values that take several launches: more than 16 heads, more than 128 columns of V. The first has raw
// scores too; the last tile is large enough for the fused operation, whose blocks must be those of the stages.
TEST_CASE("cuda prefill takes groups and values in parts", "[prefill][parts]") {
  for (const auto& [h, d_k, d_v] : {std::tuple{16, 256, 256},
                                    {2, 256, 256},
                                    {16, 160, 160},
                                    {5, 224, 192},
                                    {3, 64, 144},
                                    {32, 128, 128},
                                    {20, 64, 64},
                                    {40, 256, 176}}) {
    Case c{shape_of(d_k == 160 ? DType::f16 : DType::bf16, 2, h, d_k, d_v), 1, 70, 1100};
    c.chunk_blocks = 4;
    check(Run(c));
    c.scored = true;
    check(Run(c));
    c.scored = false, c.first = 2040, c.tokens = 270;
    const Run run(c);
    CHECK(run.fused);
    check(run);
  }
}

// Groups of few heads, and rows enough that a warp of the selected branch takes 2, 4, 8 and 16 queries: work items that
// end within a warp's queries, blocks of 64 and 128 tokens, more than 16 of them.
TEST_CASE("cuda prefill attends the chosen blocks of several queries together", "[prefill][packed]") {
  for (const auto& [h, d, batch, first, tokens, l_sel, n] : {std::tuple{1, 64, 34, 2040, 23, 64, 16},
                                                             {1, 128, 34, 0, 70, 64, 16},
                                                             {2, 128, 17, 2040, 110, 64, 16},
                                                             {2, 256, 34, 1000, 20, 64, 5},
                                                             {3, 96, 34, 700, 31, 64, 20},
                                                             {4, 128, 12, 2500, 130, 64, 16},
                                                             {4, 128, 34, 2000, 13, 128, 16},
                                                             {8, 128, 9, 2040, 95, 64, 16},
                                                             {7, 48, 9, 100, 91, 64, 16}}) {
    Case c{shape_of(h == 4 ? DType::f16 : DType::bf16, 4, h, d, d), batch, tokens, first};
    c.shape.rules.l_sel = l_sel, c.shape.rules.n_sel = n;
    const Run run(c);
    INFO("h=" << h << " d=" << d << " batch=" << batch << " first=" << first << " l_sel=" << l_sel << " n=" << n);
    CHECK(run.fused);
    check(run);
  }
}

// More chosen blocks than the single-pass kernel holds, and enough rows for tiles; more than a warp has lanes.
TEST_CASE("cuda prefill of many chosen blocks equals the host's", "[prefill][many]") {
  for (const int d : {64, 128})
    for (const int n : {17, 32}) {
      Case c{shape_of(DType::bf16, 2, 3, d, d), 1, 300, 2500};
      c.shape.rules.n_sel = n;
      run_and_check(c);
    }
  for (const auto& [n, l_sel, h, first] : {std::tuple{33, 64, 3, 2500}, {64, 64, 16, 4500}, {32, 128, 16, 5000}}) {
    Case c{shape_of(DType::bf16, 2, h, 128, 128), 1, 300, first};
    c.shape.rules.n_sel = n, c.shape.rules.l_sel = l_sel;
    const Run run(c);
    CHECK(run.fused);
    check(run);
  }
}

// Scores whose spread is tens of powers of two: rows whose running maximum rises after the first tile, by much and by
// little, next to rows where it stays.
TEST_CASE("cuda prefill equals the host's where scores rise", "[prefill]") {
  for (const DType type : {DType::bf16, DType::f16})
    for (const int d : {64, 128})
      for (const float scale : {20.0f, 80.0f})
        for (const auto& [first, tokens] : {std::pair{300, 70}, {4090, 40}}) {
          Case c{shape_of(type, 4, 16, d, d), 1, tokens, first};
          c.q_scale = scale;
          run_and_check(c);
        }
  // The fused operation attends the selection of the GPU: with 80, most block scores are 0 on one side and 1e-40 on the
  // other.
  Case c{shape_of(DType::bf16, 4, 16, 128, 128), 1, 203, 2000};
  c.q_scale = 20.0f;
  const Run run(c);
  check(run);
  CHECK(run.fused);
}

// A prefill allocates for its widest tile, and runs chunks that end earlier and last tiles of few rows.
TEST_CASE("the scratch of a tile suffices for tiles of fewer rows and positions", "[prefill][scratch]") {
  for (const auto& [d, h, tokens, positions] : {std::tuple{128, 16, 331, 1500},
                                                {128, 16, 3, 70000},
                                                {128, 16, 4096, 70000},
                                                {64, 2, 290, 1111},
                                                {24, 5, 100, 3000}})
    for (const DType type : {DType::bf16, DType::f32})
      for (const bool recompute : {true, false}) {
        const LayerShape s = shape_of(type, 4, h, d, d);
        const auto scratch = [&](int rows, std::int64_t end) {
          return gpu().kernels->scratch_bytes(s, {0, 1, rows, nullptr, end}, {recompute});
        };
        const std::size_t widest = scratch(tokens, positions);
        for (std::int64_t end = 1; end <= positions; end += std::max<std::int64_t>(1, positions / 211))
          for (const int rows : {1, 2, 15, 16, 17, 100, 176, 331}) {
            if (rows > tokens) continue;
            INFO("d=" << d << " " << name_of(type) << " recompute=" << recompute << " rows=" << rows << " end=" << end);
            CHECK(scratch(rows, end) <= widest);
          }
      }
}

TEST_CASE("cuda prefill selects the same blocks on every layout and tile", "[prefill]") {
  for (const auto& [h, chunk_blocks] : {std::pair{16, 2}, {16, 4}, {16, 16}, {8, 2}, {4, 16}, {3, 4}, {2, 16}, {1, 4}})
    for (const auto& [first, tokens] : {std::pair{0, 100}, {1020, 77}, {6007, 50}}) {
      Case c{shape_of(DType::bf16, 1, h, 128, 128), 1, tokens, first};
      c.chunk_blocks = chunk_blocks;
      c.gathered = true;
      const Run one(c);
      check(one);
      const auto scores = one.p_slc[0]->from_gpu<float>();
      for (const int kv : {2, 3, 8}) {
        c.kv = kv;
        const Run tiled(c);
        check(tiled);
        INFO("h=" << h << " first=" << first << " kv=" << kv << " chunk_blocks=" << chunk_blocks);
        CHECK(tiled.gpu_selected == one.gpu_selected);
        CHECK(tiled.p_slc[0]->from_gpu<float>() == scores);
      }
    }
}

// The fused prefill tile, which accepts tiles with enough rows to fill the GPU: starts before the first compressed
// token, ends that are no multiple of a tile, few heads, chunks gathered from several ranks.
TEST_CASE("fused cuda prefill equals the host's and selects what the stages select", "[prefill][once]") {
  const auto run_fused = [](const Case& c) {
    const Run run(c);
    check(run);
    CHECK(run.fused);
  };
  Case early{shape_of(DType::bf16, 12, 1, 64, 64), 2, 30, 0};
  run_fused(early);
  for (const DType type : {DType::bf16, DType::f16})
    for (const auto& [d, h, first, tokens] : {std::tuple{128, 16, 0, 203},
                                              {128, 5, 1020, 199},
                                              {128, 1, 4990, 194},
                                              {128, 2, 2040, 210},
                                              {96, 4, 1500, 197},
                                              {64, 16, 2045, 200},
                                              {64, 7, 0, 1000}}) {
      Case c{shape_of(type, 4, h, d, d), 1, tokens, first};
      run_fused(c);
    }
  Case c{shape_of(DType::bf16, 2, 16, 128, 128), 2, 205, 1500};
  run_fused(c);
  c.chunk_blocks = 4;
  c.gathered = true;
  for (const int kv : {2, 3}) {
    c.kv = kv;
    run_fused(c);
  }
  c = {shape_of(DType::bf16, 2, 16, 128, 128), 1, 20, 1500};
  CHECK_FALSE(Run(c).fused);
}

// The fused step on clusters of every size: enough work items for each, and enough tiles that warps have several of
// them; every count of blocks around those that a warp scores together; a branch left out. Chunks of 16 blocks have
// whole tiles, by which their blocks are scored; chunks of 2 blocks have none.
TEST_CASE("a fused decode step equals its stages", "[step]") {
  const int chunk_blocks = GENERATE(2, 16);
  for (const DType type : {DType::bf16, DType::f16, DType::f32})
    for (const auto& [batch, first] : {std::pair{1, 33},
                                       {1, 2333},
                                       {1, 40000},
                                       {2, 9000},
                                       {5, 6000},
                                       {9, 5000},
                                       {13, 5000},
                                       {20, 4000},
                                       {40, 3000},
                                       {90, 1999},
                                       {150, 1111}}) {
      if (type != DType::bf16 && batch > 20) continue;
      const int h = batch > 2 && type != DType::f32 ? 16 : 3;
      Case c{shape_of(type, batch == 1 ? 1 : 2, h, 64, 64), batch, 1, first};
      c.chunk_blocks = chunk_blocks;
      const Run run(c);
      CHECK(run.fused);
      check(run);
      c.ring = true;
      check(Run(c));
    }
  for (const int blocks : {16, 17, 18, 31, 32, 33, 61, 62, 63, 64, 93, 94, 125, 126, 256, 249, 1000})
    for (const int within : {0, 14, 15, 30, 31, 63}) {
      Case c{shape_of(DType::bf16, 1, 16, 128, 128), 1, 1, blocks * 64 + within};
      c.chunk_blocks = chunk_blocks;
      check(Run(c));
    }
  for (const int left_out : {cmp, sel, win})
    for (const auto& [batch, first] : {std::pair{1, 700}, {1, 20000}, {40, 3000}, {80, 1500}}) {
      Case c{shape_of(DType::bf16, 2, 16, 128, 128), batch, 1, first};
      c.left_out = left_out;
      c.chunk_blocks = chunk_blocks;
      check(Run(c));
      c.shape = shape_of(DType::f32, 2, 2, 64, 64);
      check(Run(c));
    }
}

// Blocks scored by tile: lse segments of one, two and three tiles, and of one and a half, which have no whole tiles;
// every count of tokens around the end of a tile; head counts that are no multiple of four; scores spread so far that
// the tokens of a tile are negligible next to its maximum; other geometries, of which only the first two are scored by
// tile.
TEST_CASE("blocks are scored by tile where lse segments have whole tiles", "[step]") {
  for (const DType type : {DType::bf16, DType::f32})
    for (const int chunk_blocks : {8, 12, 16, 24})
      for (const int h : {1, 3, 4})
        for (const std::int64_t first : {2047, 2048 + 14, 2048 + 15, 2048 + 16, 2048 + 31, 4096 + 30, 9000}) {
          Case c{shape_of(type, 1, h, 64, 64), 1, 1, first};
          c.chunk_blocks = chunk_blocks;
          c.q_scale = first == 9000 ? 16.0f : 2.0f;
          check(Run(c));
        }
  for (const BlockRules& r : {BlockRules{16, 8, 32, 16, 1, 2, 128},
                              {2, 1, 4, 12, 0, 1, 64},
                              {32, 16, 128, 16, 1, 2, 512},
                              {16, 16, 64, 16, 1, 2, 512},
                              {64, 16, 64, 16, 1, 2, 77}})
    for (const int h : {5, 16, 20})
      for (const std::int64_t first : {511, 1500, 3000}) {
        Case c{shape_of(DType::bf16, 2, h, 64, 64), 2, 1, first};
        c.shape.rules = r;
        c.chunk_blocks = 16;
        run_and_check(c);
        c.tokens = 9;
        run_and_check(c);
      }
}

TEST_CASE("cuda decode takes every head count and head size", "[shapes]") {
  int index = 0;
  for (const int h : {1, 3, 5, 7, 12, 17, 24, 32, 48, 64, 128})
    for (const int d : {16, 48, 80, 96, 112, 160, 192, 224, 256}) {
      ++index;
      Case c{shape_of(index % 3 == 0 ? DType::f16 : DType::bf16, 1 + index % 2, h, d, d), 1, 1, 2333};
      c.chunk_blocks = index % 4 == 0 ? 2 : 16;  // without and with whole tiles
      if (index % 5 == 0) {
        check_on_every_layout(c);
      } else {
        const Run run(c);
        CHECK(run.fused);
        check(run);
      }
    }
}

TEST_CASE("cuda decode takes every pair of head sizes and other selections", "[shapes]") {
  for (const auto& [d_k, d_v] :
       {std::pair{16, 256}, {80, 128}, {96, 64}, {128, 64}, {144, 128}, {192, 64}, {256, 32}, {32, 176}})
    for (const int h : {2, 16, 20}) check_on_every_layout({shape_of(DType::bf16, 2, h, d_k, d_v), 2, 1, 3001});
  for (const int h : {4, 16, 40})
    for (const int n : {17, 24, 32})
      for (const int l_sel : {32, 64, 128})
        for (const std::int64_t first : {900, 9000}) {
          Case c{shape_of(DType::bf16, 1, h, 128, 128), 1, 1, first};
          c.shape.rules.n_sel = n, c.shape.rules.l_sel = l_sel;
          c.chunk_blocks = 1024 / l_sel;
          check_on_every_layout(c);
        }
}

// Clusters of every size and CTAs without one; several tiles a warp; a branch left out.
TEST_CASE("a fused decode step of a padded instance equals its stages", "[shapes]") {
  const int chunk_blocks = GENERATE(2, 16);
  for (const auto& [h, d] :
       {std::pair{16, 96}, {5, 80}, {4, 256}, {16, 224}, {32, 128}, {24, 64}, {70, 128}, {40, 160}})
    for (const auto& [batch, first] :
         {std::pair{1, 33}, {1, 20000}, {2, 9000}, {7, 5000}, {20, 3000}, {70, 1999}, {150, 1111}}) {
      if (batch > 20 && h > 32) continue;
      Case c{shape_of(DType::bf16, 2, h, d, d), batch, 1, first};
      c.chunk_blocks = chunk_blocks;
      c.ring = batch % 2 == 0;
      const Run run(c);
      CHECK(run.fused);
      check(run);
    }
  for (const int left_out : {cmp, sel, win})
    for (const auto& [h, d] : {std::pair{16, 96}, {4, 256}, {32, 128}, {40, 256}})
      for (const auto& [batch, first] : {std::pair{1, 700}, {40, 3000}}) {
        Case c{shape_of(DType::bf16, 2, h, d, d), batch, 1, first};
        c.left_out = left_out;
        c.chunk_blocks = chunk_blocks;
        check(Run(c));
      }
}

// `fused` runs sel on the tiled kernel only where the rows of all groups and sequences fill it; cases on both sides.
TEST_CASE("cuda selected attention runs row by row where rows are few", "[prefill][variant]") {
  const AttendKernel& fused = gpu().kernels->attend[sel][0];
  for (const auto& [groups, batch] : {std::pair{1, 1}, {4, 1}, {1, 3}}) {
    Case c{shape_of(DType::bf16, groups, 4, 64, 64), batch, 1, 4000};
    const auto name = [&](std::int32_t tokens) {
      AttendArgs a;
      a.shape = c.shape;
      a.tile = {0, c.batch, tokens, nullptr, c.first + tokens};
      return std::string(fused.variant_name(a));
    };
    c.tokens = 2;
    while (c.tokens < 8192 && name(c.tokens + 1) == "rows") ++c.tokens;
    INFO("groups=" << groups << " batch=" << batch << " few rows are up to " << c.tokens << " tokens");
    CHECK(name(1) == "decode");
    CHECK(name(2) == "rows");
    if (gpu().capability == 90) CHECK(name(c.tokens + 1) == "tiled");
    CHECK(name(8192) == (gpu().capability == 90 ? "tiled" : "rows"));
    check(Run(c));
    ++c.tokens;
    check(Run(c));
  }
}

TEST_CASE("packed SDPA runs in the jobs that its scratch holds, matrix products elsewhere", "[variant][small]") {
  Case c{shape_of(DType::bf16, 2, 4, 64, 64), 1, 37, 1200};
  c.chunk_blocks = 16;  // the LSE segments of shape_of()
  const auto kernel_of = [&](Branch branch, std::size_t scratch_bytes) {
    AttendArgs a;
    a.shape = c.shape;
    a.tile = {0, c.batch, c.tokens, nullptr, c.positions()};
    a.scratch_bytes = scratch_bytes;
    return std::string(gpu().kernels->attend[branch][1].variant_name(a));
  };
  const AttendKernel& sdpa = gpu().kernels->attend[sel][1];
  const std::size_t all = sdpa.scratch(c.shape, {0, c.batch, c.tokens, nullptr, c.positions()}, {}),
                    row = std::size_t{16} * 64 * (64 + 64) * 2,  // packed K and V of a (row, group)
      rows = std::size_t{37} * 2 * row;
  for (const auto& [bytes, name] : {std::pair{all, "sdpa_split_kv"},
                                    {all - rows + 20 * row, "sdpa_split_kv"},  // several jobs, the last one shorter
                                    {all - rows - row, "sdpa_gemm"}}) {        // a fallback brings no scratch for it
    CHECK(kernel_of(sel, bytes) == name);
    c.max_scratch = bytes;
    check(Run(c, 1));
  }
  CHECK(kernel_of(cmp, all) == "sdpa_gemm");  // rank reads its scores
  CHECK(kernel_of(win, all) == "sdpa_gemm");  // several rows share a window
  c.tokens = 1;
  CHECK(kernel_of(win, all) == "sdpa_split_kv");
  c.shape.dtype = DType::f32;
  CHECK(kernel_of(win, all) == "sdpa_gemm");
  CHECK(kernel_of(sel, all) == "sdpa_gemm");
  c.shape = shape_of(DType::bf16, 2, 3, 10, 6);  // rows are no whole 16-byte vectors
  CHECK(kernel_of(sel, all) == "sdpa_gemm");
}

// Small enough for compute-sanitizer's slower tools: gpu_tests "[small]".
TEST_CASE("cuda attention of a few shapes", "[small]") {
  for (const DType type : {DType::f32, DType::bf16}) {
    Case c{shape_of(type, 2, 4, 64, 64), 1, 1, 700};
    run_and_check(c);
    c.tokens = 9;
    run_and_check(c);
    c.tokens = 1;
    c.kv = 2;
    c.ring = true;
    run_and_check(c);
    c.shape = shape_of(type, 1, 16, 128, 128);
    c.chunk_blocks = 8;
    run_and_check(c);
    c.kv = 1;
    c.first = 4200;
    run_and_check(c);
    c.chunk_blocks = 2;
    c.ring = false;
    c.first = 2100;
    c.tokens = 20;
    run_and_check(c);
  }
}

TEST_CASE("cuda attention of a few padded shapes and parts", "[small]") {
  check(Run({shape_of(DType::bf16, 1, 20, 96, 80), 1, 1, 700}));
  check(Run({shape_of(DType::f16, 1, 20, 96, 144), 1, 20, 700}));
  Case many{shape_of(DType::bf16, 1, 2, 128, 128), 1, 1, 1700};
  many.shape.rules.n_sel = 20;
  check(Run(many));
}

// Several queries a warp of the selected branch, and more blocks than a warp has lanes.
TEST_CASE("a small cuda prefill of few heads and many blocks", "[small][prefill]") {
  Case c{shape_of(DType::bf16, 12, 1, 16, 16), 12, 18, 150};
  const Run few(c);
  CHECK(few.fused);
  check(few);
  c = {shape_of(DType::bf16, 12, 2, 16, 16), 4, 13, 2200};
  c.shape.rules.n_sel = 34;
  const Run many(c);
  CHECK(many.fused);
  check(many);
}
