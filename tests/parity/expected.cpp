#include "parity/expected.hpp"

#include <cmath>
#include <numbers>

#include "catch.hpp"

namespace parity {

using oracle::Options;
using oracle::Reals;

Options options_of(const Phase& phase) {
  Options options = parity::options_of(phase.config);
  if (phase.config.run.backend != nsa::BackendChoice::cuda) return options;
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    options.rounds_p[c] =
        phase.record.routes[c] == "masked" || phase.record.route_kernels[c].find("sdpa_gemm") != std::string::npos;
  return options;
}

namespace {

oracle::Layer expect(const Phase& phase, const Options& options, const std::optional<oracle::Chosen>& chosen) {
  if (phase.config.run.scope == nsa::Scope::layer)
    return oracle::run(options, weights_of(phase.config, phase.record), reals(phase.record, "x"), chosen).layers.back();
  oracle::Layer layer;
  layer.projected = given_of(phase.config, phase.record);
  layer.attended = oracle::attend(options, {}, {}, layer.projected, chosen);
  return layer;
}

/// The standard deviation of a normal error of which `one` and `other` differ by a sample.
Reals deviation_of(const Reals& one, Reals other) {
  for (std::size_t i = 0; i < other.values.size(); ++i)
    other.values[i] = std::abs(other.values[i] - one.values[i]) * std::sqrt(std::numbers::pi / 2);
  return other;
}

}  // namespace

oracle::Layer expect(const Phase& phase, const std::optional<oracle::Chosen>& chosen) {
  return expect(phase, options_of(phase), chosen);
}

bool rounds_weights(const Phase& phase, int c, Against against) {
  const Options options = options_of(phase);
  if (phase.config.run.backend != nsa::BackendChoice::cuda || options.storage == oracle::Storage::fp32) return false;
  bool rounds = against == Against::layout && options.rounds_p[c];
  for (const char* name :
       {"step", "tokens", "shard", "decode", "tiled", "rows", "flash", "sdpa_split_kv", "sdpa_cudnn"})
    rounds |= phase.record.route_kernels[c].find(name) != std::string::npos;
  return rounds;
}

Reals moves_of(const Phase& phase, const oracle::Attended& attended, int c, Against against) {
  if (!rounds_weights(phase, c, against)) return Reals(attended.rounding[c].shape);
  REQUIRE(phase.config.model.layers == 1);  // moves_by_name takes several
  return attended.rounding[c];
}

Reals moves_of_sum(const Phase& phase, const oracle::Layer& layer, Against against) {
  const Options o = options_of(phase);
  Reals sum(layer.attended.o.shape);
  for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
    const Reals moves = moves_of(phase, layer.attended, c, against);
    for (std::int64_t b = 0; b < o.batch; ++b)
      for (std::int64_t t = 0; t < o.tokens; ++t)
        for (std::int64_t head = 0; head < o.heads; ++head)
          for (std::int64_t e = 0; e < o.d_v; ++e)
            sum(b, t, head, e) = std::hypot(
                sum(b, t, head, e), layer.projected.gate(b, t, head / (o.heads / o.groups), c) * moves(b, t, head, e));
  }
  return sum;
}

std::map<std::string, Reals> moves_by_name(const Phase& phase, const oracle::Layer& expected,
                                           const std::optional<oracle::Chosen>& chosen) {
  const char* names[] = {"o_cmp", "o_sel", "o_win"};
  std::map<std::string, Reals> moves;
  Options rounded = options_of(phase);
  bool rounds = false;
  for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
    rounds |= rounds_weights(phase, c);
    rounded.rounds_p[c] |= rounds_weights(phase, c);
  }
  if (!rounds) return moves;
  if (phase.config.model.layers == 1) {
    for (const int c : {oracle::cmp, oracle::sel, oracle::win}) moves[names[c]] = moves_of(phase, expected.attended, c);
    moves["o"] = moves_of_sum(phase, expected);
    return moves;
  }
  const oracle::Layer other = expect(phase, rounded, chosen);
  const oracle::Attended &a = expected.attended, &b = other.attended;
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    moves[names[c]] = deviation_of(a.o_branch[c], b.o_branch[c]);
  moves["o"] = deviation_of(a.o, b.o);
  moves["p_slc"] = deviation_of(a.p_slc, b.p_slc);
  moves["k_cmp_tokens"] = deviation_of(a.k_cmp_tokens, b.k_cmp_tokens);
  moves["v_cmp_tokens"] = deviation_of(a.v_cmp_tokens, b.v_cmp_tokens);
  moves["q"] = deviation_of(expected.projected.q, other.projected.q);
  moves["gate"] = deviation_of(expected.projected.gate, other.projected.gate);
  moves["y"] = deviation_of(expected.y, other.y);
  return moves;
}

}  // namespace parity
