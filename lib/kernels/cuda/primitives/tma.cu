// The driver encodes tensor maps. Its entry point is looked up at run time, so that nothing links against libcuda.

#include <algorithm>

#include "kernels/cuda/primitives/tma.cuh"

namespace nsa::gpu {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw UserError("cuTensorMapEncodeTiled is missing (the driver is older than CUDA 12.0); update it",
                      ExitCode::device);
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

// `strides` in bytes, of every dimension but the first; any value for a dimension of size one. A box takes every
// `row_stride`-th element of the second dimension.
template <int Rank>
CUtensorMap encode(const void* data, DType type, const cuuint64_t (&sizes)[Rank], const cuuint64_t (&strides)[Rank - 1],
                   const cuuint32_t (&box)[Rank], int row_stride = 1) {
  CUtensorMap map;
  cuuint32_t element_strides[Rank];
  std::fill_n(element_strides, Rank, 1u);
  element_strides[1] = static_cast<cuuint32_t>(row_stride);
  const CUresult code =
      encoder()(&map, type == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, Rank,
                const_cast<void*>(data), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) throw InternalError("cuTensorMapEncodeTiled: code " + std::to_string(code));
  return map;
}

}  // namespace

CUtensorMap kv_tensor_map(const KvView& view, DType type, std::int64_t planes, int box_rows, int row_stride,
                          int first_column) {
  const auto size = static_cast<std::int64_t>(size_of(type));
  const std::int64_t ranks = view.map.chunk == INT64_MAX ? 1 : view.map.kv, row = view.width * size;
  const std::int64_t plane = std::max(view.plane_stride * size, row), rank = std::max(view.rank_stride * size, plane);
  return encode<4>(static_cast<const char*>(view.data) + first_column * size, type,
                   {static_cast<cuuint64_t>(view.width - first_column), static_cast<cuuint64_t>(plane / row),
                    static_cast<cuuint64_t>(planes), static_cast<cuuint64_t>(ranks)},
                   {static_cast<cuuint64_t>(row), static_cast<cuuint64_t>(plane), static_cast<cuuint64_t>(rank)},
                   {box_columns, static_cast<cuuint32_t>(box_rows), 1, 1}, row_stride);
}

CUtensorMap query_tensor_map(const void* q, DType type, std::int64_t rows, int heads, int d_k, int box_heads,
                             int box_queries, int first_head) {
  const auto row = static_cast<cuuint64_t>(d_k) * size_of(type);
  return encode<3>(
      static_cast<const char*>(q) + static_cast<std::size_t>(first_head) * row, type,
      {static_cast<cuuint64_t>(d_k), static_cast<cuuint64_t>(heads - first_head), static_cast<cuuint64_t>(rows)},
      {row, row * static_cast<cuuint64_t>(heads)},
      {box_columns, static_cast<cuuint32_t>(box_heads), static_cast<cuuint32_t>(box_queries)});
}

}  // namespace nsa::gpu
