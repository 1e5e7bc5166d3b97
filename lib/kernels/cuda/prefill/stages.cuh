#pragma once
// Prefill: tiles of query rows.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// Prefill, 16-bit storage, capability 9.0: dense tiles for cmp and win, shared blocks for sel, scores formed by rank.
/// prefill/dense/kernel.cu, prefill/selected/kernel.cu, prefill/rank/rank.cu
bool prefill_accepts(Branch branch, const LayerShape&, const RowMap&);
void attend_prefill(Branch branch, const AttendArgs&, Stream*);
bool prefill_sel_accepts(const LayerShape&, const RowMap&);
void attend_prefill_sel(const AttendArgs&, Stream*);
/// Whether the tile's items, 12 queries a CTA, keep enough SMs busy. Fewer rows are done sooner one by one.
bool prefill_sel_pays(const LayerShape&, const QueryTile&);
bool tiles_shape(const LayerShape&);  ///< what the two need of a shape; rank takes no others
void rank_prefill(const RankArgs&, Stream*);
std::size_t rank_prefill_scratch(const LayerShape&, const QueryTile&);

/// A prefill tile from cmp to combine without partials. First o of win and cmp, normalised, weighed with the gates
/// [rows, groups, 3] and added, to cmp's out.o (and cmp's (m, sum) to its out.ms); then, behind rank, sel's on top of
/// what lies in its out.o, to `o` [rows, H, Dv] in storage type. prefill/attention.cu has both.
void attend_prefill_gated(const AttendArgs& of_cmp, const AttendArgs& of_win, const float* gate, Stream*);
void attend_prefill_sel_gated(const AttendArgs&, const float* gate, void* o, Stream*);
bool prefill_attention_accepts(const AttentionArgs&);
void prefill_attention(const AttentionArgs&, Stream*);

}  // namespace nsa::gpu
