// Compares every attention stage of the CUDA backend with that of the host, over head counts, head sizes, lengths,
// layouts of the KV shards and types.

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
