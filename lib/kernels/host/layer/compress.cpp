// Compressed tokens: the mean over l positions, or the paper's learned form (paper, equation 7).
//
// mean: one token a loop iteration; reads l rows, writes one; bound by those bytes. mlp: batches of 64 tokens through
// two matrix products; bound by the bytes of w1 for few tokens, by the products for many.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "kernels/host/runtime/arena.hpp"
#include "kernels/host/runtime/stages.hpp"
#include "kernels/host/simd/cached_rows.hpp"
#include "kernels/host/simd/loops.hpp"
#include "kernels/host/simd/matmul.hpp"

namespace nsa::host {
namespace {

constexpr std::int64_t batch_tokens = 64;  ///< tokens of an mlp batch

std::int64_t hidden_width(const LayerShape& s, std::int32_t width) {
  return s.phi_hidden > 0 ? s.phi_hidden : 2 * std::int64_t{width};
}

/// A compressed token: plane and index.
struct Token {
  std::int64_t plane, i;
};

/// The tokens that complete within the query tile, by plane and index.
class CompletedTokens {
 public:
  explicit CompletedTokens(const CompressArgs& args) : groups_(args.shape.groups) {
    const QueryTile& tile = args.tile;
    for (std::int64_t i = 0; i < tile.batches; ++i) {
      const std::int64_t t0 = first_position(tile, i), begin = compressed_tokens(args.shape.rules, t0 - 1),
                         count = compressed_tokens(args.shape.rules, t0 + tile.tokens - 1) - begin;
      if (count > 0) sequences_.push_back({tokens_, (tile.batch_begin + i) * groups_, begin, count});
      tokens_ += count * groups_;
    }
  }
  Token token(std::int64_t index) const {
    const auto after = std::upper_bound(sequences_.begin(), sequences_.end(), index,
                                        [](std::int64_t i, const Sequence& s) { return i < s.first_index; });
    const Sequence& s = *std::prev(after);
    return {s.first_plane + (index - s.first_index) / s.count, s.begin + (index - s.first_index) % s.count};
  }
  std::int64_t tokens() const { return tokens_; }

 private:
  /// Tokens [begin, begin + count) of every group of a sequence that completes any.
  struct Sequence {
    std::int64_t first_index, first_plane, begin, count;
  };
  std::vector<Sequence> sequences_;
  std::int64_t groups_, tokens_ = 0;
};

bool owns(const KvView& compressed, std::int64_t i) { return has_chunk(compressed.map, chunk_of(compressed.map, i)); }

/// Whether token i is also in the halo of the next chunk on this rank. That chunk may have no memory yet.
bool in_halo(const CompressArgs& args, const KvView& compressed, std::int64_t i) {
  const RowMap& map = compressed.map;
  if (!args.fill_halo || map.halo == 0) return false;
  const std::int64_t next = chunk_of(map, i) + 1;
  return i >= next * map.chunk - map.halo && has_chunk(map, next) &&
         (row_in_chunk(map, next, i) + 1) * compressed.width <= compressed.plane_stride;
}

bool wanted(const CompressArgs& args, const KvView& compressed, std::int64_t i) {
  return owns(compressed, i) || in_halo(args, compressed, i);
}

void store_token(const CompressArgs& args, const KvView& compressed, const Token& token, const float* value) {
  const std::int64_t c = chunk_of(compressed.map, token.i);
  const auto store_at = [&](std::int64_t chunk) {
    if (!writes_row(compressed, token.plane, chunk, token.i)) return;
    store_row(args.shape.dtype, compressed, token.plane, chunk, token.i, value);
  };
  if (owns(compressed, token.i)) store_at(c);
  if (in_halo(args, compressed, token.i)) store_at(c + 1);
}

/// Row m of the l positions under a compressed token, fp32.
void load_row(const CompressArgs& args, const KvView& raw, const Token& token, std::int32_t m, float* to) {
  const std::int64_t position = token.i * args.shape.rules.d + m;
  const std::int64_t c = chunk_of(raw.map, token.i * args.shape.rules.d);
  load_rows(args.shape.dtype, 1, raw.width, cached_rows(args.shape.dtype, raw, token.plane, c, position), to);
}

void compress_mean(const CompressArgs& args, const CompletedTokens& completed, const KvView& raw,
                   const KvView& compressed, float* scratch) {
  const std::int32_t l = args.shape.rules.l, width = raw.width;
#pragma omp parallel for if (completed.tokens() > 8)
  for (std::int64_t index = 0; index < completed.tokens(); ++index) {
    const Token token = completed.token(index);
    if (!wanted(args, compressed, token.i)) continue;
    float* row = scratch + omp_get_thread_num() * 2 * std::int64_t{width};
    float* sum = row + width;
    std::fill_n(sum, width, 0.0f);
    for (std::int32_t m = 0; m < l; ++m) {
      load_row(args, raw, token, m, row);
      for (std::int32_t e = 0; e < width; ++e) sum[e] += row[e];
    }
    for (std::int32_t e = 0; e < width; ++e) sum[e] *= 1.0f / static_cast<float>(l);
    store_token(args, compressed, token, sum);
  }
}

struct MlpBuffers {
  MlpBuffers(Arena& arena, const LayerShape& s, std::int32_t width, std::int64_t tokens)
      : pos(arena.allocate<float>(std::int64_t{s.rules.l} * width)),
        flat(arena.allocate<float>(tokens * s.rules.l * width)),
        hidden(arena.allocate<float>(tokens * hidden_width(s, width))),
        value(arena.allocate<float>(tokens * width)) {}
  float *pos, *flat, *hidden, *value;
};

void compress_mlp(const CompressArgs& args, const CompletedTokens& completed, const PhiWeights& phi, const KvView& raw,
                  const KvView& compressed, Arena arena) {
  const LayerShape& s = args.shape;
  const std::int64_t width = raw.width, flat_width = s.rules.l * width, hidden = hidden_width(s, raw.width);
  const MlpBuffers b(arena, s, raw.width, batch_tokens);
  load(s.dtype, flat_width, phi.pos, b.pos);
  Token batch[batch_tokens];
  for (std::int64_t index = 0; index < completed.tokens();) {
    std::int64_t n = 0;
    for (; index < completed.tokens() && n < batch_tokens; ++index)
      if (wanted(args, compressed, completed.token(index).i)) batch[n++] = completed.token(index);
    if (n == 0) break;
#pragma omp parallel for if (n > 4)
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int32_t m = 0; m < s.rules.l; ++m)
        load_row(args, raw, batch[i], m, b.flat + i * flat_width + m * width);
      for (std::int64_t e = 0; e < flat_width; ++e) b.flat[i * flat_width + e] += b.pos[e];
    }
    matmul(arena, s.dtype, n, flat_width, hidden, b.flat, phi.w1, b.hidden);
    for (std::int64_t e = 0; e < n * hidden; ++e) b.hidden[e] /= 1.0f + std::exp(-b.hidden[e]);
    matmul(arena, s.dtype, n, hidden, width, b.hidden, phi.w2, b.value);
    for (std::int64_t i = 0; i < n; ++i) store_token(args, compressed, batch[i], b.value + i * width);
  }
}

}  // namespace

std::size_t compress_scratch(const LayerShape& s, const QueryTile&) {
  const std::int32_t width = std::max(s.d_k, s.d_v);
  Arena arena;
  if (s.phi == PhiKind::mean) {
    arena.allocate<float>(threads() * 2 * std::int64_t{width});
  } else {
    MlpBuffers(arena, s, width, batch_tokens);
    matmul_scratch(arena);
  }
  return arena.used();
}

void compress(const CompressArgs& args, Stream*) {
  const CompletedTokens completed(args);
  if (completed.tokens() == 0) return;
  Arena arena(args.scratch, args.scratch_bytes);
  if (args.shape.phi == PhiKind::mlp) {
    compress_mlp(args, completed, args.phi_k, args.k_raw, args.k_cmp, arena);
    compress_mlp(args, completed, args.phi_v, args.v_raw, args.v_cmp, arena);
    return;
  }
  float* scratch = arena.allocate<float>(threads() * 2 * std::int64_t{std::max(args.shape.d_k, args.shape.d_v)});
  compress_mean(args, completed, args.k_raw, args.k_cmp, scratch);
  compress_mean(args, completed, args.v_raw, args.v_cmp, scratch);
}

}  // namespace nsa::host
