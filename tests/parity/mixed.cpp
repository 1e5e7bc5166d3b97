#include "parity/mixed.hpp"

#include "catch.hpp"

namespace parity {

nsa::Config mixed_config_of(const Shape& shape, std::int64_t prefix, std::int64_t chunk) {
  nsa::Config config = config_of(shape, nsa::TaskKind::decode);
  config.kind = nsa::TaskKind::mixed;
  config.run.prefix = prefix;
  config.run.prefill_chunk = chunk;
  nsa::validate(config);
  return config;
}

void check_parts(const nsa::PointRecord& mixed, const nsa::PointRecord& rows, const nsa::PointRecord& chunk) {
  CHECK(mixed.reason == "");
  CHECK(mixed.valid);
  for (const auto& [prefix, part] : {std::pair{"", &rows}, {"chunk/", &chunk}})
    for (const char* name :
         {"selected", "q", "gate", "p_slc", "o_cmp", "o_sel", "o_win", "o", "k_cmp_tokens", "v_cmp_tokens"}) {
      INFO(prefix << name);
      if (name == std::string("selected")) {
        CHECK(integers(mixed, prefix + std::string(name)).values == integers(*part, name).values);
        continue;
      }
      CHECK(reals(mixed, prefix + std::string(name)).values == reals(*part, name).values);
    }
  CHECK(has(mixed, "y") == has(rows, "y"));
  if (has(rows, "y")) {
    CHECK(reals(mixed, "y").values == reals(rows, "y").values);
    CHECK(reals(mixed, "chunk/y").values == reals(chunk, "y").values);
  }
  CHECK(mixed.reads.steps == rows.reads.steps);
  CHECK(reads_as_expected(mixed));
  for (int c = 0; c < nsa::branches; ++c)
    for (std::int64_t step = 0; step < mixed.reads.steps; ++step)
      CHECK(counted_reads(mixed, c, step) == counted_reads(rows, c, step) + counted_reads(chunk, c, 0));
}

}  // namespace parity
