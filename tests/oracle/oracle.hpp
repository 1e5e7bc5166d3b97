#pragma once
// Native Sparse Attention (arXiv 2502.11089) in float64, by definition: every sum is a loop over its positions. Shares
// no code with the program. The layer is that of the design, section 2. Arrays are [batch, position, ...] for all
// positions 0 .. tokens-1, weights are [in, out].

#include <optional>
#include <vector>

#include "oracle/array.hpp"
#include "oracle/rounding.hpp"

namespace oracle {

enum Branch { cmp, sel, win };

struct Options {
  std::int64_t batch = 1, tokens = 1, dim = 32, heads = 4, groups = 2, d_k = 8, d_v = 8, layers = 1;
  std::int64_t l = 32, d = 16, l_sel = 64, n_sel = 16, n_init = 1, n_local = 2, w = 512;
  bool sigmoid_gate = false;  ///< else softmax
  bool mlp_phi = false;       ///< else the mean
  bool shared_kv = false;     ///< every branch uses the projections of sel
  double rope_base = 10000;
  int force_branch = -1;  ///< a Branch: one-hot gates
  Storage storage = Storage::exact;
  bool fp8_kv = false,
       fp8_cmp = false;  ///< rows that sel and win attend, compressed tokens: as an FP8 cache holds them
  /// By branch: P = exp(score - max) is rounded to storage before P V; the softmax sum is that of the unrounded P.
  bool rounds_p[3] = {};
};

struct PhiWeights {
  Reals pos;  ///< [l, D]
  Reals w1;   ///< [l*D, hidden]
  Reals w2;   ///< [hidden, D]
};

struct Weights {
  Reals w_q;         ///< [dim, H*Dk]
  Reals w_k[3];      ///< [dim, G*Dk]; with shared_kv only [sel]
  Reals w_v[3];      ///< [dim, G*Dv]
  Reals w_o;         ///< [H*Dv, dim]
  Reals gate_w1;     ///< [Dk, Dk/2]
  Reals gate_b1;     ///< [Dk/2]
  Reals gate_w2;     ///< [Dk/2, 3]
  Reals gate_b2;     ///< [3]
  PhiWeights phi_k;  ///< mlp_phi only
  PhiWeights phi_v;
};

/// Inputs of a layer's attention.
struct Projected {
  Reals q;     ///< [B, T, H, Dk], rotated
  Reals k[3];  ///< [B, T, G, Dk], rotated
  Reals v[3];  ///< [B, T, G, Dv]
  Reals gate;  ///< [B, T, G, 3]
};

struct Attended {
  Reals k_cmp_tokens;  ///< [B, N, G, Dk]
  Reals v_cmp_tokens;  ///< [B, N, G, Dv]
  Reals p_slc;         ///< [B, T, G, blocks]: importance
  Integers selected;   ///< [B, T, G, n], ascending, -1 padded
  Reals o_branch[3];   ///< [B, T, H, Dv]
  /// [B, T, H, Dv]: standard deviation of o_branch when every element of P is rounded to storage once. The relative
  /// error of an element is uniform within a unit roundoff u: its standard deviation is u / sqrt(3). A sum of such p v
  /// has the root of the sum of squares.
  Reals rounding[3];
  Reals o;         ///< [B, T, H, Dv], sum over branches of gate x o_branch
  Integers reads;  ///< [B, T, G, 3]: rows attended
};

struct Layer {
  Projected projected;
  Attended attended;
  Reals y;  ///< [B, T, dim]
};

struct Result {
  std::vector<Layer> layers;
  Reals x;  ///< [B, T, dim] after the last layer; of a one-layer model its y
};

/// Blocks that o_sel attends in place of the oracle's own selection, from `first_position` on.
struct Chosen {
  Integers blocks;  ///< [B, R, G, n], -1 padded
  std::int64_t first_position = 0;
};

/// Positions that compressed token i and selection block j share, divided by d.
double overlap(const Options& options, std::int64_t i, std::int64_t j);

Projected project(const Options& options, const Weights& weights, const Reals& x);
/// phi_k and phi_v are read with mlp_phi only. `selected` is the oracle's own selection also with `chosen`.
Attended attend(const Options& options, const PhiWeights& phi_k, const PhiWeights& phi_v, const Projected& given,
                const std::optional<Chosen>& chosen = {});
/// y = o W_O.
Reals output(const Options& options, const Reals& w_o, const Reals& o);

/// The whole model: x <- x + layer(rmsnorm(x)) with several layers, layer(x) with one. `chosen` applies to the last
/// layer.
Result run(const Options& options, const std::vector<Weights>& weights, const Reals& x,
           const std::optional<Chosen>& chosen = {});

}  // namespace oracle
