#pragma once
// The stages of a layer around its attention.

#include "kernels/cuda/runtime/common.cuh"
#include "kernels/cuda/sizes/scratch.hpp"

namespace nsa::gpu {

void project(const ProjectArgs&, Stream*);
void append(const AppendArgs&, Stream*);
void compress(const CompressArgs&, Stream*);
void combine(const CombineArgs&, Stream*);
void output(const OutputArgs&, Stream*);
void rmsnorm(const LayerShape&, std::int64_t rows, const float* x, void* out, bool normalise, Stream*);
void add(std::int64_t count, float* x, const float* y, Stream*);
void copy_rows(const CopyRowsArgs&, Stream*);
void checksum(const ChecksumArgs&, Stream*);
void fill_rows(const FillRowsArgs&, Stream*);
void advance(const AdvanceArgs&, Stream*);

/// Fused prologue of a decode step: project, append and compress in two launches. layer/project.cu
void decode_prologue(const PrologueArgs&, Stream*);

/// The product of project in its scratch: [rows, qkv_columns].
float* project_product(const ProjectArgs&, Stream*);

}  // namespace nsa::gpu
