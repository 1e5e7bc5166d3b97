// x -> q, k, v, gates; y = o W_O; rmsnorm; add.
//
// Tiling: matmul takes 256 rows at a time, then one row a loop iteration. Bound by matmul: by the bytes of the weights
// for one row, by the products for many.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/host/simd/matmul.hpp"

namespace nsa::host {
namespace {

/// Cosines and sines of one position, [Dk/2] each. Angles in double: at a million positions fp32 is off by 0.06.
struct Rotation {
  Rotation(const LayerShape& s) : frequency(s.d_k / 2), cosine(s.d_k / 2), sine(s.d_k / 2) {
    for (std::int32_t i = 0; i < s.d_k / 2; ++i) frequency[i] = std::pow(s.rope_base, -2.0 * i / s.d_k);
  }
  void set_position(std::int64_t t) {
    if (t == position) return;
    position = t;
    for (std::size_t i = 0; i < frequency.size(); ++i) {
      const double angle = static_cast<double>(t) * frequency[i];
      cosine[i] = static_cast<float>(std::cos(angle));
      sine[i] = static_cast<float>(std::sin(angle));
    }
  }
  void apply(float* x) const {
    for (std::size_t i = 0; i < cosine.size(); ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cosine[i] - b * sine[i];
      x[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
  }
  std::vector<double> frequency;
  std::vector<float> cosine, sine;
  std::int64_t position = -1;
};

void form_gate(const ProjectArgs& args, const float* mean, std::vector<float>& hidden, float* gate) {
  if (args.force_branch >= 0) {
    for (std::int32_t c = 0; c < branches; ++c) gate[c] = c == args.force_branch ? 1.0f : 0.0f;
    return;
  }
  const LayerWeights& w = args.weights;
  const std::int32_t width = args.shape.d_k / 2;
  std::copy_n(w.gate_b1, width, hidden.begin());
  add_rows(DType::f32, width, args.shape.d_k, mean, w.gate_w1, width, hidden.data());
  std::copy_n(w.gate_b2, branches, gate);
  for (std::int32_t i = 0; i < width; ++i) {
    const float active = hidden[i] / (1.0f + std::exp(-hidden[i]));
    for (std::int32_t c = 0; c < branches; ++c) gate[c] += active * w.gate_w2[i * branches + c];
  }
  if (args.shape.gate == GateKind::sigmoid) {
    for (std::int32_t c = 0; c < branches; ++c) gate[c] = 1.0f / (1.0f + std::exp(-gate[c]));
    return;
  }
  const float max_logit = std::max({gate[0], gate[1], gate[2]});
  float sum = 0.0f;
  for (std::int32_t c = 0; c < branches; ++c) sum += gate[c] = std::exp(gate[c] - max_logit);
  for (std::int32_t c = 0; c < branches; ++c) gate[c] /= sum;
}

/// Rotates and stores the q heads of one row; forms its gates from the stored q.
void store_q_and_gates(const ProjectArgs& args, const Rotation& rotation, std::int64_t row, float* columns,
                       std::vector<float>& mean, std::vector<float>& hidden) {
  const LayerShape& s = args.shape;
  for (std::int32_t g = 0; g < s.groups; ++g) {
    std::fill(mean.begin(), mean.end(), 0.0f);
    for (std::int32_t j = 0; j < s.heads_per_group; ++j) {
      const std::int64_t head = g * s.heads_per_group + j;
      float* q = columns + head * s.d_k;
      rotation.apply(q);
      void* stored = at(s.dtype, args.q, (row * s.heads() + head) * s.d_k);
      store(s.dtype, s.d_k, q, stored);
      load(s.dtype, s.d_k, stored, q);
      for (std::int32_t e = 0; e < s.d_k; ++e) mean[e] += q[e];
    }
    for (float& x : mean) x /= static_cast<float>(s.heads_per_group);
    form_gate(args, mean.data(), hidden, args.gate + (row * s.groups + g) * branches);
  }
}

/// Rotates the k heads of one row, stores its k and v.
void store_kv(const ProjectArgs& args, const Rotation& rotation, std::int64_t row, float* columns) {
  const LayerShape& s = args.shape;
  for (std::int32_t c = 0; c < (s.shared_kv ? 1 : branches); ++c) {
    const Branch branch = kv_column_order[c];
    const std::int64_t k_width = std::int64_t{s.groups} * s.d_k, v_width = std::int64_t{s.groups} * s.d_v;
    for (std::int32_t g = 0; g < s.groups; ++g) rotation.apply(columns + g * s.d_k);
    store(s.dtype, k_width, columns, at(s.dtype, args.k[branch], row * k_width));
    store(s.dtype, v_width, columns + k_width, at(s.dtype, args.v[branch], row * v_width));
    columns += k_width + v_width;
  }
}

/// `count` values in storage type as fp32: x itself, or converted into scratch.
const float* as_floats(DType type, std::int64_t count, const void* x, float* scratch) {
  if (type == DType::f32) return static_cast<const float*>(x);
  load(type, count, x, scratch);
  return scratch;
}

}  // namespace

std::size_t project_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t rows = std::min(tile.rows(), matmul_rows);
  Arena arena;
  arena.allocate<float>(rows * s.dim);
  arena.allocate<float>(rows * qkv_columns(s));
  matmul_scratch(arena);
  return arena.used();
}

void project(const ProjectArgs& args, Stream*) {
  const LayerShape& s = args.shape;
  const std::int64_t rows = args.tile.rows(), cols = qkv_columns(s);
  if (args.residual) rmsnorm(s, rows, args.residual, args.x, true, nullptr);
  Arena arena(args.scratch, args.scratch_bytes);
  float* x = arena.allocate<float>(std::min(rows, matmul_rows) * s.dim);
  float* columns = arena.allocate<float>(std::min(rows, matmul_rows) * cols);
  for (std::int64_t begin = 0; begin < rows; begin += matmul_rows) {
    const std::int64_t n = std::min(matmul_rows, rows - begin);
    matmul(arena, s.dtype, n, s.dim, cols, as_floats(s.dtype, n * s.dim, at(s.dtype, args.x, begin * s.dim), x),
           args.weights.w_qkv, columns);
#pragma omp parallel if (n > 4)
    {
      Rotation rotation(s);
      std::vector<float> mean(s.d_k), hidden(s.d_k / 2);
#pragma omp for
      for (std::int64_t i = 0; i < n; ++i) {
        rotation.set_position(position_of_row(args.tile, begin + i));
        store_q_and_gates(args, rotation, begin + i, columns + i * cols, mean, hidden);
        store_kv(args, rotation, begin + i, columns + i * cols + std::int64_t{s.heads()} * s.d_k);
      }
    }
  }
}

std::size_t output_scratch(const LayerShape& s, const QueryTile& tile) {
  const std::int64_t inner = std::int64_t{s.heads()} * s.d_v;
  Arena arena;
  arena.allocate<float>(std::min(tile.rows(), matmul_rows) * inner);
  matmul_scratch(arena);
  return arena.used();
}

void output(const OutputArgs& args, Stream*) {
  const LayerShape& s = args.shape;
  const std::int64_t inner = std::int64_t{args.heads.count} * s.d_v, rows = args.tile.rows();
  const void* w_o = at(s.dtype, args.w_o, std::int64_t{args.heads.first} * s.d_v * s.dim);
  Arena arena(args.scratch, args.scratch_bytes);
  float* o = arena.allocate<float>(std::min(rows, matmul_rows) * inner);
  for (std::int64_t begin = 0; begin < rows; begin += matmul_rows) {
    const std::int64_t n = std::min(matmul_rows, rows - begin);
    matmul(arena, s.dtype, n, inner, s.dim, as_floats(s.dtype, n * inner, at(s.dtype, args.o, begin * inner), o), w_o,
           args.y + begin * s.dim);
  }
  if (args.residual) add(rows * s.dim, args.residual, args.y, nullptr);
}

void rmsnorm(const LayerShape& s, std::int64_t rows, const float* x, void* out, bool normalise, Stream*) {
#pragma omp parallel if (rows > 16)
  {
    std::vector<float> scaled(s.dim);
#pragma omp for
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * s.dim;
      float scale = 1.0f;
      if (normalise) {
        double sum = 0.0;
        for (std::int32_t i = 0; i < s.dim; ++i) sum += static_cast<double>(row[i]) * row[i];
        scale = static_cast<float>(1.0 / std::sqrt(sum / s.dim + 1e-6));
      }
      for (std::int32_t i = 0; i < s.dim; ++i) scaled[i] = row[i] * scale;
      store(s.dtype, s.dim, scaled.data(), at(s.dtype, out, r * s.dim));
    }
  }
}

void add(std::int64_t count, float* x, const float* y, Stream*) {
#pragma omp parallel for simd if (count > 65536)
  for (std::int64_t i = 0; i < count; ++i) x[i] += y[i];
}

}  // namespace nsa::host
