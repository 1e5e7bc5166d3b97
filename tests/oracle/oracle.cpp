#include "oracle/oracle.hpp"

#include <algorithm>
#include <cmath>
#include <set>

namespace oracle {
namespace {

using Vector = std::vector<double>;
using Index = std::int64_t;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

/// in [n] times matrix [n, m].
Vector multiply(const Vector& in, const Reals& matrix) {
  Vector out(matrix.shape[1], 0.0);
  for (Index i = 0; i < matrix.shape[0]; ++i)
    for (Index j = 0; j < matrix.shape[1]; ++j) out[j] += in.at(i) * matrix(i, j);
  return out;
}

/// `stored`: rounding of exp(score - max) after their sum is taken.
Vector softmax(const Vector& scores, Storage stored = Storage::exact) {
  const double max_score = *std::max_element(scores.begin(), scores.end());
  Vector p;
  double sum = 0;
  for (const double s : scores) sum += p.emplace_back(std::exp(s - max_score));
  for (double& value : p) value = round_to(stored, value) / sum;
  return p;
}

/// The vector at (b, t, j) of an array [B, T, J, D].
Vector vector_at(const Reals& array, Index b, Index t, Index j) {
  Vector out;
  for (Index e = 0; e < array.shape[3]; ++e) out.push_back(array(b, t, j, e));
  return out;
}

/// Rotates pairs (2i, 2i+1) of a head by t * base^(-2i/D).
void rotate(Vector& head, Index t, double base) {
  const Index size = static_cast<Index>(head.size());
  for (Index e = 0; e < size; e += 2) {
    const double angle = static_cast<double>(t) * std::pow(base, -static_cast<double>(e) / static_cast<double>(size));
    const double a = head[e], b = head[e + 1];
    head[e] = a * std::cos(angle) - b * std::sin(angle);
    head[e + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

/// x [B, T, dim] times w [dim, heads*width] as stored heads [B, T, heads, width].
Reals project_heads(const Options& o, const Reals& x, const Reals& w, Index heads, bool rotated) {
  const Index width = w.shape[1] / heads;
  Reals out({o.batch, o.tokens, heads, width});
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t) {
      Vector row;
      for (Index c = 0; c < o.dim; ++c) row.push_back(x(b, t, c));
      const Vector all = multiply(row, w);
      for (Index j = 0; j < heads; ++j) {
        Vector head(all.begin() + j * width, all.begin() + (j + 1) * width);
        if (rotated) rotate(head, t, o.rope_base);
        for (Index e = 0; e < width; ++e) out(b, t, j, e) = round_to(o.storage, head[e]);
      }
    }
  return out;
}

/// Gates of one (b, t, g) from the mean of its heads' rotated q.
Vector gates(const Options& o, const Weights& w, const Reals& q, Index b, Index t, Index g) {
  Vector mean(o.d_k, 0.0);
  const Index h = o.heads / o.groups;
  for (Index head = g * h; head < (g + 1) * h; ++head)
    for (Index e = 0; e < o.d_k; ++e) mean[e] += q(b, t, head, e) / static_cast<double>(h);
  Vector hidden = multiply(mean, w.gate_w1);
  for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] = silu(hidden[i] + w.gate_b1.values[i]);
  Vector logits = multiply(hidden, w.gate_w2);
  for (std::size_t c = 0; c < 3; ++c) logits[c] += w.gate_b2.values[c];
  if (!o.sigmoid_gate) return softmax(logits);
  for (double& logit : logits) logit = sigmoid(logit);
  return logits;
}

/// Compressed tokens [B, N, G, D] of k or v [B, T, G, D]: those with all positions.
Reals compress(const Options& o, const PhiWeights& phi, const Reals& raw) {
  Index complete = 0;
  while (complete * o.d + o.l <= o.tokens) ++complete;
  const Index width = raw.shape[3];
  Reals out({o.batch, complete, o.groups, width});
  for (Index b = 0; b < o.batch; ++b)
    for (Index i = 0; i < complete; ++i)
      for (Index g = 0; g < o.groups; ++g) {
        Vector token(width, 0.0);
        if (o.mlp_phi) {
          Vector flat;
          for (Index m = 0; m < o.l; ++m)
            for (Index e = 0; e < width; ++e) flat.push_back(raw(b, i * o.d + m, g, e) + phi.pos(m, e));
          Vector hidden = multiply(flat, phi.w1);
          for (double& value : hidden) value = silu(value);
          token = multiply(hidden, phi.w2);
        } else {
          for (Index m = 0; m < o.l; ++m)
            for (Index e = 0; e < width; ++e) token[e] += raw(b, i * o.d + m, g, e) / static_cast<double>(o.l);
        }
        for (Index e = 0; e < width; ++e) out(b, i, g, e) = round_to(o.storage, token[e]);
      }
  return out;
}

/// The rows of an array [B, rows, G, D] as an FP8 cache holds them.
Reals cached(const Reals& rows, bool fp8) {
  Reals out = rows;
  if (!fp8) return out;
  for (Index b = 0; b < rows.shape[0]; ++b)
    for (Index i = 0; i < rows.shape[1]; ++i)
      for (Index g = 0; g < rows.shape[2]; ++g) {
        Vector row = vector_at(rows, b, i, g);
        round_to_fp8(row);
        for (Index e = 0; e < rows.shape[3]; ++e) out(b, i, g, e) = row[e];
      }
  return out;
}

/// Probabilities of one query over the listed rows of group g. Scale 1/sqrt(Dk).
Vector probabilities(const Vector& q, const Reals& k, Index b, Index g, const std::vector<Index>& rows,
                     Storage stored = Storage::exact) {
  Vector scores;
  for (const Index row : rows) {
    double dot = 0;
    for (std::size_t e = 0; e < q.size(); ++e) dot += q[e] * k(b, row, g, e);
    scores.push_back(dot / std::sqrt(static_cast<double>(q.size())));
  }
  return rows.empty() ? Vector{} : softmax(scores, stored);
}

/// Attention of group g's heads at (b, t) over the listed rows; no rows: zero.
void attend_rows(const Options& o, Branch c, const Reals& q, const Reals& k, const Reals& v, Index b, Index t, Index g,
                 const std::vector<Index>& rows, Reals& out, Reals& rounding) {
  const Storage stored = o.rounds_p[c] ? o.storage : Storage::exact;
  const Index h = o.heads / o.groups;
  for (Index head = g * h; head < (g + 1) * h; ++head) {
    const Vector p = probabilities(vector_at(q, b, t, head), k, b, g, rows, stored);
    for (Index e = 0; e < o.d_v; ++e) {
      double squares = 0;
      for (std::size_t r = 0; r < rows.size(); ++r) {
        const double term = p[r] * v(b, rows[r], g, e);
        out(b, t, head, e) += term;
        squares += term * term;
      }
      rounding(b, t, head, e) = unit_roundoff(o.storage) * std::sqrt(squares / 3);
    }
  }
}

/// Compressed tokens all of whose positions are <= t.
std::vector<Index> valid_tokens(const Options& o, Index t) {
  std::vector<Index> rows;
  for (Index i = 0; i * o.d + o.l - 1 <= t; ++i) rows.push_back(i);
  return rows;
}

/// Importance of every block at (b, t, g), from the attention of its heads over the compressed tokens.
Vector importance(const Options& o, const Reals& overlaps, const Reals& q, const Reals& k_cmp, Index b, Index t,
                  Index g) {
  const std::vector<Index> valid = valid_tokens(o, t);
  const Index h = o.heads / o.groups, blocks = overlaps.shape[1];
  Vector s(blocks, 0.0);
  for (Index head = g * h; head < (g + 1) * h; ++head) {
    const Vector p = probabilities(vector_at(q, b, t, head), k_cmp, b, g, valid);
    for (const Index i : valid)
      for (Index j = 0; j < blocks; ++j) s[j] += p[i] * overlaps(i, j);
  }
  return s;
}

/// Blocks selected at t: the first, the most recent, then the most important; ascending.
std::vector<Index> select_blocks(const Options& o, const Vector& s, Index t) {
  std::vector<Index> eligible;
  for (Index j = 0; j * o.l_sel <= t; ++j) eligible.push_back(j);
  const Index count = static_cast<Index>(eligible.size());
  std::set<Index> chosen;
  for (Index c = 0; c < std::min(o.n_init, count); ++c) chosen.insert(eligible[c]);
  for (Index c = 0; c < std::min(o.n_local, count); ++c) chosen.insert(eligible[count - 1 - c]);
  std::stable_sort(eligible.begin(), eligible.end(), [&](Index a, Index b) { return s[a] > s[b]; });
  for (const Index j : eligible)
    if (static_cast<Index>(chosen.size()) < o.n_sel) chosen.insert(j);
  return {chosen.begin(), chosen.end()};
}

/// Positions <= t of the listed blocks; -1: no block.
std::vector<Index> positions_of(const Options& o, const std::vector<Index>& blocks, Index t) {
  std::vector<Index> rows;
  for (const Index j : blocks)
    for (Index m = 0; j >= 0 && m < o.l_sel; ++m)
      if (j * o.l_sel + m <= t) rows.push_back(j * o.l_sel + m);
  return rows;
}

std::vector<Index> given_blocks(const Options& o, const Chosen& given, Index b, Index t, Index g) {
  std::vector<Index> blocks;
  for (Index c = 0; c < o.n_sel; ++c) blocks.push_back(given.blocks(b, t - given.first_position, g, c));
  return blocks;
}

std::vector<Index> window(const Options& o, Index t) {
  std::vector<Index> rows;
  for (Index p = t - o.w + 1; p <= t; ++p)
    if (p >= 0) rows.push_back(p);
  return rows;
}

/// Sum of the branches' outputs times their gates, rounded to storage.
Reals gated_sum(const Options& o, const Reals& gate, const Reals (&o_branch)[3]) {
  const Index h = o.heads / o.groups;
  Reals out({o.batch, o.tokens, o.heads, o.d_v});
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t)
      for (Index head = 0; head < o.heads; ++head)
        for (Index e = 0; e < o.d_v; ++e) {
          double sum = 0;
          for (const int c : {cmp, sel, win}) sum += gate(b, t, head / h, c) * o_branch[c](b, t, head, e);
          out(b, t, head, e) = round_to(o.storage, sum);
        }
  return out;
}

Reals rmsnorm(const Options& o, const Reals& x) {
  Reals out(x.shape);
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t) {
      double mean_square = 0;
      for (Index c = 0; c < o.dim; ++c) mean_square += x(b, t, c) * x(b, t, c) / static_cast<double>(o.dim);
      for (Index c = 0; c < o.dim; ++c) out(b, t, c) = round_to(o.storage, x(b, t, c) / std::sqrt(mean_square + 1e-6));
    }
  return out;
}

}  // namespace

double overlap(const Options& options, std::int64_t i, std::int64_t j) {
  Index shared = 0;
  for (Index p = i * options.d; p < i * options.d + options.l; ++p) shared += p / options.l_sel == j ? 1 : 0;
  return static_cast<double>(shared) / static_cast<double>(options.d);
}

Projected project(const Options& o, const Weights& w, const Reals& x) {
  Projected out;
  out.q = project_heads(o, x, w.w_q, o.heads, true);
  for (const int c : {cmp, sel, win}) {
    const int source = o.shared_kv ? sel : c;
    out.k[c] = project_heads(o, x, w.w_k[source], o.groups, true);
    out.v[c] = project_heads(o, x, w.w_v[source], o.groups, false);
  }
  out.gate = Reals({o.batch, o.tokens, o.groups, 3});
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t)
      for (Index g = 0; g < o.groups; ++g) {
        const Vector gate = gates(o, w, out.q, b, t, g);
        for (const int c : {cmp, sel, win})
          out.gate(b, t, g, c) = o.force_branch < 0 ? gate[c] : o.force_branch == c ? 1.0 : 0.0;
      }
  return out;
}

Attended attend(const Options& o, const PhiWeights& phi_k, const PhiWeights& phi_v, const Projected& in,
                const std::optional<Chosen>& given) {
  Attended out;
  out.k_cmp_tokens = cached(compress(o, phi_k, in.k[cmp]), o.fp8_cmp);
  out.v_cmp_tokens = cached(compress(o, phi_v, in.v[cmp]), o.fp8_cmp);
  const Reals cached_k[] = {cached(in.k[sel], o.fp8_kv), cached(in.k[win], o.fp8_kv)};
  const Reals cached_v[] = {cached(in.v[sel], o.fp8_kv), cached(in.v[win], o.fp8_kv)};
  const Index tokens = out.k_cmp_tokens.shape[1], blocks = (o.tokens + o.l_sel - 1) / o.l_sel;
  Reals overlaps({tokens, blocks});
  for (Index i = 0; i < tokens; ++i)
    for (Index j = 0; j < blocks; ++j) overlaps(i, j) = overlap(o, i, j);

  out.p_slc = Reals({o.batch, o.tokens, o.groups, blocks});
  out.selected = Integers({o.batch, o.tokens, o.groups, o.n_sel}, -1);
  out.reads = Integers({o.batch, o.tokens, o.groups, 3});
  for (Reals* of_branch : {out.o_branch, out.rounding})
    std::fill_n(of_branch, 3, Reals({o.batch, o.tokens, o.heads, o.d_v}));
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t)
      for (Index g = 0; g < o.groups; ++g) {
        const Vector s = importance(o, overlaps, in.q, out.k_cmp_tokens, b, t, g);
        for (Index j = 0; j < blocks; ++j) out.p_slc(b, t, g, j) = s[j];
        std::vector<Index> chosen = select_blocks(o, s, t);
        for (std::size_t c = 0; c < chosen.size(); ++c) out.selected(b, t, g, c) = chosen[c];
        if (given && t >= given->first_position) chosen = given_blocks(o, *given, b, t, g);

        const std::vector<Index> rows[3] = {valid_tokens(o, t), positions_of(o, chosen, t), window(o, t)};
        const Reals* keys[3] = {&out.k_cmp_tokens, &cached_k[0], &cached_k[1]};
        const Reals* values[3] = {&out.v_cmp_tokens, &cached_v[0], &cached_v[1]};
        for (const Branch c : {cmp, sel, win}) {
          attend_rows(o, c, in.q, *keys[c], *values[c], b, t, g, rows[c], out.o_branch[c], out.rounding[c]);
          out.reads(b, t, g, c) = static_cast<Index>(rows[c].size());
        }
      }
  out.o = gated_sum(o, in.gate, out.o_branch);
  return out;
}

Reals output(const Options& o, const Reals& w_o, const Reals& heads) {
  Reals y({o.batch, o.tokens, o.dim});
  for (Index b = 0; b < o.batch; ++b)
    for (Index t = 0; t < o.tokens; ++t) {
      Vector row;
      for (Index head = 0; head < o.heads; ++head)
        for (Index e = 0; e < o.d_v; ++e) row.push_back(heads(b, t, head, e));
      const Vector out = multiply(row, w_o);
      for (Index c = 0; c < o.dim; ++c) y(b, t, c) = out[c];
    }
  return y;
}

Result run(const Options& o, const std::vector<Weights>& weights, const Reals& x, const std::optional<Chosen>& chosen) {
  Result result;
  result.x = x;
  for (Index i = 0; i < o.layers; ++i) {
    const Weights& w = weights.at(i);
    Layer layer;
    layer.projected = project(o, w, o.layers > 1 ? rmsnorm(o, result.x) : result.x);
    layer.attended = attend(o, w.phi_k, w.phi_v, layer.projected, i + 1 == o.layers ? chosen : std::nullopt);
    layer.y = output(o, w.w_o, layer.attended.o);
    for (std::size_t c = 0; c < layer.y.values.size(); ++c)
      result.x.values[c] = layer.y.values[c] + (o.layers > 1 ? result.x.values[c] : 0.0);
    result.layers.push_back(std::move(layer));
  }
  return result;
}

}  // namespace oracle
