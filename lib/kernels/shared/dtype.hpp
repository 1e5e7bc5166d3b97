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

}  // namespace nsa
