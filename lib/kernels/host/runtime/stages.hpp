#pragma once
// The host stages of the kernel table; interface/kernel_table.hpp describes each at its arguments. `*_scratch`: bytes
// of scratch that the stage takes.

#include <cstddef>

#include "kernels/interface/kernel_table.hpp"

namespace nsa::host {

void project(const ProjectArgs& args, Stream*);
std::size_t project_scratch(const LayerShape& s, const QueryTile& tile);
void output(const OutputArgs& args, Stream*);
std::size_t output_scratch(const LayerShape& s, const QueryTile& tile);
void rmsnorm(const LayerShape& s, std::int64_t rows, const float* x, void* out, bool normalise, Stream*);
void add(std::int64_t count, float* x, const float* y, Stream*);

void compress(const CompressArgs& args, Stream*);
std::size_t compress_scratch(const LayerShape& s, const QueryTile& tile);

void rank(const RankArgs& args, Stream*);
std::size_t rank_scratch(const LayerShape& s, const QueryTile& tile);
void select(const SelectArgs& args, Stream*);
void combine(const CombineArgs& args, Stream*);

void append(const AppendArgs& args, Stream*);
void copy_rows(const CopyRowsArgs& args, Stream*);
void checksum(const ChecksumArgs& args, Stream*);
void fill_rows(const FillRowsArgs& args, Stream*);
void advance(const AdvanceArgs& args, Stream*);

}  // namespace nsa::host
