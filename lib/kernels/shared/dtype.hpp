#pragma once
// Storage types. Accumulation, softmax and scores are always fp32.

#include <cstddef>
#include <cstdint>

namespace nsa {

enum class DType : std::int32_t { f32, bf16, f16 };

constexpr std::size_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

constexpr const char* name_of(DType type) {
  return type == DType::f32 ? "fp32" : type == DType::bf16 ? "bf16" : "fp16";
}

/// What the K/V caches hold: rows in storage type; E4M3 values with a scale a row (shared/e4m3.hpp); or, where a
/// backend has no kernels for those, the same values times their scales in storage type.
enum class KvPrecision : std::int32_t { same, fp8_e4m3, fp8_rounded };

}  // namespace nsa
