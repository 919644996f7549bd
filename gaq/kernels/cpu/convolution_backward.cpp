// Derivative of the fused equivariant convolution on the CPU, by edge vectors, node features and weights; see
// convolution.cpp.
//
// The edges of a batch are taken in the order of the radial table: what they read of it stays in the first cache. For
// each edge, the dot products that make the gradient by its matrices B are summed over all channels in registers.

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

// Most edges of a batch: many for the order of the radial table, few for the gradients of messages that they read. With
// several tables fewer edges share an interval.
constexpr int64_t EDGES_AT_ONCE = 1024, EDGES_OF_TABLES = 4096;

// What the call reads and writes. Not asked for is what is null; `grad_weights` is of weights of each edge.
template <typename T> struct Arrays {
  int64_t senders, receivers;
  const T *h, *weights, *scales, *grad_out;
  T *grad_vectors, *grad_h, *grad_weights, *grad_scales;
};

// An edge as all paths read it.
template <typename T> struct Edge {
  int64_t number, row;
  T t;
  const T* h;  // features of its sender, from the first component of the input block on
  T* grad_h;
};

// Radial weights, and their slope in the position within the interval, for some channels.
template <typename T, bool FULL>
inline void weigh(const Plan& plan, const Arrays<T>& arrays, const Edge<T>& e, int64_t p, int64_t c, Vec<T>& w,
                  Vec<T>& slope) {
  const int64_t left = FULL ? Lanes<T>::width : plan.channels - c;
  if (plan.tabulated) {
    const T* values = arrays.weights + (e.row + plan.table_row(0, p, 0)) * plan.channels + c;
    slope = w = load(values + (COEFFICIENTS - 1) * plan.channels, left);
#pragma GCC unroll 8
    for (int k = COEFFICIENTS - 2; k > 0; --k) {
      w = w * e.t + load(values + k * plan.channels, left);
      slope = slope * e.t + w;
    }
    w = w * e.t + load(values, left);
  } else {
    w = load(arrays.weights + (e.number * plan.paths + p) * plan.channels + c, left);
    slope = Vec<T>{};
  }
}

// Gradients of an edge along a path for some channels. `dots` are by B, `along` by the position in the interval,
// `into_x` by the features of the sender.
template <typename T, bool FULL, int D1, int D3>
inline void along_path(const Plan& plan, const Arrays<T>& arrays, const Edge<T>& e, const Path& path, int64_t chunk,
                       int64_t c, const Vec<T>* x, const T* matrix, const T* grad_out, Vec<T>* dots, Vec<T>& along,
                       Vec<T>* into_x) {
  constexpr int W = Lanes<T>::width;
  const int64_t left = FULL ? W : plan.channels - c, p = path.first + chunk;
  Vec<T> w, slope, scale = {}, unscaled = {};
  weigh<T, FULL>(plan, arrays, e, p, c, w, slope);
  const int64_t place = (e.number * plan.scale_rows + path.scale_row + chunk) * plan.channels + c;
  if (arrays.scales) {
    scale = load(arrays.scales + place, left), unscaled = w;
    w *= scale, slope *= scale;
  }
  Vec<T> wx[D1], q[D1] = {};
#pragma GCC unroll 16
  for (int m = 0; m < D1; ++m) wx[m] = x[m] * w;
#pragma GCC unroll 16
  for (int n = 0; n < D3; ++n) {
    const Vec<T> g = load(grad_out + (n * path.stride + chunk) * plan.channels + c, left);
#pragma GCC unroll 16
    for (int m = 0; m < D1; ++m) dots[n * D1 + m] += g * wx[m], q[m] += g * matrix[(n * D1 + m) * W];
  }
  Vec<T> into_weight = q[0] * x[0];
#pragma GCC unroll 16
  for (int m = 1; m < D1; ++m) into_weight += q[m] * x[m];
#pragma GCC unroll 16
  for (int m = 0; m < D1; ++m) into_x[m] += q[m] * w;
  if (arrays.scales) {
    T* target = arrays.grad_scales + place;
    store(target, load(target, left) + into_weight * unscaled, left);
    if (!plan.tabulated) into_weight *= scale;
  }
  if (plan.tabulated)
    along += into_weight * slope;
  else
    store(arrays.grad_weights + (e.number * plan.paths + p) * plan.channels + c, into_weight, left);
}

// Gradients of an edge along the paths of a pass. `grad_out` are those of its receiver, path after path.
template <typename T, int D1, int... D3>
void differentiate(const Plan& plan, const Arrays<T>& arrays, const Edge<T>& e, const Path* path,
                   const T* const* grad_out, const T* matrix, T* grad_b, Vec<T>* along_edge) {
  constexpr int W = Lanes<T>::width, ROWS = (D3 + ...);
  Vec<T> dots[ROWS * D1] = {}, along = *along_edge;
  for (int64_t chunk = 0; chunk < path->span; ++chunk) {
    const auto tile = [&](int64_t c, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      const int64_t left = FULL ? W : plan.channels - c, begin = chunk * D1 * plan.channels + c;
      Vec<T> x[D1], into_x[D1] = {};
#pragma GCC unroll 16
      for (int m = 0; m < D1; ++m) x[m] = load(e.h + begin + m * plan.channels, left);
      int j = 0, row = 0;
      ((along_path<T, FULL, D1, D3>(plan, arrays, e, path[j], chunk, c, x, matrix + row * D1 * W, grad_out[j],
                                    dots + row * D1, along, into_x),
        ++j, row += D3),
       ...);
      if (e.grad_h)
#pragma GCC unroll 16
        for (int m = 0; m < D1; ++m) {
          T* target = e.grad_h + begin + m * plan.channels;
          store(target, load(target, left) + into_x[m], left);
        }
    };
    int64_t c = 0;
    for (; c + W <= plan.channels; c += W) tile(c, std::true_type());
    if (c < plan.channels) tile(c, std::false_type());
  }
  sums<T, ROWS * D1>(dots, grad_b, W);
  *along_edge = along;
}

template <typename T>
using Differentiate = void (*)(const Plan&, const Arrays<T>&, const Edge<T>&, const Path*, const T* const*, const T*,
                               T*, Vec<T>*);
// Kinds of passes, those with more paths first. Dot products have to fit into the registers.
template <typename T> const std::vector<Kind<Differentiate<T>>>& kinds() {
  static const std::vector<Kind<Differentiate<T>>> made = {
      GAQ_KIND(differentiate, 1, 1, 3, 5, 7), GAQ_KIND(differentiate, 1, 1, 3, 5), GAQ_KIND(differentiate, 1, 1, 3),
      GAQ_KIND(differentiate, 3, 1, 3),       GAQ_SINGLES(differentiate),
  };
  return made;
}

template <typename T> struct Worker {
  static constexpr int W = Lanes<T>::width;
  Batch<T> batch;
  Runs<T> runs;
  std::vector<int64_t> receiver;
  Registers<Vec<T>> grad_b, along;
  std::vector<T> grad_length;

  // Gradients of the batch's edges, whose first receiver is `atom`.
  void compute(const Plan& plan, const std::vector<Pass<Differentiate<T>>>& all, const Arrays<T>& arrays, int64_t atom,
               bool several) {
    prepare(plan, atom, several);
    Vec<T>* by_b = grad_b.reserve(batch.groups() * plan.b_size);
    Vec<T>* by_length = along.reserve(batch.count);
    std::fill(by_length, by_length + batch.count, Vec<T>{});
    // Lanes beyond the last edge are read, too.
    if (batch.groups())
      std::fill(by_b + (batch.groups() - 1) * plan.b_size, by_b + batch.groups() * plan.b_size, Vec<T>{});
    for (const Pass<Differentiate<T>>& pass : all) {
      const Path* path = plan.path.data() + pass.first;
      for (int64_t place = 0; place < batch.count; ++place) {
        const int64_t i = plan.tabulated ? runs.edge[place] : place;
        const int64_t row = (batch.sender[i] * plan.rows_in + path->row_in) * plan.channels;
        const Edge<T> e{batch.number[i], plan.tabulated ? batch.row[i] : 0, plan.tabulated ? batch.t[i] : T(0),
                        arrays.h + row, arrays.grad_h ? arrays.grad_h + row : nullptr};
        const T* grad_out[MOST_PATHS];
        for (int64_t j = 0; j < pass.paths; ++j)
          grad_out[j] = arrays.grad_out + path[j].row_out(arrays.receivers, receiver[i]) * plan.channels;
        T* to = reinterpret_cast<T*>(by_b + i / W * plan.b_size + path->b_offset) + i % W;
        pass.function(plan, arrays, e, path, grad_out, batch.matrix(plan, i) + path->b_offset * W, to, by_length + i);
      }
    }
    grad_length.resize(batch.groups() * W);
    for (int64_t i = 0; i < batch.count; ++i)
      grad_length[i] = sum<T>(by_length[i]) * T(double(plan.intervals) / plan.r_max);
    batch.differentiate(plan, by_b, grad_length.data(), arrays.grad_vectors);
  }

 private:
  void prepare(const Plan& plan, int64_t atom, bool several) {
    if (plan.tabulated) runs.sort(plan, batch, several);
    receiver.resize(batch.count);
    for (size_t a = 0; a + 1 < batch.begin.size(); ++a)
      std::fill(receiver.begin() + batch.begin[a], receiver.begin() + batch.begin[a + 1], atom + a);
  }
};

template <typename T>
void backward(const int64_t* ints, const double* reals, const Sorted& edges, const int64_t* sender,
              const int64_t* tables, const T* vectors, const T* radial, const Arrays<T>& arrays, int64_t threads) {
  const Plan plan(ints, reals);
  const std::vector<Pass<Differentiate<T>>> all = passes(plan, kinds<T>());
  const int64_t most = tables ? EDGES_OF_TABLES : EDGES_AT_ONCE;
  const int64_t size = arrays.senders * plan.rows_in * plan.channels;
  // Each part adds into its own copy of the node features' gradient; the copies are summed in a fixed order.
  std::vector<T> extra(arrays.grad_h && threads > 1 ? size * (threads - 1) : 0, T(0));
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Worker<T>& worker = *of_thread<Worker<T>>();
    Arrays<T> of_part = arrays;
    if (arrays.grad_h && part > 0) of_part.grad_h = extra.data() + (part - 1) * size;
    const Share share(edges.first, part, threads);
    for (int64_t atom = share.begin, next; atom < share.end; atom = next) {
      next = worker.batch.fill(plan, edges, sender, tables, vectors, radial, atom, share.end, most);
      worker.compute(plan, all, of_part, atom, tables != nullptr);
    }
  }
  if (!extra.empty()) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size; ++i)
      for (int64_t part = 1; part < threads; ++part) arrays.grad_h[i] += extra[(part - 1) * size + i];
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                         \
  GAQ_KERNEL(convolution_backward, NAME, T) {                                                                       \
    const Arrays<T> arrays{senders, receivers,    features,      weights,      scales,                              \
                           grad,    grad_vectors, grad_features, grad_weights, grad_scales};                        \
    backward<T>(ints, reals, Sorted(edges, receivers, receiver), sender, tables, vectors, radial, arrays, threads); \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
