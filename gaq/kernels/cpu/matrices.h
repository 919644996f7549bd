// Products of rows with constant matrices, which are packed once for the registers of the machine.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

// Rows of a matrix within a longer layout: row a * components + m is component m of atom a.
template <typename T> struct Rows {
  T* first;
  int64_t components, atom_stride, row_stride;
  T* operator[](int64_t row) const { return first + row / components * atom_stride + row % components * row_stride; }
};

// A constant matrix in panels of as many columns as PANEL registers hold; the rows of a panel follow each other.
template <typename T> class Packed {
 public:
  // Of a register each: those of a panel, and rows of the result that are summed at once. With a number of each row,
  // sums and a row of the panel fit into the registers.
  static constexpr int W = Lanes<T>::width, PANEL = GAQ_BYTES == 64 ? 4 : 2, AT_ONCE = 6;

  int64_t rows, columns;

  // `matrix` is (rows, columns), or its transpose.
  Packed(const T* matrix, int64_t rows, int64_t columns, bool transposed) : rows(rows), columns(columns) {
    const int64_t width = PANEL * W;
    T* to = reinterpret_cast<T*>(memory.reserve((columns + width - 1) / width * rows * PANEL));
    for (int64_t begin = 0; begin < columns; begin += width)
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t c = begin; c < begin + width; ++c)
          *to++ = c >= columns ? T(0) : transposed ? matrix[c * rows + k] : matrix[k * columns + c];
  }

  // Rows `begin` to `end` - 1 of `out` become, or are increased by, those of `in` times the matrix.
  void multiply(const Rows<const T>& in, const Rows<T>& out, int64_t begin, int64_t end, bool add,
                int64_t threads) const {
    constexpr int64_t BLOCK = 8 * AT_ONCE;  // rows that stay in cache while the panels pass
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && end - begin > BLOCK)
    for (int64_t block = begin; block < end; block += BLOCK)
      for (int64_t c = 0; c < columns; c += PANEL * W)
        for (int64_t row = block, last = std::min(block + BLOCK, end); row < last; row += AT_ONCE) {
          const T* a[AT_ONCE];
          T* to[AT_ONCE];
          const int64_t count = std::min<int64_t>(AT_ONCE, last - row);
          for (int64_t i = 0; i < count; ++i) a[i] = in[row + i], to[i] = out[row + i] + c;
          const Vec<T>* panel = memory.values() + c / W * rows;
          switch (count) {
            case 1: tile<1>(a, panel, to, columns - c, add); break;
            case 2: tile<2>(a, panel, to, columns - c, add); break;
            case 3: tile<3>(a, panel, to, columns - c, add); break;
            case 4: tile<4>(a, panel, to, columns - c, add); break;
            case 5: tile<5>(a, panel, to, columns - c, add); break;
            case 6: tile<6>(a, panel, to, columns - c, add); break;
          }
        }
  }

 private:
  Registers<Vec<T>> memory;

  template <int COUNT>
  void tile(const T* const* a, const Vec<T>* panel, T* const* to, int64_t left, bool add) const {
    Vec<T> sums[COUNT][PANEL] = {};
    for (int64_t k = 0; k < rows; ++k, panel += PANEL)
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < PANEL; ++j) sums[i][j] += a[i][k] * panel[j];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < PANEL; ++j)
        if (const int64_t rest = left - j * W; rest > 0) {
          T* target = to[i] + j * W;
          store(target, add ? load(target, rest) + sums[i][j] : sums[i][j], rest);
        }
  }
};

}  // namespace
