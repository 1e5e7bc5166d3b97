#pragma once
// The stages by name; table.cu gathers them.

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

void project(const ProjectArgs&, Stream*);
void append(const AppendArgs&, Stream*);
void compress(const CompressArgs&, Stream*);
void rank(const RankArgs&, Stream*);
void select(const SelectArgs&, Stream*);
void combine(const CombineArgs&, Stream*);
void output(const OutputArgs&, Stream*);
void rmsnorm(const LayerShape&, std::int64_t rows, const float* x, void* out, bool normalise, Stream*);
void add(std::int64_t count, float* x, const float* y, Stream*);
void copy_rows(const CopyRowsArgs&, Stream*);
void checksum(const ChecksumArgs&, Stream*);
void fill_rows(const FillRowsArgs&, Stream*);
void advance(const AdvanceArgs&, Stream*);

/// Any shape, any type: scalar arithmetic, one CTA a (row, group, split). attend.cu
void attend_general(Branch branch, const AttendArgs&, Stream*);

/// One query row a sequence, tensor cores or (fp32) scalar; a map it does not read goes to the general kernel.
/// decode.cu
void attend_decode(Branch branch, const AttendArgs&, Stream*);
bool decode_accepts(const LayerShape&, const QueryTile&);
bool decode_reads_map(Branch branch, const LayerShape&, const RowMap&);

/// By matrix products (dense.cu): any shape, and masked where one row's scores of all tokens fit the scratch.
void attend_sdpa(Branch branch, const AttendArgs&, Stream*);
void attend_masked(Branch branch, const AttendArgs&, Stream*);
bool masked_accepts(const LayerShape&, const QueryTile&);

/// Prefill, 16-bit storage, capability 9.0: dense tiles for cmp and win, shared blocks for sel, scores formed by rank.
/// attend_prefill.cu, attend_prefill_sel.cu, rank_prefill.cu
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
/// what lies in its out.o, to `o` [rows, H, Dv] in storage type. prefill_step.cu has both.
void attend_prefill_gated(const AttendArgs& of_cmp, const AttendArgs& of_win, const float* gate, Stream*);
void attend_prefill_sel_gated(const AttendArgs&, const float* gate, void* o, Stream*);
bool prefill_step_accepts(const DecodeStepArgs&);
void prefill_step(const DecodeStepArgs&, Stream*);

/// project, append and compress of a decode step in two launches. project.cu
void decode_enter(const DecodeEnterArgs&, Stream*);
/// From cmp to combine in one launch or four. step.cu, decode_step.cu
bool decode_step_accepts(const DecodeStepArgs&);
void decode_step(const DecodeStepArgs&, Stream*);

/// The launches of a step between its exchanges, where ranks share the sequences. decode_shard.cu
bool decode_shard_accepts(const DecodeShardArgs&);
void decode_open(const DecodeShardArgs&, Stream*);
void decode_weigh(const DecodeShardArgs&, Stream*);
void decode_combine(const DecodeShardArgs&, Stream*);

/// Row by row, 16-bit storage, tensor cores. attend_decode.cu
void attend_rows(Branch branch, const AttendArgs&, Stream*);
bool rows_accept(const LayerShape&, const QueryTile&);
bool rows_read_map(Branch branch, const LayerShape&, const RowMap&);

/// Bytes a stage asks of the scratch; the three branches may run side by side, each in its own part.
std::size_t project_scratch(const LayerShape&, const QueryTile&);
std::size_t attend_scratch(const LayerShape&, const QueryTile&);  ///< of one branch
std::size_t decode_scratch(const LayerShape&, const QueryTile&);
std::size_t sdpa_scratch(const LayerShape&, const QueryTile&);    ///< of one branch
std::size_t masked_scratch(const LayerShape&, const QueryTile&);  ///< of one branch
std::size_t rows_scratch(const LayerShape&, const QueryTile&);
std::size_t rank_scratch(const LayerShape&, const QueryTile&);

}  // namespace nsa::gpu
