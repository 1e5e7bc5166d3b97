#include "nsa/tasks/needle_task.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "kernels/diagnostics/operation_log.hpp"
#include "nsa/forward/decode.hpp"
#include "nsa/forward/prefill.hpp"
#include "nsa/model/inputs.hpp"
#include "nsa/tasks/task.hpp"

namespace nsa {

namespace {

// The needle's key is longer than a unit-variance key along each query. The mean over l positions leaves a compressed
// score near `strength`, while other compressed scores are below one, so that its block outweighs all others in a
// context of up to e^8 blocks. The token's own score is l times that, so that its weight in o_sel is one to fp32
// rounding and the output equals the planted value.
constexpr double strength = 8.0;
constexpr double bound = 1e-5;  // |o_sel - v|, for |v| < 3.5

struct Needle {
  std::int64_t position;
  std::vector<float> k, v;  // [planes][D]
};

Needle make_needle(ModelShard& shard, const TensorSource& source, const std::vector<float>& q, std::int64_t position) {
  const LayerShape& s = shard.shape();
  Needle needle{position, std::vector<float>(shard.planes() * s.d_k, 0.0f), {}};
  // Kaczmarz: for head after head, moves the key along the head's query until their product is `wanted`.
  const double wanted = strength * s.rules.l * std::sqrt(static_cast<double>(s.d_k));
  for (int round = 0; round < 200; ++round)
    for (std::int64_t row = 0; row < shard.planes() * s.heads_per_group; ++row) {
      const float* head = q.data() + row * s.d_k;
      float* k = needle.k.data() + row / s.heads_per_group * s.d_k;
      const double length =
          (wanted - std::inner_product(head, head + s.d_k, k, 0.0)) / std::inner_product(head, head + s.d_k, head, 0.0);
      for (int i = 0; i < s.d_k; ++i) k[i] += static_cast<float>(length * head[i]);
    }
  const std::vector<std::int64_t> shape{shard.point.batch, shard.config.model.n_kv_groups, s.d_v};
  needle.v =
      source.slab("needle", shape, 1.0f, {0, shard.partition.group_begin, 0}, {shard.point.batch, s.groups, s.d_v});
  // As the cache gives it back.
  const KvView& cache = shard.caches[0].sel.v;
  needle.v = from_cache(to_cache(needle.v, cache, s.dtype), cache, s.dtype);
  return needle;
}

void plant(ModelShard& shard, const KvView& view, std::int64_t position, const std::vector<float>& rows) {
  if (!has_row(view.map, position)) return;
  const StoredRows stored = to_cache(rows, view, shard.shape().dtype);
  for (std::int64_t plane = 0; plane < shard.planes(); ++plane)
    put_row(shard, view, plane, chunk_of(view.map, position), position, stored, plane);
  shard.device().synchronize(shard.streams.compute);
}

struct Finding {
  bool found = true;
  double error = 0;
};

Finding examine(ModelShard& shard, const StepBuffers& b, const Needle& needle) {
  const LayerShape& s = shard.shape();
  const std::int64_t n = s.rules.n_sel, block = needle.position / s.rules.l_sel;
  const auto chosen = download_ints(shard, b.selected.data(), shard.planes() * n);
  const auto o = download(shard, b.o_branch[sel].data(), shard.planes() * s.heads_per_group * s.d_v, DType::f32);
  Finding finding;
  for (std::int64_t plane = 0; plane < shard.planes(); ++plane) {
    const auto row = chosen.begin() + plane * n;
    finding.found = finding.found && std::find(row, row + n, block) != row + n;
    for (std::int64_t i = 0; i < s.heads_per_group * s.d_v; ++i) {
      const double error = std::abs(o[plane * s.heads_per_group * s.d_v + i] - needle.v[plane * s.d_v + i % s.d_v]);
      if (!(error <= finding.error)) finding.error = std::isnan(error) ? INFINITY : error;
    }
  }
  return finding;
}

// Collective.
void record_finding(const ControlComm& world, const ModelShard& shard, const Finding& finding, const Needle& needle,
                    double depth, PointRecord& record) {
  const bool found = world.max(std::int64_t{!finding.found}) == 0;
  const double error = world.max(finding.error);
  record.needle["depth"].push_back(depth);
  record.needle["position"].push_back(static_cast<double>(needle.position));
  record.needle["block"].push_back(static_cast<double>(needle.position / shard.shape().rules.l_sel));
  record.needle["found"].push_back(found);
  record.needle["abs_err"].push_back(error);
  record.max_abs_err = std::max(record.max_abs_err, error);
  if (!found || error > bound)
    record.fail("needle at depth " + std::to_string(depth) +
                (found ? ": output differs by " + std::to_string(error) : " not found"));
}

}  // namespace

Config needle_config(const Config& config) {
  Config c = config;
  c.kind = TaskKind::decode;
  c.run.scope = Scope::attention;
  c.run.steps = 1;
  c.model.layers = 1;
  return c;
}

Point needle_point(const Point& point) {
  Point p = point;
  p.context = point.context - 1;
  return p;
}

MemoryAccount run_needles(const Session& session, const Config& input, const Point& at, PointRecord& record,
                          const Progress& progress) {
  const Config config = needle_config(input);
  const Point point = needle_point(at);
  const PhaseScope phase("needles");
  const TensorSource source(config, "");
  std::optional<ModelShard> held_shard;
  std::optional<PrefillRunner> held_prefill;
  std::optional<DecodeRunner> held_decode;
  agreed(session.world, [&] {
    held_shard.emplace(session.backend, session.world, config, point, source);
    held_prefill.emplace(*held_shard, PrefillRange{0, point.context}, false);
    held_decode.emplace(*held_shard, &source, true);
  });
  held_shard->connect(*session.grid);
  ModelShard& shard = *held_shard;
  PrefillRunner& prefill = *held_prefill;
  DecodeRunner& decode = *held_decode;
  StageTimer timer(shard.device(), shard.streams.compute);
  prefill.load_kv(source);
  const std::vector<float> q =
      given_rows(source, "given/q", q_columns(config, point, shard.partition), point.context, 1);

  Samples samples;
  samples.modes = {"total"};
  samples.times.emplace_back();
  for (std::size_t i = 0; i < config.needle.depths.size(); ++i) {
    if (session.stop->check_periodically()) throw Interrupted();
    const double depth = config.needle.depths[i];
    const Needle needle = make_needle(shard, source, q, std::llround(depth * static_cast<double>(point.context - 1)));
    for (const Branch branch : kv_column_order) {
      plant(shard, prefill.rows(branch).k, needle.position, needle.k);
      plant(shard, prefill.rows(branch).v, needle.position, needle.v);
    }
    prefill.fill_caches(timer);
    decode.snapshot();
    if (i == 0) decode.choose_plan(session.world);
    StepOptions options;
    options.record = true;
    decode.load(0, options);
    samples.times.back().push_back(timer.step([&] { decode.step(options, timer); }));
    record_finding(session.world, shard, examine(shard, decode.buffers(), needle), needle, depth, record);
    for (const Branch branch : kv_column_order)
      fill_kv(shard, source, branch, prefill.rows(branch), needle.position, needle.position + 1);
    if (progress) progress(static_cast<double>(i + 1), static_cast<double>(config.needle.depths.size()), "needles");
  }
  record.first_position = point.context;
  record.stop_reason = "steps";
  finish_point(session.world, shard, samples, record);
  return shard.account;
}

}  // namespace nsa
