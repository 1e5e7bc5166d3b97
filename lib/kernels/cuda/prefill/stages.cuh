#pragma once
// Prefill's stages and fused prefill attention: tiles of query rows.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/accepts.hpp"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

/// 16-bit storage, capability 9.0: dense tiles for cmp and win (prefill/dense/kernel.cu), shared blocks for sel
/// (prefill/selected/kernel.cu), block scores recomputed from q and k_cmp (prefill/rank/rank.cu).
bool prefill_accepts(Branch branch, const LayerShape&, const RowMap&);
void attend_prefill(Branch branch, const AttendArgs&, Stream*);
bool prefill_sel_accepts(const LayerShape&, const RowMap&);
void attend_prefill_sel(const AttendArgs&, Stream*);
/// Whether the tile has enough work items of 12 queries to keep the SMs busy. Fewer rows are faster row by row.
bool prefill_sel_pays(const LayerShape&, const QueryTile&);
void rank_prefill(const RankArgs&, Stream*);

/// Fused prefill attention, from cmp to combine without partials (prefill/attention.cu). First o of win and cmp,
/// normalised, multiplied by the gates [rows, groups, 3] and added, to cmp's out.o, and cmp's (m, sum) to its out.ms.
/// After the rank stage sel's o is added to its out.o, and the sum is stored to `o` [rows, H, Dv] in storage type.
void attend_prefill_gated(const AttendArgs& of_cmp, const AttendArgs& of_win, const float* gate, Stream*);
void attend_prefill_sel_gated(const AttendArgs&, const float* gate, void* o, Stream*);
bool prefill_attention_accepts(const AttentionArgs&);
void prefill_attention(const AttentionArgs&, Stream*);

}  // namespace nsa::gpu
