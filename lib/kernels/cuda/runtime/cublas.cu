// cuBLAS is column-major: these calls compute out^T = b^T a^T, so that no operand is transposed in memory.

#include <cublasLt.h>

#include <map>
#include <numeric>
#include <tuple>

#include "kernels/cuda/runtime/cublas.cuh"

namespace nsa::gpu {

namespace {

/// A cuBLASLt object and the call that destroys it.
template <class T, cublasStatus_t (*Destroy)(T)>
struct LtHandle {
  T handle = nullptr;
  ~LtHandle() {
    if (handle) (void)Destroy(handle);
  }
};
using MatmulDesc = LtHandle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using MatrixLayout = LtHandle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = LtHandle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

void describe(MatrixLayout& layout, cudaDataType type, std::int64_t rows, std::int64_t cols, std::int64_t ld, int batch,
              std::int64_t stride) {
  check(cublasLtMatrixLayoutCreate(&layout.handle, type, rows, cols, ld), "cublasLtMatrixLayoutCreate");
  check(cublasLtMatrixLayoutSetAttribute(layout.handle, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch),
        "cublasLtMatrixLayoutSetAttribute");
  check(cublasLtMatrixLayoutSetAttribute(layout.handle, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                         sizeof stride),
        "cublasLtMatrixLayoutSetAttribute");
}

/// The descriptors of a product.
struct Problem {
  MatmulDesc desc;
  MatrixLayout b, a, out;
  Problem(DType type, const Gemm& g) {
    check(cublasLtMatmulDescCreate(&desc.handle, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    const cublasOperation_t transpose = CUBLAS_OP_T;
    check(cublasLtMatmulDescSetAttribute(desc.handle, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose),
          "cublasLtMatmulDescSetAttribute");
    describe(b, storage_type(type), g.k, g.n, g.b_ld, g.batch, g.b_stride);
    describe(a, storage_type(type), g.k, g.m, g.a_ld, g.batch, g.a_stride);
    describe(out, CUDA_R_32F, g.n, g.m, g.out_ld, g.batch, g.out_stride);
  }
};

struct Algorithm {
  bool found = false;
  cublasLtMatmulAlgo_t algorithm;
};

template <class V>
void prefer(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, V value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
}

/// For a problem of typical size: the choice must not depend on m, n or batch of a call.
Algorithm choose_algorithm(cublasLtHandle_t lt, DType type, int typical_m, int k) {
  Gemm typical;
  typical.m = typical_m;
  typical.n = 2048;
  typical.k = k;
  typical.a_ld = typical.b_ld = k;
  typical.out_ld = typical.n;
  const Problem problem(type, typical);
  Preference preference;
  check(cublasLtMatmulPreferenceCreate(&preference.handle), "cublasLtMatmulPreferenceCreate");
  const auto alignment = static_cast<std::uint32_t>(std::gcd<std::size_t>(16, k * size_of(type)));
  prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{0});
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, std::uint32_t{16});
  prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, std::uint32_t{16});
  cublasLtMatmulHeuristicResult_t result{};
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(lt, problem.desc.handle, problem.b.handle, problem.a.handle, problem.out.handle,
                                     problem.out.handle, preference.handle, 1, &result, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || count == 0) return {};
  check(status, "cublasLtMatmulAlgoGetHeuristic");
  return {true, result.algo};
}

}  // namespace

void multiply(DType type, const Gemm& g, Stream* stream) {
  const float zero = 0.0f;
  const cudaDataType storage = storage_type(type);
  check(cublasGemmStridedBatchedEx(
            blas(stream), g.b_by_rows ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, g.n, g.m, g.k, &g.alpha, g.b, storage,
            static_cast<int>(g.b_ld), g.b_stride, g.a, storage, static_cast<int>(g.a_ld), g.a_stride, &zero, g.out,
            CUDA_R_32F, static_cast<int>(g.out_ld), g.out_stride, g.batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
}

void multiply_in_fixed_order(DType type, const Gemm& g, int typical_m, Stream* stream) {
  static std::map<std::tuple<DType, int, int>, Algorithm> algorithms;  // one GPU and one thread a process
  const auto lt = reinterpret_cast<cublasLtHandle_t>(blas(stream));
  const auto [choice, fresh] = algorithms.try_emplace({type, typical_m, g.k});
  if (fresh) choice->second = choose_algorithm(lt, type, typical_m, g.k);
  if (choice->second.found) {
    const float zero = 0.0f;
    const Problem problem(type, g);
    const cublasStatus_t status = cublasLtMatmul(
        lt, problem.desc.handle, &g.alpha, g.b, problem.b.handle, g.a, problem.a.handle, &zero, g.out,
        problem.out.handle, g.out, problem.out.handle, &choice->second.algorithm, nullptr, 0, cuda(stream));
    if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE)
      return check(status, "cublasLtMatmul");
  }
  // Head sizes that no tensor-core kernel supports: cuBLAS's loops run over k in one order at any size.
  multiply(type, g, stream);
}

}  // namespace nsa::gpu
