#include "parity/shapes.hpp"

namespace parity {

// The base (parity/product.cpp): dim 32, H = 4, G = 2, Dk = Dv = 16, l/d/l' = 8/4/16, n = 5 (1 + 2 forced), w = 24.
const std::vector<Shape>& layer_shapes() {
  static const std::vector<Shape> shapes = {
      {"T a multiple of everything", 128, 16, {}},
      {"T no multiple of d or l'", 143, 7, {}},
      {"T < l", 5, 14, {}},
      {"T = 1", 1, 21, {}},
      {"B = 3", 101, 5, {"run.batch=3"}},
      {"h = 1", 117, 5, {"model.n_heads=2"}},
      {"h = 5", 117, 5, {"model.n_heads=10"}},
      {"G = 1", 117, 5, {"model.n_kv_groups=1"}},
      {"Dk < Dv", 117, 5, {"model.d_k=8", "model.d_v=24"}},
      {"Dk > Dv", 117, 5, {"model.d_k=24", "model.d_v=10"}},
      {"l = d", 117, 5, {"nsa.l=4", "nsa.d=4"}},
      {"l = l'", 117, 5, {"nsa.l=16", "nsa.d=4"}},
      {"l = d = l'", 117, 5, {"nsa.l=16", "nsa.d=16"}},
      {"d = 1", 117, 5, {"nsa.l=3", "nsa.d=1", "nsa.l_sel=8"}},
      {"l = 4d", 117, 5, {"nsa.l=16", "nsa.d=4", "nsa.l_sel=16", "nsa.n_sel=4"}},
      {"n_init = 0", 133, 5, {"nsa.n_init=0"}},
      {"n_init = 2, n_local = 1", 133, 5, {"nsa.n_init=2", "nsa.n_local=1"}},
      {"n = 1", 117, 5, {"nsa.n_init=0", "nsa.n_local=1", "nsa.n_sel=1"}},
      {"n > blocks", 117, 5, {"nsa.n_sel=16"}},
      {"w > T", 117, 5, {"nsa.w=512"}},
      {"w = 1", 117, 5, {"nsa.w=1"}},
      {"w = 37", 117, 5, {"nsa.w=37"}},
      {"8/4/16 in a narrow model", 149, 9, {"model.dim=8", "model.d_k=4", "model.d_v=4"}},
      {"16/8/32", 259, 9, {"nsa.l=16", "nsa.d=8", "nsa.l_sel=32"}},
      {"4/2/8", 117, 9, {"nsa.l=4", "nsa.d=2", "nsa.l_sel=8"}},
      {"the paper's blocks",
       1157,
       9,
       {"nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=16", "nsa.w=512", "model.n_heads=2", "model.d_k=8",
        "model.d_v=8", "model.dim=16"}},
      {"sigmoid gates", 117, 5, {"model.gate=\"sigmoid\""}},
      {"learned phi", 117, 9, {"nsa.phi=\"mlp\"", "nsa.phi_hidden=24"}},
      {"learned phi, Dk != Dv", 61, 9, {"nsa.phi=\"mlp\"", "model.d_v=10"}},
      {"shared_kv", 117, 9, {"model.shared_kv=true"}},
      {"shared_kv, learned phi", 61, 9, {"model.shared_kv=true", "nsa.phi=\"mlp\""}},
      {"rope base 500", 117, 5, {"model.rope_base=500.0"}},
      {"L = 3", 101, 9, {"model.layers=3"}},
      {"L = 3, learned phi, sigmoid", 61, 9, {"model.layers=3", "nsa.phi=\"mlp\"", "model.gate=\"sigmoid\""}},
      {"only cmp", 61, 5, {"run.force_branch=\"cmp\""}},
      {"only sel", 61, 5, {"run.force_branch=\"sel\""}},
      {"only win", 61, 5, {"run.force_branch=\"win\""}},
      {"chunks of 1 block", 143, 7, {"parallel.kv_chunk_blocks=1"}},
      {"chunks of 2 blocks", 143, 7, {"parallel.kv_chunk_blocks=2"}},
      {"all modes", 61, 9, {"run.modes=[\"branches\", \"total\", \"ablation\", \"one_hot\"]"}},
      {"bf16", 143, 7, {"model.precision=\"bf16\""}},
      {"bf16, T = 1", 1, 21, {"model.precision=\"bf16\""}},
      {"bf16, h = 5, Dk != Dv, B = 3",
       61,
       5,
       {"model.precision=\"bf16\"", "model.n_heads=10", "model.d_v=24", "run.batch=3"}},
      {"bf16, learned phi, sigmoid", 117, 9, {"model.precision=\"bf16\"", "nsa.phi=\"mlp\"", "model.gate=\"sigmoid\""}},
      {"bf16, shared_kv, l = l', n_init = 0",
       117,
       9,
       {"model.precision=\"bf16\"", "model.shared_kv=true", "nsa.l=16", "nsa.n_init=0"}},
      {"bf16, 16/8/32, w = 1", 259, 9, {"model.precision=\"bf16\"", "nsa.l=16", "nsa.d=8", "nsa.l_sel=32", "nsa.w=1"}},
      {"bf16, L = 3", 61, 9, {"model.precision=\"bf16\"", "model.layers=3"}},
      {"bf16, chunks of 1 block", 117, 9, {"model.precision=\"bf16\"", "parallel.kv_chunk_blocks=1"}},
      {"fp16", 143, 7, {"model.precision=\"fp16\""}},
      {"FP8, bf16", 143, 7, {"model.precision=\"bf16\"", fp8_kv, fp8_cmp}},
      {"FP8, shared_kv", 117, 9, {"model.shared_kv=true", fp8_kv, fp8_cmp}},
      {"FP8, learned phi, L = 2, sel and win", 61, 9, {"nsa.phi=\"mlp\"", "model.layers=2", fp8_kv}},
      {"fp16, learned phi, h = 1", 61, 9, {"model.precision=\"fp16\"", "nsa.phi=\"mlp\"", "model.n_heads=2"}},
  };
  return shapes;
}

namespace {

/// Every head count a group and every head size that the CUDA decode kernels pad, once each.
void add_heads_and_sizes(std::vector<Shape>& to) {
  const int heads[] = {1, 3, 5, 7, 12, 17, 24, 32, 48, 64, 128}, sizes[] = {16, 48, 80, 96, 112, 160, 192, 224, 256};
  for (std::size_t i = 0; i < std::size(heads); ++i) {
    const std::string h = std::to_string(heads[i]), d = std::to_string(sizes[i % std::size(sizes)]);
    to.push_back({"bf16, h = " + h + ", D = " + d,
                  117,
                  5,
                  {"model.precision=\"bf16\"", "model.n_kv_groups=1", "model.n_heads=" + h, "model.d_k=" + d,
                   "model.d_v=" + d}});
  }
}

}  // namespace

const std::vector<Shape>& attention_shapes() {
  static const std::vector<Shape> shapes = [] {
    std::vector<Shape> all = {
        {"T no multiple of d or l'", 143, 7, {}},
        {"T = 1", 1, 21, {}},
        {"B = 3, h = 5, Dk != Dv", 61, 9, {"run.batch=3", "model.n_heads=10", "model.d_v=24"}},
        {"16/8/32, n_init = 0", 259, 9, {"nsa.l=16", "nsa.d=8", "nsa.l_sel=32", "nsa.n_init=0"}},
        {"shared_kv, w > T", 117, 9, {"model.shared_kv=true", "nsa.w=512"}},
        {"chunks of 1 block", 117, 9, {"parallel.kv_chunk_blocks=1"}},
        {"bf16", 143, 7, {"model.precision=\"bf16\""}},
        {"fp16, l = d", 117, 5, {"model.precision=\"fp16\"", "nsa.l=4"}},
        {"FP8", 143, 7, {fp8_kv, fp8_cmp}},
        {"FP8, sel and win, T = 1", 1, 21, {fp8_kv, "run.check=true"}},
        {"FP8, cmp, bf16", 143, 7, {fp8_cmp, "model.precision=\"bf16\"", "run.check=true"}},
        {"FP8, bf16, B = 3, h = 5, Dk != Dv",
         61,
         9,
         {fp8_kv, fp8_cmp, "model.precision=\"bf16\"", "run.batch=3", "model.n_heads=10", "model.d_v=24"}},
        {"FP8, shared_kv, w > T, d_k = 128",
         117,
         9,
         {fp8_kv, fp8_cmp, "model.precision=\"bf16\"", "model.shared_kv=true", "nsa.w=512", "model.d_k=128",
          "model.d_v=128", "run.check=true"}},
        {"FP8, chunks of 1 block", 117, 9, {fp8_kv, fp8_cmp, "parallel.kv_chunk_blocks=1"}},
        {"FP8, the paper's blocks, d_k = 128",
         613,
         5,
         {fp8_kv, fp8_cmp, "model.precision=\"bf16\"", "nsa.l=32", "nsa.d=16", "nsa.l_sel=64", "nsa.n_sel=8",
          "nsa.w=512", "model.n_heads=4", "model.d_k=128", "model.d_v=128", "run.check=true"}},
    };
    add_heads_and_sizes(all);
    return all;
  }();
  return shapes;
}

}  // namespace parity
