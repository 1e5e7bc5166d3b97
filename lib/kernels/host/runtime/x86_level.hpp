#pragma once
// The level of the x86-64 instruction set that this processor has.

namespace nsa {

/// 4: AVX-512 as x86-64-v4 has it; 3: AVX2 and FMA, x86-64-v3; 1: less; 0: another architecture. Asks for the features
/// one by one, as clang knows the levels by name only from 18 on.
inline int x86_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // a static initialiser may call this
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v3 && v4 ? 4 : v3 ? 3 : 1;
#else
  return 0;
#endif
}

}  // namespace nsa
