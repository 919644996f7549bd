// Fused equivariant convolution on the CPU: gather, tensor product with radial weights, and sum over neighbours.
// convolution.py has the mathematics and the layouts; convolution_backward.cpp the derivative.
//
// Nothing with a row for each edge and channel is written to memory. Channels are the fast axis everywhere. Of a batch
// of edges, as many channels as a register has lanes are computed at a time: for these, the weights of the edges and
// the features of their senders stay in the first cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "batch.h"
#include "edges.h"
#include "lanes.h"
#include "plan.h"
#include "signatures.h"

namespace {

// Most edges of a batch: enough that an interval's polynomials serve several, few enough for their weights to stay in
// cache.
constexpr int64_t EDGES_AT_ONCE = 512;

// ---- sums over the edges of an atom ----

// What the sums of some channels read, for all edges of a batch.
template <typename T> struct Inputs {
  const Vec<T>* weights;   // for each edge, those of the paths of a pass
  const Vec<T>* features;  // for each sender, the components of the input block
  const int64_t* sender;   // of each edge: where the features of its sender begin
  const T* b;              // matrices of the first edge, from the first path of the pass on
  int64_t b_step;          // from W edges to the next
};

// sums += weight * B x for an edge.
template <typename T, int D1, int D3> inline void add(Vec<T>* sums, Vec<T> weight, const Vec<T>* x, const T* matrix) {
  constexpr int W = Lanes<T>::width;
  Vec<T> wx[D1];
#pragma GCC unroll 16
  for (int m = 0; m < D1; ++m) wx[m] = x[m] * weight;
#pragma GCC unroll 16
  for (int n = 0; n < D3; ++n)
#pragma GCC unroll 16
    for (int m = 0; m < D1; ++m) sums[n] += wx[m] * matrix[(n * D1 + m) * W];
}

// Messages of an atom along the paths of a pass, whose numbers of output components are D3. The sums stay in registers.
template <typename T, int D1, int... D3>
void accumulate(const Inputs<T>& in, int64_t begin, int64_t end, Vec<T>* out) {
  constexpr int W = Lanes<T>::width, PATHS = sizeof...(D3), ROWS = (D3 + ...);
  Vec<T> sums[ROWS] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Vec<T>* weight = in.weights + i * PATHS;
    const Vec<T>* x = in.features + in.sender[i];
    const T* matrix = in.b + i / W * in.b_step + i % W;
    int path = 0, row = 0;
    ((add<T, D1, D3>(sums + row, weight[path], x, matrix + row * D1 * W), ++path, row += D3), ...);
  }
#pragma GCC unroll 32
  for (int n = 0; n < ROWS; ++n) out[n] = sums[n];
}

template <typename T> struct Kind {
  int64_t d1;
  std::vector<int64_t> d3;
  void (*accumulate)(const Inputs<T>&, int64_t, int64_t, Vec<T>*);
};

// Passes that there are, those with more paths first. Sums, features and a weight have to fit into the registers.
template <typename T> const std::vector<Kind<T>>& kinds() {
#define GAQ_KIND(D1, ...) {D1, {__VA_ARGS__}, accumulate<T, D1, __VA_ARGS__>}
#define GAQ_SINGLE(D1) GAQ_KIND(D1, 1), GAQ_KIND(D1, 3), GAQ_KIND(D1, 5), GAQ_KIND(D1, 7), GAQ_KIND(D1, 9)
  static const std::vector<Kind<T>> made = {
      GAQ_KIND(1, 1, 3, 5, 7), GAQ_KIND(1, 1, 3, 5), GAQ_KIND(1, 1, 3),
      GAQ_KIND(3, 1, 3, 3),    GAQ_KIND(3, 5, 5, 7), GAQ_KIND(3, 1, 3),
      GAQ_KIND(3, 5, 5),       GAQ_SINGLE(1),        GAQ_SINGLE(3),
      GAQ_SINGLE(5),           GAQ_SINGLE(7),        GAQ_SINGLE(9),
  };
#undef GAQ_KIND
#undef GAQ_SINGLE
  return made;
}

// Paths with one input block whose sums are made together: `paths` of them, from a place in `Plan::path` on.
template <typename T> struct Pass {
  int64_t first, paths;
  void (*accumulate)(const Inputs<T>&, int64_t, int64_t, Vec<T>*);
};

template <typename T> std::vector<Pass<T>> passes(const Plan& plan) {
  std::vector<Pass<T>> made;
  const int64_t count = plan.path.size();
  const auto fits = [&](const Kind<T>& kind, int64_t first) {
    const int64_t paths = kind.d3.size();
    if (plan.path[first].d1 != kind.d1 || first + paths > count) return false;
    for (int64_t j = 0; j < paths; ++j)
      if (plan.path[first + j].d3 != kind.d3[j] || !plan.path[first].same_input(plan.path[first + j])) return false;
    return true;
  };
  for (int64_t first = 0; first < count; first += made.back().paths)
    for (const Kind<T>& kind : kinds<T>())
      if (fits(kind, first)) {
        made.push_back({first, int64_t(kind.d3.size()), kind.accumulate});
        break;
      }
  return made;
}

// ---- what the sums read ----

// Senders of a batch's edges, each once.
struct Senders {
  std::vector<int64_t> atoms, place, place_of_atom;

  // `place` becomes where the features of each edge's sender begin, where those of an atom are `rows` registers.
  void find(const std::vector<int64_t>& senders, int64_t all, int64_t rows) {
    if (int64_t(place_of_atom.size()) < all) place_of_atom.assign(all, -1);
    atoms.clear(), place.clear();
    for (const int64_t sender : senders) {
      if (place_of_atom[sender] < 0) place_of_atom[sender] = atoms.size(), atoms.push_back(sender);
      place.push_back(place_of_atom[sender] * rows);
    }
    for (const int64_t atom : atoms) place_of_atom[atom] = -1;
  }
};

// Edges of a batch by the interval of the radial table that they read.
template <typename T> struct ByInterval {
  std::vector<int64_t> edge, row;
  std::vector<T> t;
  std::vector<int64_t> next;

  void sort(const Plan& plan, const Batch<T>& batch) {
    edge.resize(batch.count), row.resize(batch.count), t.resize(batch.count);
    next.assign(plan.intervals + 1, 0);
    const auto interval = [&](int64_t i) { return batch.row[i] / COEFFICIENTS % plan.intervals; };
    for (int64_t i = 0; i < batch.count; ++i) ++next[interval(i) + 1];
    for (int64_t k = 0; k < plan.intervals; ++k) next[k + 1] += next[k];
    for (int64_t i = 0; i < batch.count; ++i) {
      const int64_t to = next[interval(i)]++;
      edge[to] = i, row[to] = batch.row[i], t[to] = batch.t[i];
    }
  }
};

// Computes all of a thread's batches.
template <typename T> struct Worker {
  static constexpr int W = Lanes<T>::width;
  Batch<T> batch;
  Senders senders;
  ByInterval<T> by_interval;
  Registers<Vec<T>> weights, features;

  // Radial weights of number p, from channel c on, for all edges; those of an edge follow `step` registers after those
  // of the edge before.
  void weigh(const Plan& plan, const Path& path, int64_t chunk, int64_t c, const T* table, const T* scales, Vec<T>* to,
             int64_t step) const {
    const int64_t left = plan.channels - c, p = path.first + chunk;
    if (plan.tabulated) {
      const T* values = table + plan.table_row(0, p, 0) * plan.channels + c;
      Vec<T> k[COEFFICIENTS] = {};
      for (int64_t i = 0, last = -1; i < batch.count; ++i) {
        if (by_interval.row[i] != last) {
          last = by_interval.row[i];
          for (int j = 0; j < COEFFICIENTS; ++j) k[j] = load(values + (last + j) * plan.channels, left);
        }
        const T t = by_interval.t[i];
        Vec<T> w = k[COEFFICIENTS - 1];
        for (int j = COEFFICIENTS - 2; j >= 0; --j) w = w * t + k[j];
        to[by_interval.edge[i] * step] = w;
      }
    } else {
      for (int64_t i = 0; i < batch.count; ++i)
        to[i * step] = load(table + (batch.number[i] * plan.paths + p) * plan.channels + c, left);
    }
    if (!scales) return;
    const int64_t row = path.scale_row + chunk;
    for (int64_t i = 0; i < batch.count; ++i)
      to[i * step] *= load(scales + (batch.number[i] * plan.scale_rows + row) * plan.channels + c, left);
  }

  void gather(const Plan& plan, const T* h, int64_t row, int64_t d1, int64_t c, Vec<T>* to) const {
    for (const int64_t atom : senders.atoms)
      for (int64_t m = 0; m < d1; ++m)
        *to++ = load(h + (atom * plan.rows_in + row + m) * plan.channels + c, plan.channels - c);
  }

  // Messages of the batch's atoms along the paths of some passes, which have one input block, for W channels.
  void compute(const Plan& plan, const Pass<T>* pass, const Pass<T>* end, int64_t chunk, int64_t c, int64_t atom,
               int64_t atoms, const T* h, const T* table, const T* scales, T* out) {
    const Path& block = plan.path[pass->first];
    Vec<T>* x = features.reserve(senders.atoms.size() * block.d1);
    gather(plan, h, block.row_in + chunk * block.d1, block.d1, c, x);
    for (; pass < end; ++pass) {
      const Path* path = plan.path.data() + pass->first;
      Vec<T>* w = weights.reserve(batch.count * pass->paths);
      for (int64_t j = 0; j < pass->paths; ++j) weigh(plan, path[j], chunk, c, table, scales, w + j, pass->paths);
      const Inputs<T> in{w, x, senders.place.data(), batch.matrix(plan, 0) + path->b_offset * W, plan.b_size * W};
      for (int64_t a = 0; a + 1 < int64_t(batch.begin.size()); ++a) {
        Vec<T> sums[MAX_SH];
        pass->accumulate(in, batch.begin[a], batch.begin[a + 1], sums);
        const Vec<T>* sum = sums;
        for (int64_t j = 0; j < pass->paths; ++j) {
          T* row = out + (path[j].row_out(atoms, atom + a) + chunk) * plan.channels + c;
          for (int64_t n = 0; n < path[j].d3; ++n)
            store(row + n * path[j].stride * plan.channels, *sum++, plan.channels - c);
        }
      }
    }
  }
};

template <typename T>
void forward(const int64_t* ints, const double* reals, int64_t atoms, const Sorted& edges, const int64_t* sender,
             const int64_t* tables, const T* vectors, const T* h, const T* table, const T* scales, T* out,
             int64_t threads) {
  const Plan plan(ints, reals);
  const std::vector<Pass<T>> all = passes<T>(plan);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    static thread_local Worker<T> worker;
    const Share share(edges.first, part, threads);
    for (int64_t atom = share.begin, next; atom < share.end; atom = next) {
      next = worker.batch.fill(plan, edges, sender, tables, vectors, atom, share.end, EDGES_AT_ONCE);
      if (plan.tabulated) worker.by_interval.sort(plan, worker.batch);
      for (const Pass<T>*first = all.data(), *end = first + all.size(), *last; first < end; first = last) {
        const Path& block = plan.path[first->first];
        last = std::find_if(first, end, [&](const Pass<T>& p) { return !block.same_input(plan.path[p.first]); });
        worker.senders.find(worker.batch.sender, atoms, block.d1);
        for (int64_t chunk = 0; chunk < block.span; ++chunk)
          for (int64_t c = 0; c < plan.channels; c += Lanes<T>::width)
            worker.compute(plan, first, last, chunk, c, atom, atoms, h, table, scales, out);
      }
    }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                            \
  GAQ_KERNEL(convolution, NAME, T) {                                                                                   \
    forward<T>(ints, reals, atoms, Sorted(edges, atoms, receiver), sender, tables, vectors, features, weights, scales, \
               message, threads);                                                                                      \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
