// What a convolution computes, as `ConvolutionProblem.plan` writes it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "signatures.h"

namespace {

constexpr int MAX_L = 6;
constexpr int MAX_SH = (MAX_L + 1) * (MAX_L + 1);
constexpr int COEFFICIENTS = GAQ_COEFFICIENTS;  // of the polynomial of an interval of a radial table

// Paths that differ in their channels only (`ConvolutionProblem.chunks`): `span` paths from number `first` on, whose
// inputs and outputs follow each other.
struct Path {
  int64_t row_in, d1, l2, group_offset, group_rows, index, stride, d3, cg_begin, cg_end, first, span, scale_row,
      b_offset;

  // Output row of the path's first component for an atom; the other components follow every `stride` rows.
  int64_t row_out(int64_t atoms, int64_t atom) const { return group_offset * atoms + atom * group_rows + index; }
  bool same_input(const Path& other) const {
    return row_in == other.row_in && d1 == other.d1 && span == other.span && scale_row == other.scale_row;
  }
};

struct Plan {
  int64_t channels, lmax, paths, rows_in, intervals, tabulated, scale_rows;
  std::vector<Path> path;   // those of an input block one after the other, by their number of output components
  const int64_t* cg_index;  // (m1, m2, m3) triples
  const double* cg_value;
  double r_max;
  const double* harmonics;  // for each l: (2l+1) x monomials of degree l
  int64_t b_size;           // elements of the matrices B of all paths

  // Row (of `channels` numbers) of the radial tables with the constants of an interval's polynomials; the other
  // coefficients follow.
  int64_t table_row(int64_t table, int64_t p, int64_t interval) const {
    return ((table * paths + p) * intervals + interval) * COEFFICIENTS;
  }

  Plan(const int64_t* ints, const double* reals) {
    channels = ints[0], lmax = ints[1], paths = ints[2], rows_in = ints[3], intervals = ints[4];
    tabulated = ints[5], scale_rows = ints[6];
    const int64_t cg_count = ints[7];
    const int64_t* p = ints + 8;
    for (int64_t i = 0; i < paths; i += p[10], p += 12)
      path.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], i, p[10], p[11], 0});
    std::stable_sort(path.begin(), path.end(), [](const Path& a, const Path& b) {
      return a.row_in != b.row_in ? a.row_in < b.row_in : a.span != b.span ? a.span < b.span : a.d3 < b.d3;
    });
    b_size = 0;
    for (Path& of : path) of.b_offset = b_size, b_size += of.d1 * of.d3;
    cg_index = p;
    r_max = reals[0];
    cg_value = reals + 1;
    harmonics = cg_value + cg_count;
  }
};

}  // namespace
