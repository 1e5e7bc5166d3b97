#pragma once
// Rows of FP8 caches (shared/e4m3.hpp), and of caches that hold the values of such rows in storage type
// (KvView::rounded).

#include "kernels/cuda/runtime/common.cuh"

namespace nsa::gpu {

/// Rounds the rows that append stored, where a cache holds E4M3 values.
void round_appended(const AppendArgs&, Stream*);
/// The same of the compressed tokens that complete within the tile, halo copies included.
void round_compressed(const CompressArgs&, Stream*);
/// The same of the rows [first, last) that the view holds, halos and rows after a chunk included.
void round_rows(DType, const KvView&, std::int64_t planes, std::int64_t first, std::int64_t last, Stream*);

/// append, compress (by the mean), copy_rows, fill_rows and checksum of quantised views. Of a copy one view may be in
/// storage type.
void append_quantised(const AppendArgs&, Stream*);
void compress_quantised(const CompressArgs&, Stream*);
/// A decode step's append and compress of quantised caches that hold every position or the last ones, in one launch.
void quantised_prologue(const PrologueArgs&, Stream*);
void copy_quantised_rows(const CopyRowsArgs&, std::int64_t first_chunk, std::int64_t chunks, std::int64_t span,
                         Stream*);
void fill_quantised_rows(const FillRowsArgs&, Stream*);
void checksum_scales(const ChecksumArgs&, Stream*);

}  // namespace nsa::gpu
