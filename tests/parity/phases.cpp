#include "parity/phases.hpp"

#include <algorithm>
#include <cfloat>
#include <optional>
#include <utility>

#include "catch.hpp"
#include "nsa/report/metrics.hpp"
#include "parity/compare.hpp"

namespace parity {

using oracle::Options;
using oracle::Reals;

Phase run_phase(const nsa::Config& config) { return {config, run(config, nsa::ControlComm::world())}; }
Phase run_phase(const Shape& shape, nsa::TaskKind kind) { return run_phase(config_of(shape, kind)); }

namespace {

std::int64_t first_row_of(const nsa::Config& config) {
  return config.kind == nsa::TaskKind::decode ? nsa::sweep(config).at(0).longest() : config.run.prefix;
}

void check_reads(const Phase& phase, const oracle::Attended& expected) {
  const Options o = options_of(phase);
  const bool decode = phase.config.kind == nsa::TaskKind::decode;
  CHECK(reads_as_expected(phase.record));
  for (const int c : {oracle::cmp, oracle::sel, oracle::win})
    for (std::int64_t step = 0; step < phase.config.run.steps; ++step) {
      std::int64_t sum = 0;
      for (std::int64_t t = 0; t < o.tokens; ++t)
        for (std::int64_t plane = 0; plane < o.batch * o.groups; ++plane)
          if (decode ? t == first_of(phase.record)(plane / o.groups) + step : t >= first_row_of(phase.config))
            sum += o.layers * expected.reads(plane / o.groups, t, plane % o.groups, c);
      CHECK(counted_reads(phase.record, c, step) == sum);
    }
}

/// The compressed tokens of every sequence up to its own last position, then zeros.
Reals completed(const Phase& phase, Reals tokens) {
  const nsa::Point point = nsa::sweep(phase.config).at(0);
  for (std::int64_t b = 0; point.ragged() && b < point.batch; ++b) {
    const std::int64_t valid = nsa::compressed_tokens(phase.config.nsa, point.length(b) + phase.config.run.steps - 1),
                       width = tokens.shape[2] * tokens.shape[3];
    const auto of_sequence = tokens.values.begin() + b * tokens.shape[1] * width;
    std::fill(of_sequence + valid * width, of_sequence + tokens.shape[1] * width, 0.0);
  }
  return tokens;
}

}  // namespace

Moves check_phase(const Phase& phase) {
  const Options options = options_of(phase);
  const std::int64_t first = phase.record.first_position;
  CHECK(phase.record.valid);
  CHECK(phase.record.fallbacks.empty());
  for (int c = 0; c < nsa::branches; ++c) {
    const std::string& asked = phase.config.route.implementation[c];
    CHECK((asked == "auto" || asked == phase.record.routes[c]));
  }
  CHECK(first == first_row_of(phase.config));
  std::optional<oracle::Chosen> chosen;
  oracle::Layer expected = expect(phase);
  const oracle::Integers selected = integers(phase.record, "selected");
  const SelectionDifference difference =
      check_selection(options, selected, recorded_rows(phase, expected.attended.selected),
                      recorded_rows(phase, expected.attended.p_slc), first_of(phase.record));
  const bool ragged = !phase.record.batch.lengths.empty();
  if (ragged) {
    CHECK(difference.differing == 0);  // the oracle takes chosen blocks from one position on only
  } else if (difference.differing > 0) {
    chosen = {selected, first};
    expected = expect(phase, chosen);
  }

  const Bound bound = bound_of(options);
  const oracle::Attended& a = expected.attended;
  const std::map<std::string, Reals> deviations = moves_by_name(phase, expected, chosen);
  Moves moves;
  const auto check_all = [&](const char* name, const Reals& values, const auto& rows) {
    const auto found = deviations.find(name);
    const Bound wider = found == deviations.end() ? bound : moved(bound, values, rows(found->second));
    check_close(name, reals(phase.record, name), values, wider);
    moves[name] = wider.mean - bound.mean;
  };
  const auto check = [&](const char* name, const Reals& all) {
    check_all(name, recorded_rows(phase, all), [&](const Reals& by) { return recorded_rows(phase, by); });
  };
  for (const auto& [name, tokens] : {std::pair{"k_cmp_tokens", &a.k_cmp_tokens}, {"v_cmp_tokens", &a.v_cmp_tokens}})
    check_all(name, completed(phase, *tokens), [&](const Reals& by) { return completed(phase, by); });
  check("p_slc", a.p_slc);
  check("o_cmp", a.o_branch[oracle::cmp]);
  check("o_sel", a.o_branch[oracle::sel]);
  check("o_win", a.o_branch[oracle::win]);
  check("o", a.o);
  if (phase.config.run.scope == nsa::Scope::layer) {
    check("q", expected.projected.q);
    check("gate", expected.projected.gate);
    // Where o of the only layer has changed, y is compared with the product of the recorded o.
    Options recorded = options;
    recorded.tokens = options.tokens - first;
    if (options.layers > 1 || moves["o"] == 0)
      check("y", expected.y);
    else
      check_close("y", reals(phase.record, "y"),
                  oracle::output(recorded, weights_of(phase.config, phase.record).back().w_o, reals(phase.record, "o")),
                  bound);
  }
  check_reads(phase, a);
  return moves;
}

void check_continuation(const Phase& prefill, const Phase& decode, const Moves& moves) {
  const Options options = options_of(prefill);
  const std::int64_t first = decode.record.first_position, rows = options.tokens - first;
  const oracle::Integers selected = integers(decode.record, "selected");
  const SelectionDifference difference =
      check_selection(options, selected, rows_of(integers(prefill.record, "selected"), first, rows),
                      rows_of(reals(prefill.record, "p_slc"), first, rows), first);
  const bool layer = prefill.config.run.scope == nsa::Scope::layer;
  const Bound one = bound_of(options);
  const auto compare = [&](const char* name, const Reals& decoded, const Reals& all, const Reals& prefilled) {
    const double units = 1 + largest_of(all) / std::max(largest_of(prefilled), DBL_MIN);
    const auto found = moves.find(name);
    check_close(name, decoded, prefilled,
                {units * one.largest, units * one.mean + (found == moves.end() ? 0 : found->second)});
  };
  const bool compares_y = layer && (options.layers > 1 || moves.at("o") == 0);
  for (const char* name : {"q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", compares_y ? "y" : "o"}) {
    // Other blocks, chosen in a tie, have another output.
    const bool follows_selection = std::string(name) == "o_sel" || std::string(name) == "y" || std::string(name) == "o";
    if (difference.differing > 0 && follows_selection) continue;
    const Reals all = reals(prefill.record, name);
    compare(name, reals(decode.record, name), all, rows_of(all, first, rows));
  }
  for (const char* name : {"k_cmp_tokens", "v_cmp_tokens"}) {
    const Reals all = reals(prefill.record, name);
    compare(name, reals(decode.record, name), all, all);
  }
}

}  // namespace parity
