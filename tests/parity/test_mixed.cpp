// Mixed steps: decode rows and a prefill chunk together give what each gives alone, and that agrees with the oracle.

#include "catch.hpp"
#include "nsa/config/parts.hpp"
#include "parity/mixed.hpp"

using namespace parity;

namespace {

struct Mixed {
  Shape rows;  ///< context and steps of the decode rows
  std::int64_t prefix, chunk;
};

std::vector<Mixed> mixed_steps() {
  const char *batch = "run.batch=3", *bf16 = "model.precision=\"bf16\"", *ragged = "batch.context=[1, 143, 5, 300, 61]",
             *paged = "cache.layout=\"paged\"", *page_16 = "cache.page=16", *shuffled = "cache.order=\"shuffled\"",
             *attention = "run.scope=\"attention\"", *two_layers = "model.layers=2";
  return {
      {{"B = 3", 143, 5, {batch}}, 90, 41},
      {{"L = 2, bf16, no prefix", 61, 4, {two_layers, bf16, "run.batch=2"}}, 0, 64},
      {{"L = 2, learned phi, P < l", 29, 6, {two_layers, "nsa.phi=\"mlp\""}}, 5, 30},
      {{"attention, a chunk of one token", 143, 5, {attention, batch}}, 97, 1},
      {{"shared_kv, sigmoid, T = 1", 1, 9, {"model.shared_kv=true", "model.gate=\"sigmoid\""}}, 96, 33},
      {{"filled directly", 143, 5, {batch, "run.fill=\"synthetic\""}}, 90, 41},
      {{"sdpa", 143, 4, {"route.cmp=\"sdpa\"", "route.sel=\"sdpa\"", "route.win=\"sdpa\""}}, 90, 41},
      {{"FP8, paged", 143, 4, {batch, fp8_kv, fp8_cmp, paged, page_16, shuffled}}, 90, 41},
      {{"ragged, paged, L = 2, a shared prefix that ends in a block",
        0,
        4,
        {"batch.context=[80, 143, 300]", paged, page_16, shuffled, two_layers, "cache.shared_prefix=75"}},
       101,
       41},
      {{"ragged, paged, 4 query tokens, some rejected, fp16",
        0,
        4,
        {ragged, paged, page_16, shuffled, "run.query_tokens=4", "run.accept=0.5", "model.precision=\"fp16\""}},
       101,
       41},
  };
}

}  // namespace

TEST_CASE("a mixed step gives what its decode rows and its chunk give alone", "[parity][mixed]") {
  for (Mixed m : mixed_steps()) DYNAMIC_SECTION(m.rows.name) {
      m.rows.overrides.push_back("run.check=true");
      m.rows.overrides.push_back("run.modes=[\"total\", \"branches\"]");
      const nsa::Config config = mixed_config_of(m.rows, m.prefix, m.chunk);
      const nsa::Point point = nsa::sweep(config).at(0);
      nsa::Config once = nsa::prefill_chunk_of(config, point).config;
      once.run.steps = 1;
      const Phase mixed = run_phase(config), rows = run_phase(nsa::decode_rows_of(config, point).config),
                  chunk = run_phase(once);
      const bool of_x = config.run.fill == nsa::CacheFill::prefill;  // the oracle knows no other caches
      if (of_x && point.query_tokens == 1) check_phase(rows);
      if (of_x) check_phase(chunk);
      check_parts(mixed.record, rows.record, chunk.record);
      CHECK(mixed.record.memory.measured_peak == mixed.record.memory.planned);
      CHECK(mixed.record.fallbacks.empty());
      CHECK(mixed.record.routes == rows.record.routes);
      CHECK(mixed.record.chunk.routes == chunk.record.routes);
      for (std::size_t i = 0; i < mixed.record.bytes.size(); ++i)
        CHECK(mixed.record.bytes[i] == rows.record.bytes[i] + chunk.record.bytes[i]);
    }
}
