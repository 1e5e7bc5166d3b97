// The oracle against cases computed by hand.

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "oracle/oracle.hpp"

namespace {

using oracle::Integers;
using oracle::Options;
using oracle::Reals;
using oracle::Storage;

/// One head, one group, Dk = 2, Dv = 1; q = k = 0, so that every attention is an average; v[t] = t + 1.
oracle::Projected uniform(const Options& o) {
  oracle::Projected p;
  p.q = Reals({o.batch, o.tokens, o.heads, o.d_k});
  for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
    p.k[c] = Reals({o.batch, o.tokens, o.groups, o.d_k});
    p.v[c] = Reals({o.batch, o.tokens, o.groups, o.d_v});
    for (std::int64_t b = 0; b < o.batch; ++b)
      for (std::int64_t t = 0; t < o.tokens; ++t)
        for (std::int64_t g = 0; g < o.groups; ++g) p.v[c](b, t, g, 0) = static_cast<double>(t + 1);
  }
  p.gate = Reals({o.batch, o.tokens, o.groups, 3}, 1.0);
  return p;
}

Options tiny(std::int64_t tokens) {
  Options o;
  o.tokens = tokens;
  o.dim = 2;
  o.heads = o.groups = 1;
  o.d_k = 2;
  o.d_v = 1;
  o.l = 2;
  o.d = 1;
  o.l_sel = 2;
  o.n_sel = 1;
  o.n_init = 0;
  o.n_local = 1;
  o.w = 3;
  return o;
}

/// Weights that give q = k = x, v = x[0], no gate logits, y = (o, 0).
oracle::Weights plain() {
  oracle::Weights w;
  const Reals identity({2, 2}, std::vector<double>{1, 0, 0, 1});
  w.w_q = identity;
  for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
    w.w_k[c] = identity;
    w.w_v[c] = Reals({2, 1}, std::vector<double>{1, 0});
  }
  w.w_o = Reals({1, 2}, std::vector<double>{1, 0});
  w.gate_w1 = Reals({2, 1});
  w.gate_b1 = Reals({1});
  w.gate_w2 = Reals({1, 3});
  w.gate_b2 = Reals({3});
  return w;
}

std::vector<std::int64_t> selected_at(const oracle::Attended& a, std::int64_t t) {
  std::vector<std::int64_t> blocks;
  for (std::int64_t c = 0; c < a.selected.shape[3]; ++c) blocks.push_back(a.selected(0, t, 0, c));
  return blocks;
}

oracle::Attended attend(const Options& o, const oracle::Projected& p, std::optional<oracle::Chosen> chosen = {}) {
  return oracle::attend(o, {}, {}, p, chosen);
}

}  // namespace

TEST_CASE("oracle rounds to nearest, ties to even", "[oracle]") {
  CHECK(oracle::round_to(Storage::bf16, 1 + std::ldexp(1, -8)) == 1);
  CHECK(oracle::round_to(Storage::bf16, 1 + std::ldexp(3, -8)) == 1 + std::ldexp(1, -6));
  CHECK(oracle::round_to(Storage::bf16, -(1 + std::ldexp(1.01, -8))) == -(1 + std::ldexp(1, -7)));
  CHECK(oracle::round_to(Storage::fp16, 65519) == 65504);
  CHECK(oracle::round_to(Storage::fp16, 65520) == std::numeric_limits<double>::infinity());
  CHECK(oracle::round_to(Storage::fp16, std::ldexp(1, -25)) == 0);
  CHECK(oracle::round_to(Storage::fp16, std::ldexp(3, -26)) == std::ldexp(1, -24));
  CHECK(oracle::round_to(Storage::fp32, 0.1) == static_cast<double>(0.1f));
  CHECK(oracle::round_to(Storage::exact, 0.1) == 0.1);
  CHECK(oracle::unit_roundoff(Storage::bf16) == std::ldexp(1, -8));
}

TEST_CASE("oracle overlap weights are 1,2,2,2,1 at the paper's sizes", "[oracle]") {
  const Options o;
  const double expected[] = {0, 1, 2, 2, 2, 1, 0};
  for (int i = 2; i < 9; ++i) CHECK(oracle::overlap(o, i, 1) == expected[i - 2]);
  CHECK(oracle::overlap(o, 0, 0) == 2);
  CHECK(oracle::overlap(o, 3, 0) == 1);
  Options equal;
  equal.l = equal.d = equal.l_sel = 4;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) CHECK(oracle::overlap(equal, i, j) == (i == j ? 1 : 0));
}

TEST_CASE("oracle averages V when every score is equal", "[oracle]") {
  const Options o = tiny(4);
  const oracle::Attended a = attend(o, uniform(o));
  CHECK(a.v_cmp_tokens.shape == std::vector<std::int64_t>{1, 3, 1, 1});
  for (int i = 0; i < 3; ++i) CHECK(a.v_cmp_tokens(0, i, 0, 0) == Approx(i + 1.5));

  CHECK(a.o_branch[oracle::cmp](0, 0, 0, 0) == 0);  // no token has both positions
  CHECK(a.o_branch[oracle::cmp](0, 3, 0, 0) == Approx(2.5));
  CHECK(a.o_branch[oracle::sel](0, 3, 0, 0) == Approx(3.5));  // block 1: positions 2, 3
  CHECK(a.o_branch[oracle::sel](0, 2, 0, 0) == Approx(3));    // of block 1 only position 2 is valid
  CHECK(a.o_branch[oracle::win](0, 3, 0, 0) == Approx(3));    // positions 1, 2, 3
  CHECK(a.o_branch[oracle::win](0, 1, 0, 0) == Approx(1.5));
  CHECK(a.o(0, 3, 0, 0) == Approx(9));

  // Tokens 0, 1, 2 with probability 1/3; half of token 1 is in each block.
  CHECK(a.p_slc(0, 3, 0, 0) == Approx(1));
  CHECK(a.p_slc(0, 3, 0, 1) == Approx(1));
  CHECK(a.p_slc(0, 1, 0, 0) == Approx(2));
}

TEST_CASE("oracle rounds P of a branch after its softmax sum", "[oracle]") {
  Options o = tiny(3);
  o.storage = Storage::bf16;
  oracle::Projected p = uniform(o);
  p.q(0, 2, 0, 0) = std::sqrt(2.0);
  p.k[oracle::win](0, 1, 0, 0) = -1;  // scores at t = 2: 0, -1, 0
  const double p_1 = std::exp(-1.0), sum = 2 + p_1, rounded = oracle::round_to(Storage::bf16, p_1);
  REQUIRE(rounded != p_1);
  const auto at_2 = [&] { return attend(o, p).o_branch[oracle::win](0, 2, 0, 0); };
  CHECK(at_2() == Approx((1 + 2 * p_1 + 3) / sum).epsilon(1e-14));
  o.rounds_p[oracle::sel] = true;
  CHECK(at_2() == Approx((1 + 2 * p_1 + 3) / sum).epsilon(1e-14));
  o.rounds_p[oracle::win] = true;
  CHECK(at_2() == Approx((1 + 2 * rounded + 3) / sum).epsilon(1e-14));
}

TEST_CASE("oracle gives the standard deviation of an output under rounded P", "[oracle]") {
  Options o = tiny(3);
  o.storage = Storage::bf16;
  const auto deviation = attend(o, uniform(o)).rounding[oracle::win];  // a third each of 1, 2, 3 at t = 2
  CHECK(deviation(0, 2, 0, 0) == Approx(std::ldexp(1, -8) / std::sqrt(3) * std::sqrt(14) / 3).epsilon(1e-14));
  CHECK(deviation(0, 0, 0, 0) == Approx(std::ldexp(1, -8) / std::sqrt(3)).epsilon(1e-14));
}

TEST_CASE("oracle importance follows the scores and sums over heads", "[oracle]") {
  Options o = tiny(4);
  o.heads = 2;
  oracle::Projected p = uniform(o);
  for (int t = 0; t < 4; ++t) p.k[oracle::cmp](0, t, 0, 0) = t == 3 ? 2 * std::sqrt(2.0) * std::log(2.0) : 0;
  p.q(0, 3, 0, 0) = 1;  // compressed keys 0, 0, sqrt(2) log 2: head 0 sees 1/4, 1/4, 1/2, head 1 thirds
  const oracle::Attended a = attend(o, p);
  CHECK(a.p_slc(0, 3, 0, 0) == Approx(0.75 + 1));
  CHECK(a.p_slc(0, 3, 0, 1) == Approx(1.25 + 1));
  CHECK(a.o_branch[oracle::cmp](0, 3, 0, 0) == Approx(1.5 / 4 + 2.5 / 4 + 3.5 / 2));
}

TEST_CASE("oracle selects forced blocks, then the best, ties to the lower index", "[oracle]") {
  Options o = tiny(12);
  o.l = o.d = o.l_sel = 2;
  o.n_sel = 3;
  o.n_init = 1;
  o.n_local = 1;
  using Blocks = std::vector<std::int64_t>;
  oracle::Projected p = uniform(o);
  const oracle::Attended tied = attend(o, p);
  CHECK(selected_at(tied, 0) == Blocks{0, -1, -1});
  CHECK(selected_at(tied, 5) == Blocks{0, 1, 2});  // all eligible blocks
  CHECK(selected_at(tied, 11) == Blocks{0, 1, 5});
  for (int t = 0; t < 12; ++t) p.q(0, t, 0, 0) = 1;
  p.k[oracle::cmp](0, 6, 0, 0) = 1;
  CHECK(selected_at(attend(o, p), 11) == Blocks{0, 3, 5});
  CHECK(selected_at(attend(o, p), 6) == Blocks{0, 1, 3});  // block 3 is the recent one
  o.n_init = 0;
  CHECK(selected_at(attend(o, p), 11) == Blocks{0, 3, 5});
  o.n_local = 2;
  CHECK(selected_at(attend(o, p), 11) == Blocks{3, 4, 5});
}

TEST_CASE("oracle attends given blocks in place of its own", "[oracle]") {
  const Options o = tiny(4);
  const oracle::Chosen first{Integers({1, 1, 1, 1}, 0), 3};
  const oracle::Attended a = attend(o, uniform(o), first);
  CHECK(a.o_branch[oracle::sel](0, 3, 0, 0) == Approx(1.5));
  CHECK(a.o_branch[oracle::sel](0, 2, 0, 0) == Approx(3));  // before first_position: its own
  CHECK(a.selected(0, 3, 0, 0) == 1);
}

TEST_CASE("oracle counts the reads at contexts 128 to 1024", "[oracle]") {
  Options o;
  o.heads = o.groups = 1;
  o.d_k = 2;
  o.d_v = 1;
  o.tokens = 1024 + 32;
  const oracle::Attended a = attend(o, uniform(o));
  const std::int64_t context[] = {128, 256, 512, 1024}, total[] = {329, 593, 1089, 1569};
  for (int i = 0; i < 4; ++i) {
    std::int64_t sum = 0;
    for (int c = 0; c < 3; ++c) sum += a.reads(0, context[i] + 31, 0, c);
    CHECK(sum == total[i]);
  }
  CHECK(a.reads(0, 30, 0, oracle::cmp) == 0);
  CHECK(a.reads(0, 31, 0, oracle::cmp) == 1);
  CHECK(a.reads(0, 47, 0, oracle::cmp) == 2);
}

TEST_CASE("oracle rotates by position and averages q for the gates", "[oracle]") {
  const Options o = tiny(3);
  Reals x({1, 3, 2});
  for (int t = 0; t < 3; ++t) x(0, t, 0) = 1;
  oracle::Weights w = plain();
  const oracle::Projected p = oracle::project(o, w, x);
  for (int t = 0; t < 3; ++t) {
    CHECK(p.q(0, t, 0, 0) == Approx(std::cos(t)));
    CHECK(p.q(0, t, 0, 1) == Approx(std::sin(t)).margin(1e-15));
    CHECK(p.v[oracle::win](0, t, 0, 0) == 1);
    for (int c = 0; c < 3; ++c) CHECK(p.gate(0, t, 0, c) == Approx(1.0 / 3));
  }
  w.gate_w1 = Reals({2, 1}, std::vector<double>{1, 0});
  w.gate_w2 = Reals({1, 3}, std::vector<double>{0, 1, 0});
  w.gate_b2(0) = 0.5;
  const double silu = 1 / (1 + std::exp(-1.0));
  const double sum = std::exp(0.5) + std::exp(silu) + 1;
  CHECK(oracle::project(o, w, x).gate(0, 0, 0, oracle::cmp) == Approx(std::exp(0.5) / sum));
  Options sigmoid = o;
  sigmoid.sigmoid_gate = true;
  CHECK(oracle::project(sigmoid, w, x).gate(0, 0, 0, oracle::sel) == Approx(1 / (1 + std::exp(-silu))));
  Options forced = o;
  forced.force_branch = oracle::win;
  CHECK(oracle::project(forced, w, x).gate(0, 0, 0, oracle::win) == 1);
  CHECK(oracle::project(forced, w, x).gate(0, 0, 0, oracle::cmp) == 0);
}

TEST_CASE("oracle rotates the pairs of a wider head by falling frequencies", "[oracle]") {
  Options o = tiny(4);
  o.d_k = 4;
  o.rope_base = 100;
  oracle::Weights w = plain();
  w.w_q = w.w_k[0] = w.w_k[1] = w.w_k[2] = Reals({2, 4}, std::vector<double>{1, 0, 1, 0, 0, 0, 0, 0});
  w.gate_w1 = Reals({4, 2});
  w.gate_b1 = Reals({2});
  w.gate_w2 = Reals({2, 3});
  Reals x({1, 4, 2});
  x(0, 3, 0) = 1;
  const oracle::Projected p = oracle::project(o, w, x);
  const double expected[] = {std::cos(3.0), std::sin(3.0), std::cos(0.3), std::sin(0.3)};
  for (int e = 0; e < 4; ++e) CHECK(p.k[oracle::sel](0, 3, 0, e) == Approx(expected[e]));
}

TEST_CASE("oracle learned compression is W2 SiLU(W1 (k + pos))", "[oracle]") {
  Options o = tiny(3);
  o.mlp_phi = true;
  oracle::Projected p = uniform(o);
  oracle::PhiWeights phi_k{Reals({2, 2}), Reals({4, 1}), Reals({1, 2})};
  oracle::PhiWeights phi_v{Reals({2, 1}, std::vector<double>{10, 20}), Reals({2, 1}, std::vector<double>{1, -1}),
                           Reals({1, 1}, std::vector<double>{3})};
  const oracle::Attended a = oracle::attend(o, phi_k, phi_v, p);
  const double inner = (2 + 10) - (3 + 20);  // token 1: v = 2, 3
  CHECK(a.v_cmp_tokens(0, 1, 0, 0) == Approx(3 * inner / (1 + std::exp(-inner))));
  CHECK(a.k_cmp_tokens(0, 1, 0, 1) == 0);
}

TEST_CASE("oracle adds normalised layers to a residual stream; one layer has no residual", "[oracle]") {
  Options o = tiny(1);
  Reals x({1, 1, 2});
  x(0, 0, 0) = 3;
  x(0, 0, 1) = 4;
  const double third = 1.0 / 3;  // no compressed token yet: two of three equal gates see v
  const oracle::Result one = oracle::run(o, {plain()}, x);
  CHECK(one.x(0, 0, 0) == Approx(2 * third * 3));
  CHECK(one.x(0, 0, 1) == 0);
  o.layers = 2;
  const oracle::Result two = oracle::run(o, {plain(), plain()}, x);
  const double first = 3 + 2 * third * 3 / std::sqrt(12.5 + 1e-6);
  CHECK(two.layers[0].y(0, 0, 0) == Approx(first - 3));
  CHECK(two.x(0, 0, 0) == Approx(first + 2 * third * first / std::sqrt((first * first + 16) / 2 + 1e-6)));
  CHECK(two.x(0, 0, 1) == 4);
}
