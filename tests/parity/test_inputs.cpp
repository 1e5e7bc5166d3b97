// Synthetic inputs are generated in backend memory; a file of them is written from the source on the host. Both must
// have the same bits, or a run could not be repeated from its own tensors.

#include "catch.hpp"
#include "nsa/forward/decode.hpp"
#include "nsa/forward/prefill.hpp"
#include "nsa/model/inputs.hpp"
#include "parity/product.hpp"

namespace {

using namespace nsa;

struct Case {
  Config config;
  Point point;
  Session session;
  TensorSource source;
  ModelShard shard;
  explicit Case(const Config& c)
      : config(c),
        point(sweep(c).at(0)),
        session(open_session(config, ControlComm::world())),
        source(config, ""),
        shard(session.backend, session.world, config, point, source) {}

  /// `buffer` [batch][rows][columns] against the source's rows [first, first + rows).
  bool same(const std::string& name, const Columns& columns, DType type, const Buffer& buffer, std::int64_t first,
            std::int64_t rows) {
    const std::vector<float> wanted = given_rows(source, name, columns, first, rows);
    const std::vector<float> made = download(shard, buffer.data(), std::ssize(wanted), type);
    return made == from_storage(to_storage(wanted, type).data(), wanted.size(), type);
  }
};

const std::vector<parity::Shape> shapes = {
    {"layer", 37, 3, {"run.batch=2"}},
    {"layer, bf16", 37, 3, {"run.batch=2", "model.precision=\"bf16\""}},
    {"two layers, bf16", 37, 3, {"run.batch=2", "model.layers=2", "model.precision=\"bf16\""}},
    {"attention", 37, 3, {"run.batch=2", "run.scope=\"attention\""}},
    {"attention, fp16", 37, 3, {"run.batch=2", "run.scope=\"attention\"", "model.precision=\"fp16\""}},
    {"attention, repeated", 37, 3, {"run.batch=2", "run.scope=\"attention\"", "run.overlap=0.5"}},
    {"shared", 37, 3, {"run.batch=3", "run.scope=\"attention\"", "model.shared_kv=true"}},
};

}  // namespace

TEST_CASE("a prefill's synthetic rows are the source's, bit for bit", "[inputs]") {
  for (const parity::Shape& shape : shapes) {
    INFO(shape.name);
    Case c(parity::config_of(shape, TaskKind::prefill));
    PrefillRunner prefill(c.shard, {0, c.point.context}, false);
    prefill.load_rows(c.source);
    const StepBuffers& b = prefill.buffers();
    const DType storage = c.config.model.precision;
    const bool residual = c.config.model.layers > 1;
    if (c.config.run.scope == Scope::layer) {
      CHECK(c.same("x", x_columns(c.config, c.point), residual ? DType::f32 : storage, residual ? b.x : b.x_in, 0,
                   c.point.context));
      continue;
    }
    const Partition& p = c.shard.partition;
    CHECK(c.same("given/q", q_columns(c.config, c.point, p), storage, b.q, 0, c.point.context));
    CHECK(c.same("given/gate", gate_columns(c.config, c.point, p), DType::f32, b.gate, 0, c.point.context));
  }
}

TEST_CASE("a decode step's synthetic rows are the source's, bit for bit", "[inputs]") {
  for (const parity::Shape& shape : shapes) {
    INFO(shape.name);
    Case c(parity::config_of(shape, TaskKind::decode));
    DecodeRunner decode(c.shard, &c.source, false);
    const StepBuffers& b = decode.buffers();
    const DType storage = c.config.model.precision;
    const bool residual = c.config.model.layers > 1;
    const Partition& p = c.shard.partition;
    for (std::int64_t step = 0; step < c.config.run.steps; ++step) {
      const std::int64_t at = c.point.context + step;
      decode.load(step, {});
      if (c.config.run.scope == Scope::layer) {
        CHECK(
            c.same("x", x_columns(c.config, c.point), residual ? DType::f32 : storage, residual ? b.x : b.x_in, at, 1));
        continue;
      }
      CHECK(c.same("given/q", q_columns(c.config, c.point, p), storage, b.q, at, 1));
      CHECK(c.same("given/gate", gate_columns(c.config, c.point, p), DType::f32, b.gate, at, 1));
      for (const Branch branch : kv_column_order) {
        if (c.config.model.shared_kv && branch != sel) continue;
        const LayerShape& s = c.shard.shape();
        CHECK(c.same(kv_name(s, branch, false), kv_columns(c.config, c.point, p, false), storage, b.k[branch], at, 1));
        CHECK(c.same(kv_name(s, branch, true), kv_columns(c.config, c.point, p, true), storage, b.v[branch], at, 1));
      }
    }
  }
}
