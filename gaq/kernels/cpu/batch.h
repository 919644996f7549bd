// Edges of some consecutive atoms, with all of them that does not depend on the channel: place in the radial table,
// spherical harmonics and the matrices B. These are computed for as many edges at once as a register has lanes.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "edges.h"
#include "lanes.h"
#include "plan.h"

namespace {

// Spherical harmonics of unit vectors as polynomials of their components, and their gradient, an edge in each lane.
template <typename T> struct Harmonics {
  Vec<T> value[MAX_SH];
  Vec<T> gradient[3][MAX_SH];

  template <bool DERIVATIVE> void evaluate(const Plan& plan, const Vec<T>* u) {
    constexpr int MOST = (MAX_L + 1) * (MAX_L + 2) / 2;
    Vec<T> power[3][MAX_L + 1];
    for (int k = 0; k < 3; ++k) {
      power[k][0] = Vec<T>{} + T(1);
      for (int64_t i = 1; i <= plan.lmax; ++i) power[k][i] = power[k][i - 1] * u[k];
    }
    const double* c = plan.harmonics;
    for (int64_t l = 0; l <= plan.lmax; ++l) {
      Vec<T> mono[MOST], slope[3][MOST];
      int count = 0;
      for (int64_t a = l; a >= 0; --a)
        for (int64_t b = l - a; b >= 0; --b, ++count) {
          const int64_t d = l - a - b;
          if (!DERIVATIVE) mono[count] = power[0][a] * power[1][b] * power[2][d];
          if (DERIVATIVE) {
            slope[0][count] = a ? T(a) * power[0][a - 1] * power[1][b] * power[2][d] : Vec<T>{};
            slope[1][count] = b ? T(b) * power[0][a] * power[1][b - 1] * power[2][d] : Vec<T>{};
            slope[2][count] = d ? T(d) * power[0][a] * power[1][b] * power[2][d - 1] : Vec<T>{};
          }
        }
      for (int64_t m = 0; m < 2 * l + 1; ++m, c += count) {
        Vec<T> v = {}, g0 = {}, g1 = {}, g2 = {};
        for (int i = 0; i < count; ++i) {
          if (c[i] == 0) continue;
          const T w = T(c[i]);
          if (!DERIVATIVE) v += w * mono[i];
          if (DERIVATIVE) g0 += w * slope[0][i], g1 += w * slope[1][i], g2 += w * slope[2][i];
        }
        if (!DERIVATIVE) value[l * l + m] = v;
        if (DERIVATIVE) gradient[0][l * l + m] = g0, gradient[1][l * l + m] = g1, gradient[2][l * l + m] = g2;
      }
    }
  }
};

template <typename T> struct Batch {
  static constexpr int W = Lanes<T>::width;

  int64_t count = 0;           // of edges
  std::vector<int64_t> begin;  // first edge of each atom
  // Of each edge: number, sender, row of the radial tables of a path, and position in the interval from 0 to 1. Lengths
  // and directions are those of whole registers.
  std::vector<int64_t> number, sender, row;
  std::vector<T> t, length, direction[3];
  // Null, or of all edges of the call, (edges, 4): the distance that the radial tables are over and its slope, and a
  // factor of the radial weights and its slope. An edge whose factor is zero is left out.
  const T* radial = nullptr;

  // Fills the batch from `atom` on, and returns the first atom that is not in it.
  int64_t fill(const Plan& plan, const Sorted& sorted, const int64_t* senders, const int64_t* tables, const T* vectors,
               const T* of_edges, int64_t atom, int64_t last, int64_t most) {
    radial = of_edges;
    const std::vector<int64_t>&first = sorted.first, &order = sorted.order;
    int64_t next = atom + 1;
    while (next < last && first[next + 1] - first[atom] <= most) ++next;
    reserve(first[next] - first[atom]);
    const T most_squared = T(plan.r_max) * T(plan.r_max);
    begin.clear();
    count = 0;
    for (int64_t a = atom; a < next; ++a) {
      begin.push_back(count);
      for (int64_t k = first[a]; k < first[a + 1]; ++k) {
        const T* v = vectors + 3 * order[k];
        const T squared = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
        // Beyond the cutoff (a neighbour list may have a skin) the weights are zero. An edge of length 0 has no
        // direction, and makes NaN.
        if (radial ? radial[4 * order[k] + 2] == 0 : !(squared < most_squared)) continue;
        number[count] = order[k], sender[count] = senders[order[k]];
        for (int i = 0; i < 3; ++i) direction[i][count] = v[i];
        length[count++] = squared;
      }
    }
    begin.push_back(count);
    for (int64_t i = count; i < groups() * W; ++i)
      length[i] = 1, direction[0][i] = direction[1][i] = direction[2][i] = 0;
    for (int64_t i = 0; i < groups() * W; ++i) length[i] = std::sqrt(length[i]);
    for (std::vector<T>& component : direction)
      for (int64_t i = 0; i < groups() * W; ++i) component[i] /= length[i];
    if (plan.tabulated) place(plan, tables);
    couple(plan);
    return next;
  }

  // Number of registers that hold a number for each edge.
  int64_t groups() const { return (count + W - 1) / W; }
  // Matrices B of an edge; their elements follow every W numbers.
  const T* matrix(const Plan& plan, int64_t edge) const {
    return reinterpret_cast<const T*>(b_data + edge / W * plan.b_size) + edge % W;
  }

  // Adds the gradient of some edges by B, and by the length, to that by their vectors.
  void differentiate(const Plan& plan, const Vec<T>* grad_b, const T* grad_length, T* grad_vectors) const {
    const int64_t size = (plan.lmax + 1) * (plan.lmax + 1);
    Harmonics<T> y;
    for (int64_t group = 0; group < groups(); ++group, grad_b += plan.b_size) {
      Vec<T> u[3], grad_sh[MAX_SH] = {}, g[3] = {}, along = load(grad_length + group * W, W);
      for (int k = 0; k < 3; ++k) u[k] = load(direction[k].data() + group * W, W);
      y.template evaluate<true>(plan, u);
      for (const Path& p : plan.path)
        for (int64_t k = p.cg_begin; k < p.cg_end; ++k) {
          const int64_t* m = plan.cg_index + 3 * k;
          grad_sh[p.l2 * p.l2 + m[1]] += T(plan.cg_value[k]) * grad_b[p.b_offset + m[2] * p.d1 + m[0]];
        }
      for (int k = 0; k < 3; ++k)
        for (int64_t m = 0; m < size; ++m) g[k] += grad_sh[m] * y.gradient[k][m];
      if (radial) {
        Vec<T> by_factor = {};
        y.template evaluate<false>(plan, u);
        for (int64_t m = 0; m < size; ++m) by_factor += grad_sh[m] * y.value[m];
        along = along * of_lanes(group, 1) + by_factor * of_lanes(group, 3);
        for (int k = 0; k < 3; ++k) g[k] *= of_lanes(group, 2);
      }
      const Vec<T> outward = g[0] * u[0] + g[1] * u[1] + g[2] * u[2];
      const Vec<T> r = load(length.data() + group * W, W);
      for (int k = 0; k < 3; ++k) {
        const Vec<T> result = (g[k] - outward * u[k]) / r + along * u[k];
        for (int64_t i = group * W; i < std::min(count, (group + 1) * W); ++i)
          grad_vectors[3 * number[i] + k] += result[i % W];
      }
    }
  }

 private:
  Registers<Vec<T>> b;  // for each W edges b_size of them; an edge is a lane
  Vec<T>* b_data = nullptr;

  void reserve(int64_t most) {
    const size_t size = most + W;
    if (number.size() >= size) return;
    for (std::vector<int64_t>* of : {&number, &sender, &row}) of->resize(size);
    for (std::vector<T>* of : {&t, &length, &direction[0], &direction[1], &direction[2]}) of->resize(size);
  }

  // One of the four numbers of `radial` for the edges of a group; zero for lanes beyond the last edge.
  Vec<T> of_lanes(int64_t group, int64_t which) const {
    Vec<T> values = {};
    for (int64_t i = group * W; i < std::min(count, (group + 1) * W); ++i)
      values[i % W] = radial[4 * number[i] + which];
    return values;
  }

  // Finds the places in the radial table.
  void place(const Plan& plan, const int64_t* tables) {
    const T step = T(plan.r_max) / T(plan.intervals);
    for (int64_t i = 0; i < count; ++i) {
      const T position = (radial ? radial[4 * number[i]] : length[i]) / step;
      const int64_t interval = std::min<int64_t>(int64_t(position), plan.intervals - 1);
      t[i] = position - T(interval);
      row[i] = plan.table_row(tables ? tables[number[i]] : 0, 0, interval);
    }
  }

  // Makes the matrices B of all paths.
  void couple(const Plan& plan) {
    Vec<T>* to = b_data = b.reserve(groups() * plan.b_size);
    Harmonics<T> y;
    for (int64_t group = 0; group < groups(); ++group, to += plan.b_size) {
      Vec<T> u[3];
      for (int k = 0; k < 3; ++k) u[k] = load(direction[k].data() + group * W, W);
      y.template evaluate<false>(plan, u);
      if (radial)
        for (int64_t m = 0; m < (plan.lmax + 1) * (plan.lmax + 1); ++m) y.value[m] *= of_lanes(group, 2);
      for (const Path& p : plan.path) {
        Vec<T>* matrix = to + p.b_offset;
        std::fill(matrix, matrix + p.d1 * p.d3, Vec<T>{});
        for (int64_t i = p.cg_begin; i < p.cg_end; ++i) {
          const int64_t* m = plan.cg_index + 3 * i;
          matrix[m[2] * p.d1 + m[0]] += T(plan.cg_value[i]) * y.value[p.l2 * p.l2 + m[1]];
        }
      }
    }
  }
};

// Edges of a batch in the order of the intervals of the radial table that they read.
template <typename T> struct Runs {
  struct Run {
    int64_t row, end;  // row of the radial tables of a path, and the end of its edges; they begin where others end
  };
  std::vector<Run> runs;
  std::vector<int64_t> edge, next;
  std::vector<T> t;  // position in the interval

  // `several`: whether there is more than one table.
  void sort(const Plan& plan, const Batch<T>& batch, bool several) {
    edge.resize(batch.count), t.resize(batch.count);
    next.assign(plan.intervals + 1, 0);
    const auto interval = [&](int64_t i) { return batch.row[i] / COEFFICIENTS % plan.intervals; };
    for (int64_t i = 0; i < batch.count; ++i) ++next[interval(i) + 1];
    for (int64_t k = 0; k < plan.intervals; ++k) next[k + 1] += next[k];
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t to = next[interval(i)]++;
      edge[to] = i, t[to] = batch.t[i];
    }
    if (several) {
      // Within an interval by the table.
      for (int64_t k = 0, begin = 0; k < plan.intervals; begin = next[k++])
        std::stable_sort(edge.begin() + begin, edge.begin() + next[k],
                         [&](int64_t a, int64_t b) { return batch.row[a] < batch.row[b]; });
      for (int64_t i = 0; i < batch.count; ++i) t[i] = batch.t[edge[i]];
    }
    runs.clear();
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t row = batch.row[edge[i]];
      if (runs.empty() || runs.back().row != row) runs.push_back({row, i});
      runs.back().end = i + 1;
    }
  }
};

}  // namespace
