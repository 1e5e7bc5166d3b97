// The rows of K and V that a prefill chunk takes from its caches and from other ranks, and those that it leaves there.

#include <algorithm>

#include "nsa/forward/prefill.hpp"

namespace nsa {

namespace {

// A view of memory that begins with memory row `row` of the view's map.
KvView begin_at(const KvView& view, std::int64_t row, DType type) {
  return moved_by(view, -row * view.width, -row, type);
}

void gather_pair(const char* what, const ModelShard& shard, const KvPair& own, const KvPair& all, Stream* stream) {
  const auto gather = [&](const KvView& from, const KvView& to) {
    shard.comms->kv.all_gather(what, from.data, to.data, bytes_of_rank(from, shard.shape().dtype), stream);
  };
  gather(own.k, all.k);
  gather(own.v, all.v);
}

}  // namespace

void PrefillRunner::copy_rows(const KvView& src, const KvView& dst, std::int64_t first, std::int64_t last,
                              std::int64_t span_begin, std::int64_t span_end, Stream* stream) {
  shard_.kernels().copy_rows({shard_.shape().dtype, src, dst, shard_.planes(), first, last, span_begin, span_end},
                             stream);
}

// The window's tokens before the chunk, and the positions of compressed tokens that it completes.
void PrefillRunner::read_rings(const PrefillChunk& chunk, std::int64_t layer) {
  if (chunk.first == 0) return;
  const LayerCaches& cache = shard_.caches[static_cast<std::size_t>(layer)];
  const Partition& p = shard_.partition;
  const BlockRules& r = p.shape.rules;
  const std::int64_t stored = p.kv == 1 ? chunk.first : p.chunk_tokens;  // rows of a KV chunk
  const std::int64_t raw_first = std::max<std::int64_t>(0, chunk.first - r.l);
  copy_rows(cache.raw.k, raw_.k, raw_first, chunk.first, 0, stored + r.l - r.d);
  copy_rows(cache.raw.v, raw_.v, raw_first, chunk.first, 0, stored + r.l - r.d);
  if (p.shape.shared_kv) return;
  const std::int64_t win_first = std::max<std::int64_t>(0, chunk.first - r.w);
  const KvPair& to = p.kv == 1 ? win_ : win_all_;
  copy_rows(cache.win.k, to.k, win_first, chunk.first, 0, stored);
  copy_rows(cache.win.v, to.v, win_first, chunk.first, 0, stored);
}

// A KV chunk's last compressed tokens reach l - d positions into the next one, which another rank holds.
void PrefillRunner::exchange_raw_halo(const PrefillChunk& chunk) {
  const Partition& p = shard_.partition;
  const std::int64_t halo = p.shape.rules.l - p.shape.rules.d;
  if (p.kv == 1 || halo == 0) return;
  copy_rows(raw_.k, heads_.k, chunk.first, chunk.end, 0, halo);
  copy_rows(raw_.v, heads_.v, chunk.first, chunk.end, 0, halo);
  gather_pair("raw halo", shard_, heads_, heads_all_, shard_.streams.compute);
  copy_rows(heads_all_.k, raw_.k, chunk.first, chunk.end, p.chunk_tokens, p.chunk_tokens + halo);
  copy_rows(heads_all_.v, raw_.v, chunk.first, chunk.end, p.chunk_tokens, p.chunk_tokens + halo);
}

// Whether buffers that serve all layers hold the rows before the chunk. The first chunk copies the prefix again: the
// run before may have been of another one.
bool PrefillRunner::holds_earlier(const PrefillChunk& chunk) const {
  return shard_.config.model.layers == 1 && (chunk.first == 0 || chunk.first > range_.first);
}

const KvPair& PrefillRunner::sel_in_order(const PrefillChunk& chunk, std::int64_t layer, Stream* stream) {
  const KvPair& cache = shard_.caches[static_cast<std::size_t>(layer)].sel;
  if (!shard_.pages) return cache;
  const std::int64_t first = holds_earlier(chunk) ? chunk.first : 0, span = std::min(cache.k.map.chunk, chunk.end);
  copy_rows(cache.k, sel_rows_.k, first, chunk.end, 0, span, stream);
  copy_rows(cache.v, sel_rows_.v, first, chunk.end, 0, span, stream);
  return sel_rows_;
}

const KvPair& PrefillRunner::cmp_in_order(const PrefillChunk& chunk, std::int64_t layer, Stream* stream) {
  const KvPair& cache = shard_.caches[static_cast<std::size_t>(layer)].cmp;
  if (!shard_.pages) return cache;
  const BlockRules& r = shard_.shape().rules;
  const std::int64_t first = holds_earlier(chunk) ? compressed_tokens(r, chunk.first - 1) : 0,
                     last = compressed_tokens(r, chunk.end - 1), span = std::min(cache.k.map.chunk, last);
  copy_rows(cache.k, cmp_rows_.k, first, last, 0, span, stream);
  copy_rows(cache.v, cmp_rows_.v, first, last, 0, span, stream);
  return cmp_rows_;
}

PrefillRunner::CacheViews PrefillRunner::gathered(const PrefillChunk& chunk, std::int64_t layer) {
  const auto views = [](const KvPair& of_cmp, const KvPair& of_sel, const KvPair& of_win) {
    return CacheViews{{of_cmp.k, of_sel.k, of_win.k}, {of_cmp.v, of_sel.v, of_win.v}};
  };
  if (shard_.partition.kv == 1) {
    const KvPair &compressed = cmp_in_order(chunk, layer, shard_.streams.compute),
                 &tokens = sel_in_order(chunk, layer, shard_.streams.compute);
    return views(compressed, tokens, shard_.shape().shared_kv ? tokens : win_);
  }
  return views(cmp_all_, sel_all_, shard_.shape().shared_kv ? sel_all_ : win_all_);
}

// The chunk's own rows of all ranks.
void PrefillRunner::gather_rows(const char* what, const PrefillChunk& chunk, const KvPair& own, const KvPair& all,
                                Stream* stream) {
  const Partition& p = shard_.partition;
  const std::int64_t row = memory_rows(own.k.map, chunk).first;
  const auto copy = [&](const KvView& from, const KvView& to) {
    copy_rows(from, to, chunk.first, chunk.end, 0, p.chunk_tokens, stream);
  };
  copy(own.k, begin_at(piece_.k, row, p.shape.dtype));
  copy(own.v, begin_at(piece_.v, row, p.shape.dtype));
  gather_pair(what, shard_, piece_, piece_all_, stream);
  copy(begin_at(piece_all_.k, row, p.shape.dtype), all.k);
  copy(begin_at(piece_all_.v, row, p.shape.dtype), all.v);
}

// The window's rows before the chunk come from the ring; those of sel are gathered again where other layers' rows have
// taken their place, and in the first chunk.
void PrefillRunner::gather_tokens(const PrefillChunk& chunk, std::int64_t layer, Stream* stream) {
  const KvPair& own = sel_in_order(chunk, layer, stream);
  if (range_.in_parts() && holds_earlier(chunk))
    gather_rows("k_sel, v_sel", chunk, own, sel_all_, stream);
  else
    gather_pair("k_sel, v_sel", shard_, own, sel_all_, stream);
  if (shard_.shape().shared_kv) return;
  if (range_.in_parts())
    gather_rows("k_win, v_win", chunk, win_, win_all_, stream);
  else
    gather_pair("k_win, v_win", shard_, win_, win_all_, stream);
}

void PrefillRunner::gather_compressed(const PrefillChunk& chunk, std::int64_t layer) {
  LayerCaches& cache = shard_.caches[static_cast<std::size_t>(layer)];
  Stream* stream = shard_.streams.compute;
  gather_pair("k_cmp, v_cmp", shard_, cmp_in_order(chunk, layer, stream), cmp_all_, stream);
  // Decode also scores the compressed tokens before each chunk that reach into its first block.
  const std::int64_t halo = cache.cmp.k.map.halo;
  const std::int64_t tokens = compressed_tokens(shard_.shape().rules, chunk.end - 1);
  for (const bool value : {false, true})
    shard_.kernels().copy_rows({shard_.shape().dtype, value ? cmp_all_.v : cmp_all_.k,
                                value ? cache.cmp.v : cache.cmp.k, shard_.planes(), 0, tokens, -halo, 0},
                               stream);
}

// Fills the rings that decode, or the next prefill chunk, starts from: the last w tokens of the window, the last l of
// the cmp projections, on every rank. A ragged batch is prefilled to its longest sequence, and every ring ends with its
// own sequence.
void PrefillRunner::fill_rings(const PrefillChunk& chunk, std::int64_t layer, const CacheViews& caches) {
  const Partition& p = shard_.partition;
  LayerCaches& cache = shard_.caches[static_cast<std::size_t>(layer)];
  const auto copy = [&](const KvView& src, const KvView& dst, const SequenceRange& some, std::int64_t first,
                        std::int64_t last) {
    const LayerShape& s = p.shape;
    shard_.kernels().copy_rows(
        {s.dtype, of_sequences(src, some, s.groups, s.dtype), of_sequences(dst, some, s.groups, s.dtype),
         some.count * s.groups, first, last, 0, last},
        shard_.streams.compute);
  };
  const auto first_of = [](std::int64_t ring, std::int64_t last) { return std::max<std::int64_t>(0, last - ring); };
  for (const SequenceRange& some : equal_sequences(shard_.point)) {
    const std::int64_t last = end_of(shard_.point, some, chunk.end);
    copy(caches.k[win], cache.win.k, some, first_of(p.shape.rules.w, last), last);
    copy(caches.v[win], cache.win.v, some, first_of(p.shape.rules.w, last), last);
    copy(raw_.k, cache.raw.k, some, first_of(p.shape.rules.l, last), last);
    copy(raw_.v, cache.raw.v, some, first_of(p.shape.rules.l, last), last);
  }
  if (p.kv == 1) return;
  gather_pair("raw ring", shard_, cache.raw, ring_all_, shard_.streams.compute);
  for (const SequenceRange& some : equal_sequences(shard_.point)) {
    const std::int64_t last = end_of(shard_.point, some, chunk.end), first = first_of(p.shape.rules.l, last);
    for (std::int64_t c = first / p.chunk_tokens; c * p.chunk_tokens < last; ++c)
      for (const bool value : {false, true}) {
        const KvView& all = value ? ring_all_.v : ring_all_.k;
        const std::int64_t elements = owner_of_chunk(p.tokens(true), c) * all.rank_stride;
        copy(moved_by(all, elements, 0, p.shape.dtype), value ? cache.raw.v : cache.raw.k, some,
             std::max(first, c * p.chunk_tokens), std::min(last, (c + 1) * p.chunk_tokens));
      }
  }
}

}  // namespace nsa
