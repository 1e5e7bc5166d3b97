#pragma once
// Marks the arithmetic that the host and CUDA twins share.

#if defined(__CUDACC__)
#define NSA_HD __host__ __device__ inline
#else
#define NSA_HD inline
#endif
