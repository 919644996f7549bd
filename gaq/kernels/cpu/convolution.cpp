// Fused equivariant convolution on the CPU: gather, tensor product with radial weights, sum over neighbours, and the
// derivative by edge vectors and node features. convolution.py has the mathematics and the layouts.
//
// Nothing with a row for each edge and channel is written to memory. Channels are the fast axis everywhere.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "edges.h"
#include "lanes.h"
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
};

struct Plan {
  int64_t channels, lmax, paths, rows_in, intervals, tabulated, scale_rows;
  std::vector<Path> path;
  const int64_t* cg_index;  // (m1, m2, m3) triples
  const double* cg_value;
  double r_max;
  const double* harmonics;  // for each l: (2l+1) x monomials of degree l
  int64_t b_size;

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
    b_size = 0;
    for (int64_t i = 0; i < paths; i += p[10], p += 12) {
      path.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], i, p[10], p[11], b_size});
      b_size += p[1] * p[7];
    }
    cg_index = p;
    r_max = reals[0];
    cg_value = reals + 1;
    harmonics = cg_value + cg_count;
  }
};

// Spherical harmonics of a unit vector as polynomials of its components, and their gradient.
template <typename T> struct Harmonics {
  T value[MAX_SH];
  T gradient[3][MAX_SH];

  void evaluate(const Plan& plan, const T* u, bool derivative) {
    T power[3][MAX_L + 1];
    for (int k = 0; k < 3; ++k) {
      power[k][0] = 1;
      for (int64_t i = 1; i <= plan.lmax; ++i) power[k][i] = power[k][i - 1] * u[k];
    }
    const double* c = plan.harmonics;
    for (int64_t l = 0; l <= plan.lmax; ++l) {
      T mono[(MAX_L + 1) * (MAX_L + 2) / 2];
      T slope[3][(MAX_L + 1) * (MAX_L + 2) / 2];
      int count = 0;
      for (int64_t a = l; a >= 0; --a)
        for (int64_t b = l - a; b >= 0; --b, ++count) {
          const int64_t d = l - a - b;
          mono[count] = power[0][a] * power[1][b] * power[2][d];
          if (derivative) {
            slope[0][count] = a ? T(a) * power[0][a - 1] * power[1][b] * power[2][d] : T(0);
            slope[1][count] = b ? T(b) * power[0][a] * power[1][b - 1] * power[2][d] : T(0);
            slope[2][count] = d ? T(d) * power[0][a] * power[1][b] * power[2][d - 1] : T(0);
          }
        }
      for (int64_t m = 0; m < 2 * l + 1; ++m, c += count) {
        T v = 0, g0 = 0, g1 = 0, g2 = 0;
        for (int i = 0; i < count; ++i) {
          if (c[i] == 0) continue;
          const T w = T(c[i]);
          v += w * mono[i];
          if (derivative) g0 += w * slope[0][i], g1 += w * slope[1][i], g2 += w * slope[2][i];
        }
        value[l * l + m] = v;
        gradient[0][l * l + m] = g0, gradient[1][l * l + m] = g1, gradient[2][l * l + m] = g2;
      }
    }
  }
};

// Data of an edge that the loops over channels read.
template <typename T> struct Edge {
  int64_t number, sender, interval;
  int64_t table;  // number of the table its weights come from
  T length, direction[3];
  T t;  // position in the interval, from 0 to 1
};

// Length, direction and place in the radial table of an edge vector; false if the edge contributes nothing.
template <typename T> bool locate(const Plan& plan, const T* vector, Edge<T>& e) {
  const T x = vector[0], y = vector[1], z = vector[2];
  e.length = std::sqrt(x * x + y * y + z * z);
  // Beyond the cutoff (a neighbour list may have a skin) the weights are zero. An edge of length 0 has no direction.
  if (!(e.length > 0) || !(e.length < T(plan.r_max))) return false;
  const T inverse = 1 / e.length;
  e.direction[0] = x * inverse, e.direction[1] = y * inverse, e.direction[2] = z * inverse;
  if (!plan.tabulated) return true;
  const T position = e.length / (T(plan.r_max) / T(plan.intervals));
  e.interval = std::min<int64_t>(int64_t(position), plan.intervals - 1);
  e.t = position - T(e.interval);
  return true;
}

// Matrices B of all paths, from the spherical harmonics of an edge.
template <typename T> void coefficients(const Plan& plan, const T* sh, T* b) {
  for (const Path& p : plan.path) {
    T* matrix = b + p.b_offset;
    std::fill(matrix, matrix + p.d1 * p.d3, T(0));
    const T* y = sh + p.l2 * p.l2;
    for (int64_t i = p.cg_begin; i < p.cg_end; ++i) {
      const int64_t* m = plan.cg_index + 3 * i;
      matrix[m[2] * p.d1 + m[0]] += T(plan.cg_value[i]) * y[m[1]];
    }
  }
}

// Radial weights of path p for an edge, from channel c on.
template <typename T> inline Vec<T> weight(const Plan& plan, const T* values, const Edge<T>& e, int64_t p, int64_t c) {
  const int64_t left = plan.channels - c;
  if (!plan.tabulated) return load(values + (e.number * plan.paths + p) * plan.channels + c, left);
  const T* row = values + plan.table_row(e.table, p, e.interval) * plan.channels + c;
  Vec<T> w = load(row + (COEFFICIENTS - 1) * plan.channels, left);
  for (int k = COEFFICIENTS - 2; k >= 0; --k) w = w * e.t + load(row + k * plan.channels, left);
  return w;
}

// Where an edge's factors of a path's weights begin; see `ConvolutionProblem.scale_rows`.
template <typename T>
inline int64_t scale_place(const Plan& plan, const Path& path, const Edge<T>& e, int64_t chunk) {
  return (e.number * plan.scale_rows + path.scale_row + chunk) * plan.channels;
}

// ---- forward ----

// Message of one atom along one chunk of a path, from the atom's `count` edges. `scales` is null without factors.
template <typename T, int D1, int D3>
void accumulate(const Plan& plan, const Path& path, int64_t chunk, const Edge<T>* edges, int64_t count, const T* b,
                const T* h, const T* table, const T* scales, T* out) {
  const int64_t C = plan.channels;
  for (int64_t c = 0; c < C; c += Lanes<T>::width) {
    const int64_t left = C - c;
    Vec<T> sums[D3] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Edge<T>& e = edges[i];
      const T* matrix = b + i * plan.b_size + path.b_offset;
      const T* row = h + (e.sender * plan.rows_in + path.row_in) * C + c;
      Vec<T> w = weight(plan, table, e, path.first + chunk, c);
      if (scales) w *= load(scales + scale_place(plan, path, e, chunk) + c, left);
      Vec<T> x[D1];
      for (int m = 0; m < D1; ++m) x[m] = load(row + m * C, left) * w;
      for (int n = 0; n < D3; ++n)
        for (int m = 0; m < D1; ++m) sums[n] += x[m] * matrix[n * D1 + m];
    }
    for (int n = 0; n < D3; ++n) store(out + n * path.stride * C + c, sums[n], left);
  }
}

// ---- backward ----

// Gradients of the edges of one atom along one path: by B, by the length, by node features (null: not asked for), and
// by the radial weights where these are given for each edge, and by the factors of the edges where there are any.
template <typename T, int D1, int D3>
void differentiate(const Plan& plan, const Path& path, const Edge<T>* edges, int64_t count, const T* b, const T* h,
                   const T* table, const T* scales, const T* grad_out, T* grad_b, T* grad_length, T* grad_h,
                   T* grad_table, T* grad_scales) {
  const int64_t C = plan.channels;
  for (int64_t i = 0; i < count; ++i) {
    const Edge<T>& e = edges[i];
    const T* matrix = b + i * plan.b_size + path.b_offset;
    Vec<T> dots[D3][D1] = {};
    Vec<T> along = {};
    for (int64_t chunk = 0; chunk < path.span; ++chunk) {
      const int64_t p = path.first + chunk, row_in = path.row_in + chunk * D1;
      for (int64_t c = 0; c < C; c += Lanes<T>::width) {
        const int64_t left = C - c;
        const T* row = h + (e.sender * plan.rows_in + row_in) * C + c;
        Vec<T> w, slope = {};
        if (plan.tabulated) {
          const T* values = table + plan.table_row(e.table, p, e.interval) * C + c;
          slope = w = load(values + (COEFFICIENTS - 1) * C, left);
          for (int k = COEFFICIENTS - 2; k > 0; --k) {
            w = w * e.t + load(values + k * C, left);
            slope = slope * e.t + w;
          }
          w = w * e.t + load(values, left);
        } else {
          w = load(table + (e.number * plan.paths + p) * C + c, left);
        }
        const int64_t place = scales ? scale_place(plan, path, e, chunk) + c : 0;
        const Vec<T> scale = scales ? load(scales + place, left) : Vec<T>{} + T(1);
        const Vec<T> unscaled = w;
        if (scales) w *= scale, slope *= scale;
        Vec<T> g[D3], x[D1], wx[D1];
        for (int n = 0; n < D3; ++n) g[n] = load(grad_out + (n * path.stride + chunk) * C + c, left);
        for (int m = 0; m < D1; ++m) x[m] = load(row + m * C, left), wx[m] = x[m] * w;
        for (int n = 0; n < D3; ++n)
          for (int m = 0; m < D1; ++m) dots[n][m] += g[n] * wx[m];
        Vec<T> into_weight = {};
        for (int m = 0; m < D1; ++m) {
          Vec<T> q = g[0] * matrix[m];
          for (int n = 1; n < D3; ++n) q += g[n] * matrix[n * D1 + m];
          into_weight += q * x[m];
          if (grad_h) {
            T* target = grad_h + (e.sender * plan.rows_in + row_in + m) * C + c;
            store(target, load(target, left) + q * w, left);
          }
        }
        if (scales) {
          T* target = grad_scales + place;
          store(target, load(target, left) + into_weight * unscaled, left);
        }
        if (plan.tabulated)
          along += into_weight * slope;
        else
          store(grad_table + (e.number * plan.paths + p) * C + c, into_weight * scale, left);
      }
    }
    T* target = grad_b + i * plan.b_size + path.b_offset;
    for (int n = 0; n < D3; ++n)
      for (int m = 0; m < D1; ++m) target[n * D1 + m] = sum<T>(dots[n][m]);
    grad_length[i] += sum<T>(along) * T(double(plan.intervals) / plan.r_max);
  }
}

#define GAQ_CASE(FUNCTION, A, B, ...) \
  case (A) * 16 + (B): FUNCTION<T, A, B>(__VA_ARGS__); break;
#define GAQ_ROW(FUNCTION, A, ...)       \
  GAQ_CASE(FUNCTION, A, 1, __VA_ARGS__) \
  GAQ_CASE(FUNCTION, A, 3, __VA_ARGS__) \
  GAQ_CASE(FUNCTION, A, 5, __VA_ARGS__) \
  GAQ_CASE(FUNCTION, A, 7, __VA_ARGS__) \
  GAQ_CASE(FUNCTION, A, 9, __VA_ARGS__)
#define GAQ_DISPATCH(FUNCTION, A, B, ...) \
  switch ((A) * 16 + (B)) {               \
    GAQ_ROW(FUNCTION, 1, __VA_ARGS__)     \
    GAQ_ROW(FUNCTION, 3, __VA_ARGS__)     \
    GAQ_ROW(FUNCTION, 5, __VA_ARGS__)     \
    GAQ_ROW(FUNCTION, 7, __VA_ARGS__)     \
    GAQ_ROW(FUNCTION, 9, __VA_ARGS__)     \
  }

// Most edges of a tile of atoms: enough to reuse a slice of the table in cache, few enough to stay in cache themselves.
constexpr int64_t EDGES_AT_ONCE = 512;

// Edges of some consecutive atoms, with their matrices B.
template <typename T> struct Tile {
  std::vector<Edge<T>> edges;
  std::vector<T> b;
  std::vector<Harmonics<T>> harmonics;
  std::vector<int64_t> begin;  // first edge of each atom within the tile

  // Fills the tile from `atom` on, and returns the first atom that is not in it.
  int64_t fill(const Plan& plan, const Sorted& sorted, const int64_t* sender, const int64_t* tables, const T* vectors,
               int64_t atom, int64_t last, bool keep_harmonics) {
    const std::vector<int64_t>&first = sorted.first, &order = sorted.order;
    edges.clear(), begin.clear();
    int64_t next = atom;
    while (next < last && (next == atom || int64_t(edges.size()) + first[next + 1] - first[next] <= EDGES_AT_ONCE)) {
      begin.push_back(edges.size());
      for (int64_t k = first[next]; k < first[next + 1]; ++k) {
        Edge<T> e;
        e.number = order[k];
        if (!locate(plan, vectors + 3 * e.number, e)) continue;
        e.sender = sender[e.number];
        e.table = tables ? tables[e.number] : 0;
        edges.push_back(e);
      }
      ++next;
    }
    begin.push_back(edges.size());
    b.resize(edges.size() * plan.b_size);
    if (keep_harmonics) harmonics.resize(edges.size());
    Harmonics<T> scratch;
    for (size_t i = 0; i < edges.size(); ++i) {
      Harmonics<T>& y = keep_harmonics ? harmonics[i] : scratch;
      y.evaluate(plan, edges[i].direction, keep_harmonics);
      coefficients(plan, y.value, b.data() + i * plan.b_size);
    }
    return next;
  }
};

template <typename T>
void forward(const int64_t* ints, const double* reals, int64_t atoms, const Sorted& edges, const int64_t* sender,
             const int64_t* tables, const T* vectors, const T* h, const T* table, const T* scales, T* out,
             int64_t threads) {
  const Plan plan(ints, reals);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Tile<T> tile;
    const Share share(edges.first, part, threads);
    int64_t atom = share.begin;
    const int64_t last = share.end;
    while (atom < last) {
      const int64_t next = tile.fill(plan, edges, sender, tables, vectors, atom, last, false);
      for (const Path& path : plan.path)
        for (int64_t chunk = 0; chunk < path.span; ++chunk) {
          const T* x = h + chunk * path.d1 * plan.channels;
          for (int64_t a = atom; a < next; ++a) {
            const int64_t begin = tile.begin[a - atom], count = tile.begin[a - atom + 1] - begin;
            const Edge<T>* of_atom = tile.edges.data() + begin;
            const T* b = tile.b.data() + begin * plan.b_size;
            T* row = out + (path.row_out(atoms, a) + chunk) * plan.channels;
            GAQ_DISPATCH(accumulate, path.d1, path.d3, plan, path, chunk, of_atom, count, b, x, table, scales, row)
          }
        }
      atom = next;
    }
  }
}

template <typename T>
void backward(const int64_t* ints, const double* reals, int64_t atoms, const Sorted& edges, const int64_t* sender,
              const int64_t* tables, const T* vectors, const T* h, const T* table, const T* scales, const T* grad_out,
              T* grad_vectors, T* grad_h, T* grad_table, T* grad_scales, int64_t threads) {
  const Plan plan(ints, reals);
  const int64_t size = atoms * plan.rows_in * plan.channels;
  // Each part adds into its own copy of the node features' gradient; the copies are summed in a fixed order.
  std::vector<T> extra(grad_h && threads > 1 ? size * (threads - 1) : 0, T(0));
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Tile<T> tile;
    std::vector<T> grad_b, grad_length;
    T* part_h = grad_h ? (part == 0 ? grad_h : extra.data() + (part - 1) * size) : nullptr;
    const Share share(edges.first, part, threads);
    int64_t atom = share.begin;
    const int64_t last = share.end;
    while (atom < last) {
      const int64_t next = tile.fill(plan, edges, sender, tables, vectors, atom, last, true);
      const int64_t edge_count = tile.edges.size();
      grad_b.assign(edge_count * plan.b_size, T(0));
      grad_length.assign(edge_count, T(0));
      for (const Path& path : plan.path) {
        for (int64_t a = atom; a < next; ++a) {
          const int64_t begin = tile.begin[a - atom], count = tile.begin[a - atom + 1] - begin;
          const Edge<T>* of_atom = tile.edges.data() + begin;
          const T* b = tile.b.data() + begin * plan.b_size;
          const T* grad = grad_out + path.row_out(atoms, a) * plan.channels;
          GAQ_DISPATCH(differentiate, path.d1, path.d3, plan, path, of_atom, count, b, h, table, scales, grad,
                       grad_b.data() + begin * plan.b_size, grad_length.data() + begin, part_h, grad_table, grad_scales)
        }
      }
      for (int64_t i = 0; i < edge_count; ++i) {
        T grad_sh[MAX_SH] = {};
        const T* gb = grad_b.data() + i * plan.b_size;
        for (const Path& p : plan.path) {
          T* y = grad_sh + p.l2 * p.l2;
          for (int64_t k = p.cg_begin; k < p.cg_end; ++k) {
            const int64_t* m = plan.cg_index + 3 * k;
            y[m[1]] += T(plan.cg_value[k]) * gb[p.b_offset + m[2] * p.d1 + m[0]];
          }
        }
        const Edge<T>& e = tile.edges[i];
        const Harmonics<T>& y = tile.harmonics[i];
        T g[3] = {};
        const int64_t count = (plan.lmax + 1) * (plan.lmax + 1);
        for (int k = 0; k < 3; ++k)
          for (int64_t m = 0; m < count; ++m) g[k] += grad_sh[m] * y.gradient[k][m];
        const T* u = e.direction;
        const T radial = g[0] * u[0] + g[1] * u[1] + g[2] * u[2];
        for (int k = 0; k < 3; ++k)
          grad_vectors[3 * e.number + k] = (g[k] - radial * u[k]) / e.length + grad_length[i] * u[k];
      }
      atom = next;
    }
  }
  if (!extra.empty()) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size; ++i)
      for (int64_t part = 1; part < threads; ++part) grad_h[i] += extra[(part - 1) * size + i];
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                            \
  GAQ_KERNEL(convolution, NAME, T) {                                                                                   \
    forward<T>(ints, reals, atoms, Sorted(edges, atoms, receiver), sender, tables, vectors, features, weights, scales, \
               message, threads);                                                                                      \
  }                                                                                                                    \
  GAQ_KERNEL(convolution_backward, NAME, T) {                                                                          \
    backward<T>(ints, reals, atoms, Sorted(edges, atoms, receiver), sender, tables, vectors, features, weights,        \
                scales, grad, grad_vectors, grad_features, grad_weights, grad_scales, threads);                        \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
