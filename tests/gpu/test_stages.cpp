// Compares the CUDA stages other than attention with those of the host: projections, gates, caches, compression,
// vectors, graphs.

#include <string>
#include <vector>

#include "catch.hpp"
#include "gpu/mirrored.hpp"
#include "kernels/shared/random.hpp"

using namespace nsa;
using namespace nsa::test;

namespace {

void fill_matrix(const MirroredBuffer& matrix, DType type, std::int64_t rows, std::int64_t columns, const char* name,
                 float scale) {
  KvView view;
  view.plane_stride = rows * columns;
  view.width = static_cast<std::int32_t>(columns);
  for (const Backend* b : {&cpu(), &gpu()}) {
    view.data = matrix.on<void>(*b);
    b->kernels->fill_rows({type, view, 1, 1, 0, 0, rows, tensor_key(3, name), scale}, nullptr);
  }
  gpu().device->synchronize(nullptr);
}

struct Position {
  explicit Position(std::int64_t t) : memory(8) {
    *memory.host<std::int64_t>() = t;
    memory.to_gpu();
  }
  MirroredBuffer memory;
};

}  // namespace

TEST_CASE("cuda fills caches with the host's bits, halos and rings too") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16}) {
    RowMap sharded;
    sharded.chunk = 20;
    sharded.stride = 23;
    sharded.halo = 3;
    sharded.kv = 3;
    sharded.rank = 1;
    RowMap without_halo = sharded;
    without_halo.halo = 0;
    RowMap ring;
    ring.ring = 37;
    for (const RowMap& map : {RowMap{}, sharded, without_halo, ring})
      for (const std::int64_t rows : {1, 19, 20, 63, 100}) {
        const MirroredKv cache(type, map, 6, rows, 24);
        cache.fill(2, 3, rows, "x", 0.5f);
        INFO(name_of(type) << " rows=" << rows << " chunk=" << map.chunk << " ring=" << map.ring);
        CHECK(same_bits(cache.memory));
      }
  }
}

TEST_CASE("cuda copies and appends rows as the host does") {
  const DType type = DType::bf16;
  RowMap own;
  own.chunk = 20;
  own.stride = 26;
  own.kv = 3;
  RowMap heads = own;
  heads.stride = 6;
  RowMap halo = own;
  halo.halo = 4;
  RowMap ring;
  ring.ring = 16;
  for (const std::int64_t rows : {5, 20, 21, 47, 90, 130})
    for (int rank = 0; rank < 3; ++rank) {
      own.rank = heads.rank = halo.rank = rank;
      const MirroredKv whole(type, RowMap{}, 2, rows, 8);
      whole.fill(2, 1, rows, "x");
      const MirroredKv chunks(type, own, 2, rows, 8), first(type, heads, 2, rows, 8), before(type, halo, 2, rows, 8),
          last(type, ring, 2, rows, 8);
      struct Copy {
        const MirroredKv* to;
        std::int64_t begin, end;
      };
      for (const Copy& copy : {Copy{&chunks, 0, 20}, Copy{&chunks, 20, 26}, Copy{&first, 0, 6}, Copy{&before, -4, 0},
                               Copy{&last, 0, INT64_MAX}}) {
        for (const Backend* b : {&cpu(), &gpu()})
          b->kernels->copy_rows({type, whole.on(*b), copy.to->on(*b), 2, 0, rows, copy.begin, copy.end}, nullptr);
        INFO("rows=" << rows << " rank=" << rank << " span " << copy.begin << ".." << copy.end);
        CHECK(same_bits(copy.to->memory));
      }
    }
  LayerShape s;
  s.groups = 2;
  s.d_k = 8;
  s.d_v = 4;
  s.dtype = type;
  own.rank = 1;
  for (const RowMap& map : {RowMap{}, own, ring})
    for (const int tokens : {1, 7, 50}) {
      const Position position(33);
      MirroredBuffer k(2 * tokens * 2 * 8 * 2), v(2 * tokens * 2 * 4 * 2);
      fill_matrix(k, type, 2 * tokens, 16, "k", 1.0f);
      fill_matrix(v, type, 2 * tokens, 8, "v", 1.0f);
      const MirroredKv k_cache(type, map, 6, 33 + tokens, 8), v_cache(type, map, 6, 33 + tokens, 4);
      for (const Backend* b : {&cpu(), &gpu()}) {
        const QueryTile tile{1, 2, tokens, position.memory.on<std::int64_t>(*b), 33 + tokens};
        b->kernels->append({{s, tile}, k.on<void>(*b), v.on<void>(*b), k_cache.on(*b), v_cache.on(*b)}, nullptr);
      }
      INFO("tokens=" << tokens << " chunk=" << map.chunk << " ring=" << map.ring);
      CHECK(same_bits(k_cache.memory));
      CHECK(same_bits(v_cache.memory));
    }
}

TEST_CASE("cuda compresses as the host does, halo copies too") {
  for (const PhiKind phi : {PhiKind::mean, PhiKind::mlp})
    for (const DType type : {DType::f32, DType::bf16})
      for (const int kv : {1, 3})
        for (const std::int64_t first : {0, 31, 47, 300})
          for (const int tokens : {1, 150}) {
            LayerShape s;
            s.groups = 2;
            s.d_k = 24;
            s.d_v = 16;
            s.dtype = type;
            s.phi = phi;
            s.phi_hidden = 40;
            const std::int64_t positions = first + tokens, n = compressed_tokens(s.rules, positions - 1);
            RowMap cmp_map;
            if (kv > 1) cmp_map = {8, 9, 1, kv, 1, 0, 0, INT64_MAX};
            const RowMap raw_map{};
            const MirroredKv k_raw(type, raw_map, 4, positions, s.d_k), v_raw(type, raw_map, 4, positions, s.d_v);
            k_raw.fill(2, 2, positions, "k");
            v_raw.fill(2, 2, positions, "v");
            const MirroredKv k_cmp(type, cmp_map, 4, n + 1, s.d_k), v_cmp(type, cmp_map, 4, n + 1, s.d_v);
            const std::int64_t size = static_cast<std::int64_t>(size_of(type)), l = s.rules.l;
            MirroredBuffer k_pos(l * s.d_k * size), k_w1(l * s.d_k * 40 * size), k_w2(40 * s.d_k * size);
            MirroredBuffer v_pos(l * s.d_v * size), v_w1(l * s.d_v * 40 * size), v_w2(40 * s.d_v * size);
            fill_matrix(k_pos, type, l, s.d_k, "kp", 0.3f);
            fill_matrix(k_w1, type, l * s.d_k, 40, "k1", 0.05f);
            fill_matrix(k_w2, type, 40, s.d_k, "k2", 0.2f);
            fill_matrix(v_pos, type, l, s.d_v, "vp", 0.3f);
            fill_matrix(v_w1, type, l * s.d_v, 40, "v1", 0.05f);
            fill_matrix(v_w2, type, 40, s.d_v, "v2", 0.2f);
            const Position position(first);
            for (const Backend* b : {&cpu(), &gpu()}) {
              CompressArgs a;
              a.shape = s;
              a.tile = {0, 2, tokens, position.memory.on<std::int64_t>(*b), positions};
              a.phi_k = {k_pos.on<void>(*b), k_w1.on<void>(*b), k_w2.on<void>(*b)};
              a.phi_v = {v_pos.on<void>(*b), v_w1.on<void>(*b), v_w2.on<void>(*b)};
              a.k_raw = k_raw.on(*b);
              a.v_raw = v_raw.on(*b);
              a.k_cmp = k_cmp.on(*b);
              a.v_cmp = v_cmp.on(*b);
              a.fill_halo = true;
              MirroredBuffer scratch(static_cast<std::int64_t>(b->kernels->scratch_bytes(s, a.tile, {})) + 16);
              a.scratch = scratch.on<void>(*b);
              a.scratch_bytes = scratch.bytes();
              b->kernels->compress(a, nullptr);
              gpu().device->synchronize(nullptr);
            }
            INFO((phi == PhiKind::mean ? "mean " : "mlp ")
                 << name_of(type) << " kv=" << kv << " first=" << first << " tokens=" << tokens);
            // Rows that no token completes stay NaN on both sides: compare the rows that the host wrote.
            for (const MirroredKv* cache : {&k_cmp, &v_cmp}) {
              const auto [ours, theirs] =
                  values_of(cache->memory, type, static_cast<std::int64_t>(cache->memory.bytes() / size_of(type)));
              bool same_places = true;
              std::vector<float> a, b;
              for (std::size_t i = 0; i < ours.size(); ++i) {
                same_places &= std::isnan(ours[i]) == std::isnan(theirs[i]);
                if (!std::isnan(theirs[i])) a.push_back(ours[i]), b.push_back(theirs[i]);
              }
              CHECK(same_places);
              // fp32 sums in another order; at a rounding boundary of bf16 they differ by one ulp (2^-8).
              CHECK(relative_error(a, b) < (type == DType::f32 ? 1e-5 : 4e-3));
            }
          }
}

TEST_CASE("cuda projects, rotates, gates and computes the output as the host does") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16})
    for (const GateKind gate_kind : {GateKind::softmax, GateKind::sigmoid})
      for (const bool shared_kv : {false, true})
        for (const int tokens : {1, 3, 40}) {
          LayerShape s;
          s.groups = 2;
          s.heads_per_group = 3;
          s.d_k = 24;
          s.d_v = tokens == 3 ? 10 : 16;
          s.dim = 96;
          s.dtype = type;
          s.gate = gate_kind;
          s.shared_kv = shared_kv;
          const std::int64_t size = static_cast<std::int64_t>(size_of(type)), rows = 2 * tokens;
          const std::int64_t columns = qkv_columns(s), half = s.d_k / 2;
          MirroredBuffer x(rows * s.dim * size), w(s.dim * columns * size), w_o(s.heads() * s.d_v * s.dim * size);
          fill_matrix(x, type, rows, s.dim, "x", 1.0f);
          const bool residual_stream = gate_kind == GateKind::sigmoid;  // x is its norm
          MirroredBuffer residual(rows * s.dim * 4);
          fill_matrix(residual, DType::f32, rows, s.dim, "r", 3.0f);
          fill_matrix(w, type, s.dim, columns, "w", 0.1f);
          fill_matrix(w_o, type, s.heads() * s.d_v, s.dim, "wo", 0.1f);
          MirroredBuffer w1(s.d_k * half * 4), b1(half * 4), w2(half * 3 * 4), b2(3 * 4);
          fill_matrix(w1, DType::f32, s.d_k, half, "g1", 0.2f);
          fill_matrix(b1, DType::f32, 1, half, "b1", 0.2f);
          fill_matrix(w2, DType::f32, half, 3, "g2", 0.5f);
          fill_matrix(b2, DType::f32, 1, 3, "b2", 0.2f);
          MirroredBuffer q(rows * s.heads() * s.d_k * size), gate(rows * s.groups * 3 * 4), y(rows * s.dim * 4),
              o(rows * s.heads() * s.d_v * size);
          fill_matrix(o, type, rows, s.heads() * s.d_v, "o", 1.0f);
          MirroredBuffer k0(rows * s.groups * s.d_k * size), k1(rows * s.groups * s.d_k * size),
              k2(rows * s.groups * s.d_k * size);
          MirroredBuffer v0(rows * s.groups * s.d_v * size), v1(rows * s.groups * s.d_v * size),
              v2(rows * s.groups * s.d_v * size);
          const Position position(123457);
          for (const Backend* b : {&cpu(), &gpu()}) {
            ProjectArgs a;
            a.shape = s;
            a.tile = {0, 2, tokens, position.memory.on<std::int64_t>(*b), 123457 + tokens};
            a.weights.w_qkv = w.on<void>(*b);
            a.weights.gate_w1 = w1.on<float>(*b);
            a.weights.gate_b1 = b1.on<float>(*b);
            a.weights.gate_w2 = w2.on<float>(*b);
            a.weights.gate_b2 = b2.on<float>(*b);
            a.x = x.on<void>(*b);
            if (residual_stream) a.residual = residual.on<float>(*b);
            a.q = q.on<void>(*b);
            a.gate = gate.on<float>(*b);
            const MirroredBuffer* k[] = {&k0, &k1, &k2};
            const MirroredBuffer* v[] = {&v0, &v1, &v2};
            for (int c = 0; c < branches; ++c) {
              a.k[c] = k[c]->on<void>(*b);
              a.v[c] = v[c]->on<void>(*b);
            }
            MirroredBuffer scratch(static_cast<std::int64_t>(b->kernels->scratch_bytes(s, a.tile, {})) + 16);
            a.scratch = scratch.on<void>(*b);
            a.scratch_bytes = scratch.bytes();
            b->kernels->project(a, nullptr);
            b->kernels->output({a, {0, s.heads()}, o.on<void>(*b), w_o.on<void>(*b), y.on<float>(*b)}, nullptr);
            gpu().device->synchronize(nullptr);
          }
          INFO(name_of(type) << " shared_kv=" << shared_kv << " tokens=" << tokens);
          // fp32 sums in another order, then one rounding to storage, which may go the other way (1 ulp).
          const double bound = type == DType::f32 ? 1e-5 : type == DType::bf16 ? 4e-3 : 5e-4;
          CHECK(relative_error(q, type) < bound);
          CHECK(relative_error(gate, DType::f32) < bound);
          CHECK(relative_error(k1, type) < bound);
          CHECK(relative_error(v1, type) < bound);
          if (!shared_kv) {
            CHECK(relative_error(k0, type) < bound);
            CHECK(relative_error(v0, type) < bound);
            CHECK(relative_error(k2, type) < bound);
            CHECK(relative_error(v2, type) < bound);
          }
          CHECK(relative_error(y, DType::f32) < 1e-5);
        }
}

// Rows at the limits of each kernel; columns that fill no strip, and strips shared by clusters of two to eight CTAs.
TEST_CASE("cuda products of few rows equal the host's, and add to a residual stream") {
  for (const DType type : {DType::f32, DType::bf16, DType::f16})
    for (const auto& [depth, columns] : {std::pair{64, 8}, {96, 72}, {1024, 200}, {4096, 40}, {40, 30}})
      for (const int rows : {1, 8, 9, 16, 17, 32, 33}) {
        LayerShape s;
        s.heads_per_group = 1;
        s.d_v = depth;
        s.dim = columns;
        s.dtype = type;
        const std::int64_t size = static_cast<std::int64_t>(size_of(type));
        MirroredBuffer o(std::int64_t{rows} * depth * size), w(std::int64_t{depth} * columns * size),
            y(std::int64_t{rows} * columns * 4), residual(std::int64_t{rows} * columns * 4);
        fill_matrix(o, type, rows, depth, "o", 1.0f);
        fill_matrix(w, type, depth, columns, "w", 0.1f);
        fill_matrix(residual, DType::f32, rows, columns, "r", 1.0f);
        for (const Backend* b : {&cpu(), &gpu()}) {
          OutputArgs a;
          a.shape = s;
          a.tile = {0, rows, 1, nullptr, 1};
          a.heads = {0, s.heads()};
          a.o = o.on<void>(*b), a.w_o = w.on<void>(*b);
          a.y = y.on<float>(*b), a.residual = residual.on<float>(*b);
          MirroredBuffer scratch(static_cast<std::int64_t>(b->kernels->scratch_bytes(s, a.tile, {})) + 16);
          a.scratch = scratch.on<void>(*b);
          a.scratch_bytes = scratch.bytes();
          b->kernels->output(a, nullptr);
          gpu().device->synchronize(nullptr);
        }
        INFO(name_of(type) << " " << rows << " x " << depth << " x " << columns);
        CHECK(relative_error(y, DType::f32) < 1e-5);
        CHECK(relative_error(residual, DType::f32) < 1e-5);
      }
}

// The fused prologue must write the same bits as project, append and compress one by one.
TEST_CASE("the fused cuda decode prologue equals its stages") {
  for (const DType type : {DType::f32, DType::bf16})
    for (const PhiKind phi : {PhiKind::mean, PhiKind::mlp})
      for (const int kv : {1, 2})
        for (const bool projects : {false, true})
          for (const std::int64_t t : {0, 46, 47, 1039}) {
            LayerShape s;
            s.groups = 2;
            s.heads_per_group = 3;
            s.d_k = 24;
            s.d_v = 16;
            s.dim = 96;
            s.dtype = type;
            s.phi = phi;
            s.phi_hidden = 40;
            const std::int64_t size = static_cast<std::int64_t>(size_of(type)), batch = 2, planes = batch * s.groups;
            const std::int64_t columns = qkv_columns(s), half = s.d_k / 2, n = compressed_tokens(s.rules, t) + 1;
            MirroredBuffer x(batch * s.dim * size), w(s.dim * columns * size), w1(s.d_k * half * 4), b1(half * 4),
                w2(half * 3 * 4), b2(3 * 4), phi_w(s.rules.l * s.d_k * 40 * size);
            fill_matrix(x, type, batch, s.dim, "x", 1.0f);
            fill_matrix(w, type, s.dim, columns, "w", 0.1f);
            fill_matrix(w1, DType::f32, s.d_k, half, "g1", 0.2f);
            fill_matrix(b1, DType::f32, 1, half, "b1", 0.2f);
            fill_matrix(w2, DType::f32, half, 3, "g2", 0.5f);
            fill_matrix(b2, DType::f32, 1, 3, "b2", 0.2f);
            fill_matrix(phi_w, type, s.rules.l * s.d_k, 40, "phi", 0.05f);
            const Position position(t);
            RowMap token_map, cmp_map, ring;
            if (kv > 1) {
              token_map = {128, 128, 0, kv, 1, 0, 0, INT64_MAX};
              cmp_map = {8, 9, 1, kv, 1, 0, 0, INT64_MAX};
            }
            ring.ring = 40;
            std::vector<std::vector<unsigned char>> written[2];
            for (const bool fused : {false, true}) {
              const Backend& b = gpu();
              MirroredBuffer q(batch * s.heads() * s.d_k * size), gate(planes * 3 * 4), k(3 * planes * s.d_k * size),
                  v(3 * planes * s.d_v * size);
              fill_matrix(k, type, 3 * planes, s.d_k, "k", 1.0f);
              fill_matrix(v, type, 3 * planes, s.d_v, "v", 1.0f);
              const MirroredKv k_raw(type, RowMap{}, planes, t + 1, s.d_k), v_raw(type, RowMap{}, planes, t + 1, s.d_v);
              k_raw.fill(2, 2, t + 1, "kr");
              v_raw.fill(2, 2, t + 1, "vr");
              const MirroredKv k_sel(type, token_map, planes, t + 1, s.d_k),
                  v_sel(type, token_map, planes, t + 1, s.d_v);
              const MirroredKv k_win(type, ring, planes, t + 1, s.d_k), v_win(type, ring, planes, t + 1, s.d_v);
              const MirroredKv k_cmp(type, cmp_map, planes, n, s.d_k), v_cmp(type, cmp_map, planes, n, s.d_v);
              PrologueArgs a;
              a.projects = projects;
              ProjectArgs& project = a.project;
              project.shape = s;
              project.tile = {0, 2, 1, position.memory.on<std::int64_t>(b), t + 1};
              project.weights.w_qkv = w.on<void>(b);
              project.weights.gate_w1 = w1.on<float>(b);
              project.weights.gate_b1 = b1.on<float>(b);
              project.weights.gate_w2 = w2.on<float>(b);
              project.weights.gate_b2 = b2.on<float>(b);
              project.x = x.on<void>(b);
              project.q = q.on<void>(b);
              project.gate = gate.on<float>(b);
              MirroredBuffer scratch(static_cast<std::int64_t>(b.kernels->scratch_bytes(s, project.tile, {})) + 16);
              project.scratch = scratch.on<void>(b);
              project.scratch_bytes = scratch.bytes();
              const MirroredKv* to_k[] = {&k_raw, &k_sel, &k_win};
              const MirroredKv* to_v[] = {&v_raw, &v_sel, &v_win};
              for (int c = 0; c < branches; ++c) {
                project.k[c] = k.on<char>(b) + c * planes * s.d_k * size;
                project.v[c] = v.on<char>(b) + c * planes * s.d_v * size;
                a.append[c] = {project, project.k[c], project.v[c], to_k[c]->on(b), to_v[c]->on(b)};
              }
              CompressArgs& compress = a.compress;
              static_cast<StageArgs&>(compress) = project;
              compress.phi_k = compress.phi_v = {phi_w.on<void>(b), phi_w.on<void>(b), phi_w.on<void>(b)};
              compress.k_raw = k_raw.on(b);
              compress.v_raw = v_raw.on(b);
              compress.k_cmp = k_cmp.on(b);
              compress.v_cmp = v_cmp.on(b);
              compress.fill_halo = true;
              if (fused) {
                b.kernels->prologue.run(a, nullptr);
              } else {
                if (projects) b.kernels->project(project, nullptr);
                for (const AppendArgs& append : a.append) b.kernels->append(append, nullptr);
                b.kernels->compress(compress, nullptr);
              }
              for (const MirroredBuffer* buffer : std::initializer_list<const MirroredBuffer*>{
                       &q, &gate, &k, &v, &k_raw.memory, &v_raw.memory, &k_sel.memory, &v_sel.memory, &k_win.memory,
                       &v_win.memory, &k_cmp.memory, &v_cmp.memory})
                written[fused].push_back(buffer->from_gpu<unsigned char>());
            }
            INFO(name_of(type) << (phi == PhiKind::mean ? " mean" : " mlp") << " kv=" << kv << " t=" << t
                               << (projects ? " projects" : ""));
            CHECK(written[0] == written[1]);
          }
}

TEST_CASE("cuda normalises and adds as the host does") {
  LayerShape s;
  s.dim = 100;
  s.dtype = DType::bf16;
  MirroredBuffer x(7 * 100 * 4), y(7 * 100 * 4), out(7 * 100 * 2);
  fill_matrix(x, DType::f32, 7, 100, "x", 3.0f);
  fill_matrix(y, DType::f32, 7, 100, "y", 3.0f);
  for (const bool normalise : {true, false}) {
    for (const Backend* b : {&cpu(), &gpu()}) {
      b->kernels->add(700, x.on<float>(*b), y.on<float>(*b), nullptr);
      b->kernels->rmsnorm(s, 7, x.on<float>(*b), out.on<void>(*b), normalise, nullptr);
    }
    CHECK(same_bits(x));
    CHECK(relative_error(out, s.dtype) < 4e-3);
  }
}

TEST_CASE("a captured cuda graph advances the position in memory") {
  const DeviceOps& device = *gpu().device;
  MirroredBuffer position(8), step(8), reads(3 * 8), log(4 * 3 * 8);
  std::memset(position.host<void>(), 0, 8);
  std::memset(step.host<void>(), 0, 8);
  std::int64_t* counted = reads.host<std::int64_t>();
  counted[0] = 5, counted[1] = 6, counted[2] = 7;
  position.to_gpu();
  step.to_gpu();
  reads.to_gpu();
  AdvanceArgs args;
  args.position = position.on<std::int64_t>(gpu());
  args.step = step.on<std::int64_t>(gpu());
  args.reads = reads.on<std::int64_t>(gpu());
  args.reads_log = log.on<std::int64_t>(gpu());
  args.counters = 3;
  args.log_steps = 4;
  Stream* stream = device.create_stream();
  struct Context {
    AdvanceArgs args;
    Stream* stream;
  } context{args, stream};
  Graph* graph = device.capture(
      stream,
      [](void* c) {
        const auto* at = static_cast<const Context*>(c);
        gpu().kernels->advance(at->args, at->stream);
      },
      &context);
  for (int i = 0; i < 6; ++i) device.launch(graph, stream);
  device.synchronize(stream);
  device.destroy_graph(graph);
  device.destroy_stream(stream);
  CHECK(position.from_gpu<std::int64_t>()[0] == 6);
  CHECK(step.from_gpu<std::int64_t>()[0] == 6);
  const auto logged = log.from_gpu<std::int64_t>();
  CHECK(logged[0] == 5);
  CHECK(logged[2] == 7);
  CHECK(logged[3] == 0);
}

TEST_CASE("the gpu reports its properties") {
  const DeviceInfo info = gpu().device->info();
  CHECK(info.uuid.substr(0, 4) == "GPU-");
  CHECK(info.units > 0);
  CHECK(info.memory_total > info.memory_free);
  CHECK(info.architecture.substr(0, 3) == "sm_");
  WARN(info.name << " " << info.uuid << " driver " << info.driver << " CUDA " << info.runtime << " " << info.clock_mhz
                 << " MHz, memory " << info.memory_clock_mhz << " MHz, ECC " << info.ecc_errors);
}
