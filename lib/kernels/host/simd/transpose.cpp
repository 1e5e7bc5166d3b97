// Transposition of tiles that are in L1: 16 x 16 elements in registers with AVX-512, four exchanges of neighbours at
// distances 1, 2, 4 and 8; element by element elsewhere. Bound by its shuffles, one for four elements.

#include <utility>

#include "kernels/host/runtime/x86_level.hpp"
#include "kernels/host/simd/loops.hpp"

namespace nsa::host {
namespace {

void transpose_elements(int rows, int columns, const float* from, std::ptrdiff_t from_row, float* to,
                        std::ptrdiff_t to_row) {
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < rows; ++r) to[c * to_row + r] = from[r * from_row + c];
}

#if defined(__x86_64__) && defined(__GNUC__)
constexpr int side = 16;
typedef float Row __attribute__((vector_size(side * 4), aligned(4), may_alias));

// Lane l of the new a: of a where bit Step of l is 0, else lane l - Step of b; of the new b: lane l + Step of a, or of
// b.
template <int Step, int... L>
[[gnu::always_inline]] inline void exchange(Row& a, Row& b, std::integer_sequence<int, L...>) {
  const Row first = __builtin_shufflevector(a, b, (L & Step ? side + L - Step : L)...);
  b = __builtin_shufflevector(a, b, (L & Step ? side + L : L + Step)...);
  a = first;
}

template <int Step>
[[gnu::always_inline]] inline void exchange_rows(Row (&rows)[side]) {
#pragma GCC unroll 16
  for (int i = 0; i < side; ++i)
    if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, side>());
}

__attribute__((target("arch=x86-64-v4"))) void transpose_v4(int rows, int columns, const float* from,
                                                            std::ptrdiff_t from_row, float* to, std::ptrdiff_t to_row) {
  const int whole_rows = rows / side * side, whole_columns = columns / side * side;
  for (int c = 0; c < whole_columns; c += side)
    for (int r = 0; r < whole_rows; r += side) {
      Row tile[side];
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) tile[i] = *reinterpret_cast<const Row*>(from + (r + i) * from_row + c);
      exchange_rows<1>(tile);
      exchange_rows<2>(tile);
      exchange_rows<4>(tile);
      exchange_rows<8>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) *reinterpret_cast<Row*>(to + (c + i) * to_row + r) = tile[i];
    }
  transpose_elements(rows - whole_rows, whole_columns, from + whole_rows * from_row, from_row, to + whole_rows, to_row);
  transpose_elements(rows, columns - whole_columns, from + whole_columns, from_row, to + whole_columns * to_row,
                     to_row);
}
#endif

using TransposeFunction = decltype(&transpose_elements);

TransposeFunction best_function() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (x86_level() == 4) return transpose_v4;
#endif
  return transpose_elements;
}

const TransposeFunction transpose_function = best_function();

}  // namespace

void transpose(int rows, int columns, const float* from, std::ptrdiff_t from_row, float* to, std::ptrdiff_t to_row) {
  transpose_function(rows, columns, from, from_row, to, to_row);
}

}  // namespace nsa::host
