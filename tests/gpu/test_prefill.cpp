// Compares prefill tiles of the CUDA backend with the host's, over shapes, layouts of the KV shards and types.

#include <algorithm>
#include <string>

#include "catch.hpp"
#include "gpu/attention_run.hpp"

using namespace nsa;
using namespace nsa::test;
using namespace nsa::test::attention;

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
