#pragma once
// Marks functions that compile for host and device: the arithmetic that both backends share.

#if defined(__CUDACC__)
#define NSA_HD __host__ __device__ inline
#else
#define NSA_HD inline
#endif
