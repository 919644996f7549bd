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
#include "passes.h"
#include "plan.h"
#include "signatures.h"

namespace {

// Most edges of a batch: enough that an interval's polynomials serve several, few enough for their weights to stay in
// cache. With several tables fewer edges share an interval.
constexpr int64_t EDGES_AT_ONCE = 1024, EDGES_OF_TABLES = 4096;

// ---- sums over the edges of an atom ----

// What the sums of some channels read, for all edges of a batch.
template <typename T> struct Inputs {
  const Vec<T>* weights;  // of all edges, for one path of a pass after the other
  int64_t edges;
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
  constexpr int W = Lanes<T>::width, ROWS = (D3 + ...);
  Vec<T> sums[ROWS] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Vec<T>* x = in.features + in.sender[i];
    const T* matrix = in.b + i / W * in.b_step + i % W;
    int path = 0, row = 0;
    ((add<T, D1, D3>(sums + row, in.weights[path * in.edges + i], x, matrix + row * D1 * W), ++path, row += D3), ...);
  }
#pragma GCC unroll 32
  for (int n = 0; n < ROWS; ++n) out[n] = sums[n];
}

// Kinds of passes, those with more paths first. Sums, features and a weight have to fit into the registers.
template <typename T> using Accumulate = void (*)(const Inputs<T>&, int64_t, int64_t, Vec<T>*);
template <typename T> const std::vector<Kind<Accumulate<T>>>& kinds() {
  static const std::vector<Kind<Accumulate<T>>> made = {
      GAQ_KIND(accumulate, 1, 1, 3, 5, 7), GAQ_KIND(accumulate, 1, 1, 3, 5), GAQ_KIND(accumulate, 1, 1, 3),
      GAQ_KIND(accumulate, 3, 1, 3, 3),    GAQ_KIND(accumulate, 3, 5, 5, 7), GAQ_KIND(accumulate, 3, 1, 3),
      GAQ_KIND(accumulate, 3, 5, 5),       GAQ_SINGLES(accumulate),
  };
  return made;
}

// ---- what the sums read ----

// Senders of a batch's edges, each once.
struct Senders {
  std::vector<int64_t> atoms, place, place_of_atom;

  // `place` becomes where the features of each edge's sender begin, where those of an atom are `rows` registers.
  void find(const std::vector<int64_t>& senders, int64_t count, int64_t all, int64_t rows) {
    if (int64_t(place_of_atom.size()) < all) place_of_atom.assign(all, -1);
    atoms.clear();
    if (int64_t(place.size()) < count) place.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      int64_t& atom_place = place_of_atom[senders[i]];
      if (atom_place < 0) atom_place = atoms.size(), atoms.push_back(senders[i]);
      place[i] = atom_place * rows;
    }
    for (const int64_t atom : atoms) place_of_atom[atom] = -1;
  }
};

// Computes all of a thread's batches.
template <typename T> struct Worker {
  static constexpr int W = Lanes<T>::width;
  Batch<T> batch;
  Senders senders;
  Runs<T> runs;
  Registers<Vec<T>> weights, features;

  // Radial weights of the paths of a pass from channel c on, for all edges, one path after the other.
  void weigh(const Plan& plan, const Pass<Accumulate<T>>& pass, int64_t chunk, int64_t c, const T* table,
             const T* scales, Vec<T>* to) const {
    const int64_t left = plan.channels - c;
    const Path* path = plan.path.data() + pass.first;
    if (plan.tabulated) {
      const T* values[MOST_PATHS];
      for (int64_t j = 0; j < pass.paths; ++j)
        values[j] = table + plan.table_row(0, path[j].first + chunk, 0) * plan.channels + c;
      static_assert(MOST_PATHS == 4);
      switch (pass.paths) {
        case 1: interpolate<1>(plan.channels, values, left, to); break;
        case 2: interpolate<2>(plan.channels, values, left, to); break;
        case 3: interpolate<3>(plan.channels, values, left, to); break;
        case 4: interpolate<4>(plan.channels, values, left, to); break;
      }
    }
    for (int64_t j = 0; j < pass.paths; ++j, to += batch.count) {
      const int64_t p = path[j].first + chunk, row = path[j].scale_row + chunk;
      if (!plan.tabulated)
        for (int64_t i = 0; i < batch.count; ++i)
          to[i] = load(table + (batch.number[i] * plan.paths + p) * plan.channels + c, left);
      if (scales)
        for (int64_t i = 0; i < batch.count; ++i)
          to[i] *= load(scales + (batch.number[i] * plan.scale_rows + row) * plan.channels + c, left);
    }
  }

  // The same from tables: `values` are the rows of the first interval.
  template <int PATHS> void interpolate(int64_t channels, const T* const* values, int64_t left, Vec<T>* to) const {
    const int64_t* edge = runs.edge.data();
    const T* t = runs.t.data();
    const int64_t count = batch.count;
    int64_t i = 0;
    for (const typename Runs<T>::Run& run : runs.runs) {
      Vec<T> k[PATHS][COEFFICIENTS];
#pragma GCC unroll 8
      for (int p = 0; p < PATHS; ++p)
#pragma GCC unroll 8
        for (int j = 0; j < COEFFICIENTS; ++j) k[p][j] = load(values[p] + (run.row + j) * channels, left);
      for (; i < run.end; ++i) {
        Vec<T>* target = to + edge[i];
#pragma GCC unroll 8
        for (int p = 0; p < PATHS; ++p) {
          Vec<T> w = k[p][COEFFICIENTS - 1];
#pragma GCC unroll 8
          for (int j = COEFFICIENTS - 2; j >= 0; --j) w = w * t[i] + k[p][j];
          target[p * count] = w;
        }
      }
    }
  }

  void gather(const Plan& plan, const T* h, int64_t row, int64_t d1, int64_t c, Vec<T>* to) const {
    for (const int64_t atom : senders.atoms)
      for (int64_t m = 0; m < d1; ++m)
        *to++ = load(h + (atom * plan.rows_in + row + m) * plan.channels + c, plan.channels - c);
  }

  // Messages of the batch's atoms along the paths of some passes, which have one input block, for W channels.
  void compute(const Plan& plan, const Pass<Accumulate<T>>* pass, const Pass<Accumulate<T>>* end, int64_t chunk,
               int64_t c, int64_t atom, int64_t receivers, const T* h, const T* table, const T* scales, T* out) {
    const Path& block = plan.path[pass->first];
    Vec<T>* x = features.reserve(senders.atoms.size() * block.d1);
    gather(plan, h, block.row_in + chunk * block.d1, block.d1, c, x);
    for (; pass < end; ++pass) {
      const Path* path = plan.path.data() + pass->first;
      Vec<T>* w = weights.reserve(batch.count * pass->paths);
      weigh(plan, *pass, chunk, c, table, scales, w);
      const Inputs<T> in{
          w, batch.count, x, senders.place.data(), batch.matrix(plan, 0) + path->b_offset * W, plan.b_size * W};
      for (int64_t a = 0; a + 1 < int64_t(batch.begin.size()); ++a) {
        Vec<T> sums[MAX_SH];
        pass->function(in, batch.begin[a], batch.begin[a + 1], sums);
        const Vec<T>* sum = sums;
        for (int64_t j = 0; j < pass->paths; ++j) {
          T* row = out + (path[j].row_out(receivers, atom + a) + chunk) * plan.channels + c;
          for (int64_t n = 0; n < path[j].d3; ++n)
            store(row + n * path[j].stride * plan.channels, *sum++, plan.channels - c);
        }
      }
    }
  }
};

template <typename T>
void forward(const int64_t* ints, const double* reals, int64_t senders, const Sorted& edges, const int64_t* sender,
             const int64_t* tables, const T* vectors, const T* h, const T* table, const T* scales, const T* radial,
             T* out, int64_t threads) {
  const Plan plan(ints, reals);
  const std::vector<Pass<Accumulate<T>>> all = passes(plan, kinds<T>());
  const int64_t most = tables ? EDGES_OF_TABLES : EDGES_AT_ONCE, receivers = edges.first.size() - 1;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Worker<T>& worker = *of_thread<Worker<T>>();
    const Share share(edges.first, part, threads);
    for (int64_t atom = share.begin, next; atom < share.end; atom = next) {
      next = worker.batch.fill(plan, edges, sender, tables, vectors, radial, atom, share.end, most);
      if (plan.tabulated) worker.runs.sort(plan, worker.batch, tables != nullptr);
      for (const Pass<Accumulate<T>>*first = all.data(), *end = first + all.size(), *last; first < end; first = last) {
        const Path& block = plan.path[first->first];
        last = std::find_if(first, end,
                            [&](const Pass<Accumulate<T>>& p) { return !block.same_input(plan.path[p.first]); });
        worker.senders.find(worker.batch.sender, worker.batch.count, senders, block.d1);
        for (int64_t chunk = 0; chunk < block.span; ++chunk)
          for (int64_t c = 0; c < plan.channels; c += Lanes<T>::width)
            worker.compute(plan, first, last, chunk, c, atom, receivers, h, table, scales, out);
      }
    }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                          \
  GAQ_KERNEL(convolution, NAME, T) {                                                                                 \
    forward<T>(ints, reals, senders, Sorted(edges, receivers, receiver), sender, tables, vectors, features, weights, \
               scales, radial, message, threads);                                                                    \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
