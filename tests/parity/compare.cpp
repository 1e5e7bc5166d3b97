#include "parity/compare.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "catch.hpp"

namespace parity {
namespace {

using oracle::Integers;
using oracle::Options;
using oracle::Reals;

std::vector<std::int64_t> blocks_at(const Integers& selected, std::int64_t b, std::int64_t r, std::int64_t g) {
  std::vector<std::int64_t> blocks;
  for (std::int64_t c = 0; c < selected.shape[3]; ++c) blocks.push_back(selected(b, r, g, c));
  return blocks;
}

/// Ascending, then -1 to the end, with the required number of blocks.
bool well_formed(const Options& o, std::vector<std::int64_t> blocks, std::int64_t t) {
  const std::int64_t recent = t / o.l_sel;
  const auto end = std::find(blocks.begin(), blocks.end(), -1);
  if (std::any_of(end, blocks.end(), [](std::int64_t j) { return j != -1; })) return false;
  blocks.erase(end, blocks.end());
  const std::set<std::int64_t> unique(blocks.begin(), blocks.end());
  if (!std::is_sorted(blocks.begin(), blocks.end()) || unique.size() != blocks.size()) return false;
  if (static_cast<std::int64_t>(blocks.size()) != std::min(o.n_sel, recent + 1)) return false;
  for (std::int64_t j = 0; j <= recent; ++j)
    if ((j < o.n_init || recent - j < o.n_local) && !unique.count(j)) return false;
  return unique.empty() || (*unique.begin() >= 0 && *unique.rbegin() <= recent);
}

}  // namespace

Deviation deviation(const Reals& a, const Reals& b) {
  Deviation d;
  double scale = 0;
  for (std::size_t i = 0; i < b.values.size(); ++i) {
    const double difference = std::abs(a.values.at(i) - b.values[i]);
    if (!std::isfinite(difference)) return {std::numeric_limits<double>::infinity(), 0};
    d.largest = std::max(d.largest, difference);
    d.mean += difference / static_cast<double>(b.values.size());
    scale = std::max(scale, std::abs(b.values[i]));
  }
  if (scale == 0) return d;  // all zero must be equal exactly
  return {d.largest / scale, d.mean / scale};
}

double largest_of(const Reals& values) {
  double largest = 0;
  for (const double value : values.values) largest = std::max(largest, std::abs(value));
  return largest;
}

Bound bound_of(const Options& o) {
  const std::int64_t longest =
      std::max({o.dim, o.heads * o.d_v, o.tokens, o.mlp_phi ? o.l * std::max(o.d_k, o.d_v) : 1});
  const double links = 6.0 * static_cast<double>(o.layers);
  const double fp32 = 2 * links * std::sqrt(static_cast<double>(longest)) * std::ldexp(1, -24);
  if (o.storage == oracle::Storage::fp32) return {fp32, fp32 / 4};
  const double ulps = 2 * oracle::unit_roundoff(o.storage) * static_cast<double>(o.layers);
  return {2 * ulps + fp32, (o.layers > 1 ? ulps / 20 : ulps / 50) + fp32};
}

Bound moved(const Bound& bound, const Reals& values, const Reals& moves) {
  const double scale = largest_of(values);
  double mean = 0;
  for (const double value : moves.values) mean += value / static_cast<double>(moves.values.size());
  return {bound.largest, bound.mean + (scale > 0 ? mean / scale : 0)};
}

template <class T>
oracle::Array<T> rows_of(const oracle::Array<T>& array, const FirstPositions& first, std::int64_t rows) {
  std::vector<std::int64_t> shape = array.shape;
  const std::int64_t all = shape.at(1);
  shape[1] = rows;
  oracle::Array<T> out(shape);
  const std::int64_t width = rows * shape[0] > 0 ? static_cast<std::int64_t>(out.values.size()) / (rows * shape[0]) : 0;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    if (first(b) < 0 || first(b) + rows > all) throw std::out_of_range("rows_of: rows outside of the array");
    std::copy_n(array.values.begin() + (b * all + first(b)) * width, rows * width,
                out.values.begin() + b * rows * width);
  }
  return out;
}
template Reals rows_of(const Reals&, const FirstPositions&, std::int64_t);
template Integers rows_of(const Integers&, const FirstPositions&, std::int64_t);

SelectionDifference compare_selections(const Options& o, const Integers& a, const Integers& b, const Reals& scores,
                                       const FirstPositions& first_position) {
  SelectionDifference result;
  for (std::int64_t s = 0; s < a.shape[0]; ++s)
    for (std::int64_t r = 0; r < a.shape[1]; ++r)
      for (std::int64_t g = 0; g < a.shape[2]; ++g) {
        const auto taken = blocks_at(a, s, r, g), own = blocks_at(b, s, r, g);
        ++result.total;
        result.well_formed = result.well_formed && well_formed(o, taken, first_position(s) + r);
        if (taken == own) continue;
        ++result.differing;
        for (const std::int64_t in : taken)
          for (const std::int64_t out : own)
            if (in >= 0 && out >= 0 && !std::count(own.begin(), own.end(), in) &&
                !std::count(taken.begin(), taken.end(), out))
              result.widest_gap = std::max(result.widest_gap, std::abs(scores(s, r, g, out) - scores(s, r, g, in)));
      }
  return result;
}

void check_close(const std::string& what, const Reals& a, const Reals& b, const Bound& bound) {
  INFO(what);
  CHECK(a.shape == b.shape);
  if (a.shape != b.shape) return;
  const Deviation d = deviation(a, b);
  CHECK(d.largest <= bound.largest);
  CHECK(d.mean <= bound.mean);
}

SelectionDifference check_selection(const Options& o, const Integers& a, const Integers& b, const Reals& scores,
                                    const FirstPositions& first_position) {
  INFO("selected");
  CHECK(a.shape == b.shape);
  if (a.shape != b.shape) return {};
  const SelectionDifference d = compare_selections(o, a, b, scores, first_position);
  // Both scores of a tie carry the error of p_slc, whose largest value is at most h heads times l'/d.
  double largest = 0;
  for (const double s : scores.values) largest = std::max(largest, s);
  INFO(d.differing << " of " << d.total << " choices differ");
  CHECK(d.well_formed);
  CHECK(d.widest_gap <= 2 * bound_of(o).largest * largest);
  CHECK(d.differing <= d.total / 50 + 1);  // ties are rare
  return d;
}

}  // namespace parity
