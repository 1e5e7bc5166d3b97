#include "parity/product.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace parity {
namespace {

constexpr const char* base = R"(
[task]
kind = "prefill"
[model]
dim = 32
n_heads = 4
n_kv_groups = 2
d_k = 16
d_v = 16
precision = "fp32"
[nsa]
l = 8
d = 4
l_sel = 16
n_sel = 5
n_init = 1
n_local = 2
w = 24
[run]
backend = "host"
modes = ["total"]
warmup = 0
check = false
[output]
tensors = true
)";

const nsa::TensorRecord* find(const nsa::PointRecord& record, const std::string& name) {
  const auto found = std::find_if(record.tensors.begin(), record.tensors.end(),
                                  [&](const nsa::TensorRecord& tensor) { return tensor.name == name; });
  return found == record.tensors.end() ? nullptr : &*found;
}

const nsa::TensorRecord& tensor(const nsa::PointRecord& record, const std::string& name) {
  if (const nsa::TensorRecord* found = find(record, name)) return *found;
  throw std::runtime_error("the record has no tensor " + name);
}

oracle::PhiWeights phi_of(const nsa::PointRecord& record, const std::string& prefix) {
  return {reals(record, prefix + "_pos"), reals(record, prefix + "_w1"), reals(record, prefix + "_w2")};
}

oracle::Storage storage_of(nsa::DType type) {
  return type == nsa::DType::f32    ? oracle::Storage::fp32
         : type == nsa::DType::bf16 ? oracle::Storage::bf16
                                    : oracle::Storage::fp16;
}

}  // namespace

nsa::Config config_of(const Shape& shape, nsa::TaskKind kind) {
  const bool decode = kind == nsa::TaskKind::decode;
  std::vector<std::string> overrides = shape.overrides;
  overrides.push_back(decode ? "task.kind=\"decode\"" : "task.kind=\"prefill\"");
  const bool ragged =
      std::ranges::any_of(overrides, [](const std::string& o) { return o.starts_with("batch.context"); });
  if (!ragged)
    overrides.push_back("run.context=" + std::to_string(decode ? shape.context : shape.context + shape.steps));
  overrides.push_back("run.steps=" + std::to_string(decode ? shape.steps : 1));
  if (const char* backend = std::getenv("NSA_TEST_BACKEND")) overrides.push_back(std::string("run.backend=") + backend);
  nsa::Config config = nsa::parse_config(base, "test.toml", overrides);
  nsa::validate(config);
  return config;
}

nsa::Config prefix_config_of(const Shape& shape, std::int64_t chunk) {
  nsa::Config config = config_of(shape, nsa::TaskKind::prefill);
  config.run.prefix = shape.context;
  config.run.context = {shape.steps};
  config.run.prefill_chunk = chunk;
  nsa::validate(config);
  return config;
}

nsa::Session open_test_session(const nsa::Config& config, const nsa::ControlComm& group) {
  nsa::Session session = nsa::open_session(config, group);
  session.copy_bytes = std::size_t{64} << 10;
  return session;
}

nsa::PointRecord run(const nsa::Config& config, const nsa::Session& session) {
  return nsa::run_point(session, config, nsa::sweep(config).at(0), 0, [](double, double, const std::string&) {});
}

nsa::PointRecord run(const nsa::Config& config, const nsa::ControlComm& group) {
  return run(config, open_test_session(config, group));
}

FirstPositions first_of(const nsa::PointRecord& record) { return {record.first_position, record.batch.lengths}; }

bool has(const nsa::PointRecord& record, const std::string& name) { return find(record, name) != nullptr; }

oracle::Reals reals(const nsa::PointRecord& record, const std::string& name) {
  const nsa::TensorRecord& t = tensor(record, name);
  return {t.shape, std::vector<double>(t.values.begin(), t.values.end())};
}

oracle::Integers integers(const nsa::PointRecord& record, const std::string& name) {
  const nsa::TensorRecord& t = tensor(record, name);
  return {t.shape, std::vector<std::int64_t>(t.integers.begin(), t.integers.end())};
}

oracle::Options options_of(const nsa::Config& config) {
  const nsa::Point point = nsa::sweep(config).at(0);
  const nsa::ModelConfig& m = config.model;
  oracle::Options o;
  o.batch = point.batch;
  o.tokens = point.longest() +
             (config.kind == nsa::TaskKind::decode ? config.run.steps * point.query_tokens : config.run.prefix);
  o.dim = m.dim;
  o.heads = m.n_heads;
  o.groups = m.n_kv_groups;
  o.d_k = m.d_k;
  o.d_v = m.d_v;
  o.layers = m.layers;
  o.l = config.nsa.l;
  o.d = config.nsa.d;
  o.l_sel = config.nsa.l_sel;
  o.n_sel = config.nsa.n_sel;
  o.n_init = config.nsa.n_init;
  o.n_local = config.nsa.n_local;
  o.w = config.nsa.w;
  o.sigmoid_gate = m.gate == nsa::GateKind::sigmoid;
  o.mlp_phi = config.phi == nsa::PhiKind::mlp;
  o.shared_kv = m.shared_kv;
  o.rope_base = m.rope_base;
  o.force_branch = point.force_branch;
  o.storage = storage_of(m.precision);
  o.fp8_kv = m.kv_precision == nsa::KvPrecision::fp8_e4m3;
  o.fp8_cmp = m.cmp_precision == nsa::KvPrecision::fp8_e4m3;
  return o;
}

std::vector<oracle::Weights> weights_of(const nsa::Config& config, const nsa::PointRecord& record) {
  std::vector<oracle::Weights> layers;
  for (std::int64_t i = 0; i < config.model.layers; ++i) {
    const std::string folder = config.model.layers > 1 ? "weights/layer" + std::to_string(i) + "/" : "weights/";
    const auto read = [&](const std::string& name) { return reals(record, folder + name); };
    oracle::Weights w;
    w.w_q = read("w_q");
    const char* names[] = {"cmp", "sel", "win"};
    for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
      if (config.model.shared_kv && c != oracle::sel) continue;
      w.w_k[c] = read(std::string("w_k_") + names[c]);
      w.w_v[c] = read(std::string("w_v_") + names[c]);
    }
    w.w_o = read("w_o");
    w.gate_w1 = read("gate_w1");
    w.gate_b1 = read("gate_b1");
    w.gate_w2 = read("gate_w2");
    w.gate_b2 = read("gate_b2");
    if (config.phi == nsa::PhiKind::mlp) {
      w.phi_k = phi_of(record, folder + "phi_k");
      w.phi_v = phi_of(record, folder + "phi_v");
    }
    layers.push_back(std::move(w));
  }
  return layers;
}

oracle::Projected given_of(const nsa::Config& config, const nsa::PointRecord& record) {
  oracle::Projected given;
  given.q = reals(record, "given/q");
  given.gate = reals(record, "given/gate");
  const std::string names[] = {"cmp", "sel", "win"};
  for (const int c : {oracle::cmp, oracle::sel, oracle::win}) {
    const std::string name = names[config.model.shared_kv ? int{oracle::sel} : c];
    given.k[c] = reals(record, "given/k_" + name);
    given.v[c] = reals(record, "given/v_" + name);
  }
  return given;
}

std::int64_t counted_reads(const nsa::PointRecord& record, int branch, std::int64_t step) {
  const nsa::ReadTable& reads = record.reads;
  std::int64_t sum = 0;
  for (std::int64_t rank = 0; rank < reads.ranks; ++rank)
    sum += reads.counted.at((branch * reads.ranks + rank) * reads.steps + step);
  return sum;
}

bool reads_as_expected(const nsa::PointRecord& record) {
  return !record.reads.counted.empty() && record.reads.counted == record.reads.expected;
}

}  // namespace parity
