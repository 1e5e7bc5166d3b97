#include "nsa/config/parts.hpp"

namespace nsa {

Part decode_rows_of(const Config& mixed, const Point& point) {
  Part part{mixed, point};
  part.config.kind = TaskKind::decode;
  part.config.run.prefix = part.config.run.prefill_chunk = 0;
  return part;
}

Part prefill_chunk_of(const Config& mixed, const Point& point) {
  Part part{mixed, {.context = mixed.run.prefill_chunk, .batch = 1, .force_branch = point.force_branch}};
  Config& c = part.config;
  c.kind = TaskKind::prefill;
  c.run.context = {mixed.run.prefill_chunk};
  c.run.batch = c.run.query_tokens = {1};
  c.run.accept = 1;
  c.run.prefill_chunk = 0;  // the chunk as a whole
  c.batch = {};
  c.cache.shared_prefix = 0;  // there is one sequence
  return part;
}

std::vector<Part> parts_of(const Config& config, const Point& point) {
  if (config.kind != TaskKind::mixed) return {{config, point}};
  return {decode_rows_of(config, point), prefill_chunk_of(config, point)};
}

}  // namespace nsa
