// A layer of a decode step in one launch against the same work in several: the same bits in caches, blocks, output and
// logs, step after step.

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "gpu/differences.hpp"
#include "gpu/mirrored.hpp"
#include "gpu/paged_caches.hpp"
#include "gpu/whole_decode.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

constexpr std::int64_t log_steps = 3;

// A decode step's caches, the raw rows of the compressed branch beside them, and what the step appends. The tile begins
// behind `skipped` sequences.
struct WholeLayer {
  WholeDecode whole;
  std::vector<std::int64_t> first_positions;  // of all sequences
  std::int64_t planes, first_position, counters, selected_count;
  KvView k_raw, v_raw;
  void *k[branches], *v[branches];
  AdvanceArgs log;
  ProjectArgs project;
  bool projects;

  WholeLayer(const LayerShape& s, int batch, std::int64_t context, bool from_x, int skipped = 0)
      : WholeLayer(s, std::vector<std::int64_t>(static_cast<std::size_t>(skipped + batch), context), from_x, skipped) {}
  // A sequence of each context, those skipped included; a ragged batch where they differ.
  WholeLayer(const LayerShape& s, const std::vector<std::int64_t>& contexts, bool from_x, int skipped = 0)
      : whole(gpu(), s, after_all_steps(contexts), 1),
        first_positions(contexts),
        planes(static_cast<std::int64_t>(contexts.size()) * s.groups),
        first_position(contexts[0]),
        projects(from_x) {
    const int batch = static_cast<int>(contexts.size()) - skipped;
    counters = branches * std::int64_t{batch} * s.groups;
    selected_count = std::int64_t{batch} * s.groups * s.rules.n_sel;
    whole.tile.batch_begin = skipped, whole.tile.batches = batch;
    if (whole.tile.ragged()) log.positions = batch;
    gpu().device->copy(position(), first_positions.data(), position_bytes(), nullptr);
    k_raw = raw("kraw", s.d_k);
    v_raw = raw("vraw", s.d_v);
    for (int b = 0; b < branches; ++b) {
      k[b] = rows(planes, s.d_k, std::string("k") + branch_names[b]).data;
      v[b] = rows(planes, s.d_v, std::string("v") + branch_names[b]).data;
    }
    log.position = position();
    log.step = zeros<std::int64_t>(8);
    log.reads = whole.reads;
    gpu().device->fill(whole.reads, 0, static_cast<std::size_t>(counters * 8), nullptr);
    log.reads_log = zeros<std::int64_t>(log_steps * counters * 8);
    log.counters = counters;
    log.log_steps = log_steps;
    log.selected = whole.selected;
    log.selected_log = zeros<std::int32_t>(log_steps * selected_count * 4);
    log.selected_count = selected_count;
    set_project(batch);
    gpu().device->synchronize(nullptr);
  }
  void set_project(int batch) {
    const LayerShape& s = whole.s;
    const std::int64_t half = s.d_k / 2;
    const auto floats = [&](std::int64_t count, const char* name) {
      KvView view;
      view.width = 1, view.plane_stride = count;
      view.data = whole.memory.make(count * 4);
      gpu().kernels->fill_rows({DType::f32, view, 1, 1, 0, 0, count, tensor_key(2, name), 0.2f}, nullptr);
      return static_cast<float*>(view.data);
    };
    project.x = rows(batch, s.dim, "x").data;
    project.weights.w_qkv = rows(s.dim, static_cast<int>(qkv_columns(s)), "w").data;
    project.weights.gate_w1 = floats(s.d_k * half, "g1");
    project.weights.gate_b1 = floats(half, "b1");
    project.weights.gate_w2 = floats(half * branches, "g2");
    project.weights.gate_b2 = floats(branches, "b2");
    project.q = whole.sets[0].q;
    std::copy_n(k, branches, project.k);
    std::copy_n(v, branches, project.v);
    project.gate = whole.gate;
  }
  static std::vector<std::int64_t> after_all_steps(std::vector<std::int64_t> contexts) {
    for (std::int64_t& context : contexts) context += log_steps + 1;
    return contexts;
  }
  std::size_t position_bytes() const { return static_cast<std::size_t>(log.positions) * 8; }
  std::int64_t* position() const { return const_cast<std::int64_t*>(whole.tile.first_position); }
  template <class T>
  T* zeros(std::int64_t bytes) {
    T* memory = whole.memory.make<T>(bytes);
    gpu().device->fill(memory, 0, static_cast<std::size_t>(bytes), nullptr);
    return memory;
  }
  KvView rows(std::int64_t count, int width, const std::string& name) {
    KvView view;
    view.width = width;
    view.plane_stride = count * width;
    view.data = whole.memory.make(count * width * static_cast<std::int64_t>(size_of(whole.s.dtype)));
    gpu().kernels->fill_rows({whole.s.dtype, view, 1, 1, 0, 0, count, tensor_key(2, name.c_str()), 1.0f}, nullptr);
    return view;
  }
  KvView raw(const std::string& name, int width) {
    KvView view = rows(planes * whole.s.rules.l, width, name);
    view.plane_stride = std::int64_t{whole.s.rules.l} * width;
    view.map.ring = whole.s.rules.l;
    return view;
  }

  DecodeLayerArgs args(bool ends_step = true) const {
    const WholeDecode::Set& set = whole.sets[0];
    DecodeLayerArgs a;
    a.attention = whole.step(set).attention_args();
    const StageArgs& stage = a.attention.combine;
    a.projects = projects;
    a.project = project;
    static_cast<StageArgs&>(a.project) = stage;
    a.append[cmp] = {stage, k[cmp], v[cmp], k_raw, v_raw};
    for (const Branch b : {sel, win}) a.append[b] = {stage, k[b], v[b], set.k[b], set.v[b]};
    static_cast<StageArgs&>(a.compress) = stage;
    a.compress.k_raw = k_raw, a.compress.v_raw = v_raw;
    a.compress.k_cmp = set.k[cmp], a.compress.v_cmp = set.v[cmp];
    a.log = log;
    a.first_position = first_position;
    a.ends_step = ends_step;
    return a;
  }
  void run_stages(bool ends_step = true) const {
    const DecodeLayerArgs a = args(ends_step);
    const KernelTable& kernels = *gpu().kernels;
    if (projects) kernels.project(a.project, whole.stream);
    for (const AppendArgs& append : a.append) kernels.append(append, whole.stream);
    kernels.compress(a.compress, whole.stream);
    run_fused(kernels.decode_attention, a.attention, whole.stream);
    if (ends_step) kernels.advance(a.log, whole.stream);
  }
  void run_layer(bool ends_step = true) const { run_fused(gpu().kernels->decode_layer, args(ends_step), whole.stream); }
};

// Two layers with the output projection and the residual stream, which no step loads anew: every step depends on all
// before it. They share the position, the logs and all memory of one step.
struct Model {
  std::unique_ptr<WholeLayer> layers[2];
  float *x, *y;
  void* w_o;

  Model(const LayerShape& s, int batch, std::int64_t context) {
    for (auto& layer : layers) layer = std::make_unique<WholeLayer>(s, batch, context, true);
    WholeLayer &first = *layers[0], &last = *layers[1];
    WholeDecode &from = first.whole, &to = last.whole;
    to.tile.first_position = from.tile.first_position;
    to.scratch = from.scratch, to.scores = from.scores, to.o = from.o, to.gate = from.gate;
    to.reads = from.reads, to.selected = from.selected;
    last.log = first.log, last.project.gate = from.gate;
    x = first.zeros<float>(std::int64_t{batch} * s.dim * 4);
    y = first.zeros<float>(std::int64_t{batch} * s.dim * 4);
    const KvView w = first.rows(std::int64_t{s.heads()} * s.d_v, s.dim, "wo");
    w_o = w.data;
    KvView residual;
    residual.data = x, residual.width = s.dim, residual.plane_stride = std::int64_t{batch} * s.dim;
    gpu().kernels->fill_rows({DType::f32, residual, 1, 1, 0, 0, batch, tensor_key(2, "residual"), 3.0f}, nullptr);
    first.project.residual = last.project.residual = x;
    gpu().device->synchronize(nullptr);
  }
  Stream* stream() const { return layers[0]->whole.stream; }
  void step(bool in_one_launch) const {
    for (const auto& layer : layers) {
      WholeDecode& whole = layer->whole;
      Stream* own = std::exchange(whole.stream, stream());
      const bool ends_step = layer == layers[1];
      in_one_launch ? layer->run_layer(ends_step) : layer->run_stages(ends_step);
      OutputArgs output{layer->args().attention.combine, {0, whole.s.heads()}};
      output.o = whole.o, output.w_o = w_o;
      output.y = y, output.residual = x;
      gpu().kernels->output(output, stream());
      whole.stream = own;
    }
  }
};

bool same(const void* a, const void* b, std::int64_t bytes, const WholeDecode& whole) {
  if (bytes == 0) return true;
  return differences(a, b, static_cast<std::size_t>(bytes), whole.stream).count == 0;
}

std::string name_of(const LayerShape& s, int batch, std::int64_t context) {
  return "type=" + std::to_string(static_cast<int>(s.dtype)) + " h=" + std::to_string(s.heads_per_group) +
         " d=" + std::to_string(s.d_k) + "," + std::to_string(s.d_v) + " " + std::to_string(batch) + " x " +
         std::to_string(context);
}

// Caches and logs, and that the position is that after all steps.
void check_same(const WholeLayer& stages, const WholeLayer& layer) {
  const DType type = stages.whole.s.dtype;
  const auto same_cache = [&](const KvView& a, const KvView& b) {
    CHECK(same(a.data, b.data, stages.planes * a.plane_stride * element_bytes(a, type), stages.whole));
    if (is_quantised(a))
      CHECK(same(a.scales, b.scales, stages.planes * scales_of_plane(a.plane_stride / a.width), stages.whole));
  };
  for (int b = 0; b < branches; ++b) {
    same_cache(stages.whole.sets[0].k[b], layer.whole.sets[0].k[b]);
    same_cache(stages.whole.sets[0].v[b], layer.whole.sets[0].v[b]);
  }
  same_cache(stages.k_raw, layer.k_raw);
  same_cache(stages.v_raw, layer.v_raw);
  CHECK(same(stages.log.reads_log, layer.log.reads_log, log_steps * stages.counters * 8, stages.whole));
  CHECK(same(stages.log.selected_log, layer.log.selected_log, log_steps * stages.selected_count * 4, stages.whole));
  CHECK(same(stages.log.step, layer.log.step, 8, stages.whole));
  for (const WholeLayer* of : {&stages, &layer}) {
    std::vector<std::int64_t> positions(static_cast<std::size_t>(of->log.positions));
    gpu().device->copy(positions.data(), of->log.position, of->position_bytes(), of->whole.stream);
    gpu().device->synchronize(of->whole.stream);
    std::vector<std::int64_t> expected = WholeLayer::after_all_steps(of->first_positions);
    expected.resize(positions.size());
    CHECK(positions == expected);
  }
}

void check_steps(const WholeLayer& stages, const WholeLayer& layer) {
  for (int step = 0; step <= log_steps; ++step) {  // the last one has no row in the logs
    stages.run_stages();
    layer.run_layer();
    gpu().device->synchronize(layer.whole.stream);
    INFO("step " << step);
    CHECK(same(stages.whole.o, layer.whole.o, stages.whole.o_bytes(), stages.whole));
    CHECK(same(stages.whole.selected, layer.whole.selected, stages.whole.selected_bytes(), stages.whole));
  }
  check_same(stages, layer);
}

void check_layer(const LayerShape& s, int batch, std::int64_t context, bool projects, int skipped = 0) {
  INFO((projects ? "projects " : "given ") << name_of(s, batch, context));
  const WholeLayer stages(s, batch, context, projects, skipped), layer(s, batch, context, projects, skipped);
  check_steps(stages, layer);
}

// On pages of 64 tokens of which all sequences share the first `shared`.
void check_paged_layer(const LayerShape& s, int batch, std::int64_t context, std::int64_t shared, bool projects) {
  INFO((projects ? "projects " : "given ") << name_of(s, batch, context) << ", " << shared << " pages shared");
  WholeLayer stages(s, batch, context, projects), layer(s, batch, context, projects);
  const PagedCaches of_stages(stages.whole, 64, shared), of_layer(layer.whole, 64, shared);
  stages.whole.sets[0] = of_stages.set, layer.whole.sets[0] = of_layer.set;
  check_steps(stages, layer);
}

void check_layer(const LayerShape& s, int batch, std::int64_t context) {
  for (const bool projects : {false, true}) check_layer(s, batch, context, projects);
}

LayerShape shape_of(DType type, int groups, int h, int d_k, int d_v) {
  LayerShape s;
  s.groups = groups, s.heads_per_group = h;
  s.d_k = d_k, s.d_v = d_v;
  s.dtype = type;
  return s;
}

}  // namespace

// Positions before and at the first compressed token, in front of, at and after one that completes; clusters of 16 CTAs
// to one, CTAs of 4 warps; padded instances and head tiles.
TEST_CASE("a decode layer in one launch equals its stages", "[step][layer]") {
  for (const std::int64_t context : {1, 29, 30, 31, 46, 62, 1023, 8190, 65534}) {
    check_layer(shape_of(DType::f32, 2, 2, 64, 64), 1, context);
    check_layer(shape_of(DType::bf16, 4, 16, 128, 128), 1, context);
  }
  for (const int batch : {2, 5, 16, 40, 90}) {
    check_layer(shape_of(DType::bf16, 4, 16, 128, 128), batch, 4092);
    check_layer(shape_of(DType::f16, 2, 3, 192, 128), batch, 1022);
    check_layer(shape_of(DType::bf16, 1, 16, 64, 64), batch, 20010);
  }
  check_layer(shape_of(DType::bf16, 4, 16, 96, 96), 3, 4092);
  check_layer(shape_of(DType::bf16, 2, 16, 256, 256), 3, 4092);
  check_layer(shape_of(DType::bf16, 2, 32, 128, 128), 3, 4092);
  check_layer(shape_of(DType::bf16, 1, 48, 80, 80), 2, 4092);
}

TEST_CASE("a decode layer on FP8 rows in one launch equals its stages", "[step][layer][fp8]") {
  for (const std::int64_t context : {1, 29, 30, 31, 46, 62, 8190, 65534}) check_layer(fp8_shape_of(16), 1, context);
  for (const int batch : {3, 40, 150}) check_layer(fp8_shape_of(batch == 3 ? 5 : 16), batch, 4092);
  check_layer(fp8_shape_of(16), 2, 1022, false, 1);
}

TEST_CASE("a decode layer in one launch takes sequences behind others", "[step][layer]") {
  for (const bool projects : {false, true}) {
    check_layer(shape_of(DType::bf16, 4, 16, 128, 128), 2, 4092, projects, 1);
    check_layer(shape_of(DType::bf16, 2, 32, 128, 128), 1, 4092, projects, 2);
  }
}

TEST_CASE("a decode layer on pages of which sequences share the first equals its stages", "[step][layer][paged]") {
  for (const bool projects : {false, true}) {
    check_paged_layer(shape_of(DType::bf16, 4, 16, 128, 128), 9, 4092, 61, projects);
    check_paged_layer(shape_of(DType::f16, 2, 7, 128, 128), 70, 2046, 17, projects);
  }
}

// Launches follow one another without a wait between them, as in `nsa run`: first one by one, then as a graph.
TEST_CASE("decode steps of several layers, queued and as a graph, equal their stages", "[step][layer]") {
  for (const auto& [s, batch, context] : {std::tuple{shape_of(DType::f32, 2, 2, 64, 64), 1, 1022},
                                          {shape_of(DType::f32, 2, 2, 64, 64), 1, 30},
                                          {shape_of(DType::bf16, 4, 16, 128, 128), 1, 8190},
                                          {shape_of(DType::bf16, 4, 16, 128, 128), 16, 4092},
                                          {shape_of(DType::bf16, 4, 16, 128, 128), 40, 1022},
                                          {shape_of(DType::f16, 2, 16, 96, 96), 2, 4092}}) {
    INFO(name_of(s, batch, context));
    const Model stages(s, batch, context), queued(s, batch, context), replayed(s, batch, context);
    const auto steps = [](const Model& model, bool in_one_launch) {
      for (int step = 0; step <= log_steps; ++step) model.step(in_one_launch);
    };
    steps(stages, false);
    steps(queued, true);
    const DeviceOps& device = *gpu().device;
    device.synchronize(stages.stream());
    device.synchronize(queued.stream());
    struct Captured {
      const Model& model;
      decltype(steps)& run;
    } captured{replayed, steps};
    Graph* graph = device.capture(
        replayed.stream(),
        [](void* c) {
          const auto& at = *static_cast<const Captured*>(c);
          at.run(at.model, true);
        },
        &captured);
    device.launch(graph, replayed.stream());
    device.synchronize(replayed.stream());
    device.destroy_graph(graph);
    for (const Model* model : {&queued, &replayed}) {
      INFO((model == &queued ? "queued" : "graph"));
      for (int i = 0; i < 2; ++i) check_same(*stages.layers[i], *model->layers[i]);
      CHECK(same(stages.x, model->x, std::int64_t{batch} * s.dim * 4, stages.layers[0]->whole));
    }
  }
}

// Some SMs have no work item: the next launch begins there while this one moves the positions on. Loans are stored from
// step to step; other sequences have others.
TEST_CASE("queued decode layers of a ragged batch whose sequences lend tiles equal their stages",
          "[step][layer][ragged][loans]") {
  const LayerShape s = shape_of(DType::bf16, 2, 16, 128, 128);
  std::vector<std::int64_t> contexts = many_lending();
  for (const bool projects : {false, true}) {
    INFO((projects ? "projects" : "given"));
    const WholeLayer stages(s, contexts, projects), layer(s, contexts, projects);
    for (int step = 0; step <= log_steps; ++step) stages.run_stages();
    gpu().device->synchronize(stages.whole.stream);  // the counters of arrivals are those of the device
    for (int step = 0; step <= log_steps; ++step) layer.run_layer();
    gpu().device->synchronize(layer.whole.stream);
    CHECK(same(stages.whole.o, layer.whole.o, stages.whole.o_bytes(), stages.whole));
    check_same(stages, layer);
    std::rotate(contexts.begin(), contexts.begin() + 7, contexts.end());
  }
}

TEST_CASE("a small decode layer in one launch", "[step][layer][small]") {
  check_layer(shape_of(DType::bf16, 1, 16, 128, 128), 1, 700);
  check_layer(shape_of(DType::bf16, 1, 20, 96, 96), 2, 150);
}
