// The inner loops; loops.hpp says what each computes. Vectorised over columns or elements. Each loads and stores its
// operands once and is bound by that, except where it takes an exponential (15 operations) or a Philox number (10
// rounds).

#include "kernels/host/simd/loops.hpp"

#include <bit>

#include "kernels/shared/e4m3.hpp"
#include "kernels/shared/float16.hpp"
#include "kernels/shared/random.hpp"

namespace nsa::host {
namespace {

/// exp(x) = 2^n exp(r), r = x - n ln 2 (Cody and Waite), a polynomial for exp(r) (Cephes expf).
[[gnu::always_inline]] inline float exp_of(float x) {
  constexpr float shift = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504088896341f + shift;
  const float n = shifted - shift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = (p * (r * r) + r) + 1.0f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  const float result = y * std::bit_cast<float>(power);
  return x < -87.0f ? 0.0f : result;
}

template <class T>
[[gnu::always_inline]] inline void load_loop(std::int64_t n, const T* from, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
[[gnu::always_inline]] inline void store_loop(std::int64_t n, const float* from, T* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}

template <class T>
[[gnu::always_inline]] inline void add_rows_loop(std::int64_t n, std::int64_t rows, const float* x, const T* w,
                                                 std::int64_t ldw, float* y) {
  std::int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    const T* v = w + r * ldw;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      float sum = y[i];
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) sum += x[r + k] * to_float(v[k * ldw + i]);
      y[i] = sum;
    }
  }
  for (; r < rows; ++r) {
    const T* v = w + r * ldw;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) y[i] += x[r] * to_float(v[i]);
  }
}

NSA_SIMD void load_bf16(std::int64_t n, const Bf16* from, float* to) { load_loop(n, from, to); }
NSA_SIMD void load_f16(std::int64_t n, const Fp16* from, float* to) { load_loop(n, from, to); }
NSA_SIMD void load_f32(std::int64_t n, const float* from, float* to) { load_loop(n, from, to); }
NSA_SIMD void load_e4m3_row(std::int64_t n, const std::uint8_t* from, float scale, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = e4m3_value(from[i]) * scale;
}
NSA_SIMD std::uint32_t largest_magnitude(std::int64_t n, const float* from) {
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t magnitude = magnitude_bits(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}
NSA_SIMD void store_e4m3_row(std::int64_t n, const float* from, float factor, std::uint8_t* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] = e4m3_of(from[i] * factor);
}
NSA_SIMD void store_bf16(std::int64_t n, const float* from, Bf16* to) { store_loop(n, from, to); }
NSA_SIMD void store_f16(std::int64_t n, const float* from, Fp16* to) { store_loop(n, from, to); }
NSA_SIMD void store_f32(std::int64_t n, const float* from, float* to) { store_loop(n, from, to); }

NSA_SIMD void add_rows_bf16(std::int64_t n, std::int64_t rows, const float* x, const Bf16* w, std::int64_t ldw,
                            float* y) {
  add_rows_loop(n, rows, x, w, ldw, y);
}
NSA_SIMD void add_rows_f16(std::int64_t n, std::int64_t rows, const float* x, const Fp16* w, std::int64_t ldw,
                           float* y) {
  add_rows_loop(n, rows, x, w, ldw, y);
}
NSA_SIMD void add_rows_f32(std::int64_t n, std::int64_t rows, const float* x, const float* w, std::int64_t ldw,
                           float* y) {
  add_rows_loop(n, rows, x, w, ldw, y);
}

}  // namespace

NSA_SIMD void softmax_columns(int tokens, int columns, float* s, float* m, float* sum) {
  for (int c0 = 0; c0 < columns; c0 += simd_lanes) {
    float column_max[simd_lanes], reference[simd_lanes], column_sum[simd_lanes];
#pragma omp simd
    for (int c = 0; c < simd_lanes; ++c) column_max[c] = neg_inf;
    for (int t = 0; t < tokens; ++t) {
      const float* row = s + t * columns + c0;
#pragma omp simd
      for (int c = 0; c < simd_lanes; ++c) column_max[c] = row[c] > column_max[c] ? row[c] : column_max[c];
    }
#pragma omp simd
    for (int c = 0; c < simd_lanes; ++c) {
      reference[c] = column_max[c] == neg_inf ? 0.0f : column_max[c];
      column_sum[c] = 0.0f;
    }
    for (int t = 0; t < tokens; ++t) {
      float* row = s + t * columns + c0;
#pragma omp simd
      for (int c = 0; c < simd_lanes; ++c) {
        const float p = exp_of(row[c] - reference[c]);
        row[c] = p;
        column_sum[c] += p;
      }
    }
#pragma omp simd
    for (int c = 0; c < simd_lanes; ++c) {
      m[c0 + c] = column_max[c];
      sum[c0 + c] = column_sum[c];
    }
  }
}

NSA_SIMD void mask_columns(int tokens, int columns, float* s, const std::int32_t* first, const std::int32_t* last) {
  for (int t = 0; t < tokens; ++t) {
    float* row = s + t * columns;
#pragma omp simd
    for (int c = 0; c < columns; ++c) row[c] = t >= first[c] && t < last[c] ? row[c] : neg_inf;
  }
}

NSA_SIMD void merge_softmax_columns(int columns, float* m, float* s, const float* m2, const float* s2,
                                    float* scale_prev, float* scale_new) {
#pragma omp simd
  for (int c = 0; c < columns; ++c) {
    const float column_max = m[c] > m2[c] ? m[c] : m2[c];
    const float reference = column_max == neg_inf ? 0.0f : column_max;
    scale_prev[c] = exp_of(m[c] - reference);
    scale_new[c] = exp_of(m2[c] - reference);
    const float added = s2[c] * scale_new[c];
    s[c] = s[c] * scale_prev[c] + added;
    m[c] = column_max;
  }
}

NSA_SIMD void rescale_and_add(std::int64_t n, float scale_prev, float* o, float scale_new, const float* o2) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float added = scale_new * o2[i];
    o[i] = scale_prev * o[i] + added;
  }
}

NSA_SIMD void add_probabilities(int n, const float* s, float m, float inverse_z, float* sum) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sum[i] += exp_of(s[i] - m) * inverse_z;
}

// synthetic_value with a select in place of its array index: the compiler then vectorises over 16 columns.
NSA_SIMD void synthetic_row(std::int64_t n, std::uint64_t key, std::uint32_t plane, std::uint64_t row,
                            std::uint32_t column, float scale, float* out) {
  const auto low = static_cast<std::uint32_t>(row), high = static_cast<std::uint32_t>(row >> 32);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t c = column + static_cast<std::uint32_t>(i);
    const Philox4 r = philox(key, {{c >> 1, low, high, plane}});
    out[i] = scale * bell_curve(c & 1u ? r.v[2] : r.v[0], c & 1u ? r.v[3] : r.v[1]);
  }
}

void add_rows(DType type, std::int64_t n, std::int64_t rows, const float* x, const void* w, std::int64_t ldw,
              float* y) {
  if (type == DType::f32) return add_rows_f32(n, rows, x, static_cast<const float*>(w), ldw, y);
  if (type == DType::bf16) return add_rows_bf16(n, rows, x, static_cast<const Bf16*>(w), ldw, y);
  add_rows_f16(n, rows, x, static_cast<const Fp16*>(w), ldw, y);
}

void load(DType type, std::int64_t n, const void* from, float* to) {
  if (type == DType::f32) return load_f32(n, static_cast<const float*>(from), to);
  if (type == DType::bf16) return load_bf16(n, static_cast<const Bf16*>(from), to);
  load_f16(n, static_cast<const Fp16*>(from), to);
}

void store(DType type, std::int64_t n, const float* from, void* to) {
  if (type == DType::f32) return store_f32(n, from, static_cast<float*>(to));
  if (type == DType::bf16) return store_bf16(n, from, static_cast<Bf16*>(to));
  store_f16(n, from, static_cast<Fp16*>(to));
}

void load_quantised(std::int64_t count, std::int64_t width, const void* from, const std::uint8_t* scales, float* to) {
  const auto* rows = static_cast<const std::uint8_t*>(from);
  for (std::int64_t i = 0; i < count; ++i) load_e4m3_row(width, rows + i * width, row_scale(scales[i]), to + i * width);
}

std::uint8_t store_quantised(std::int64_t n, const float* from, void* to) {
  const std::uint8_t scale = row_scale_byte(largest_magnitude(n, from));
  store_e4m3_row(n, from, row_factor(scale), static_cast<std::uint8_t*>(to));
  return scale;
}

float exponential(float x) { return exp_of(x); }

}  // namespace nsa::host
