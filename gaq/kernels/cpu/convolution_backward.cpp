// Derivative of the fused equivariant convolution on the CPU, by edge vectors, node features and weights; see
// convolution.cpp.

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

// Gradients of the edges of one atom along one path: by B, by the length, by node features (null: not asked for), and
// by the radial weights where these are given for each edge, and by the factors of the edges where there are any.
template <typename T, int D1, int D3>
void differentiate(const Plan& plan, const Path& path, const Batch<T>& batch, int64_t begin, int64_t end, const T* h,
                   const T* table, const T* scales, const T* grad_out, T* grad_b, T* grad_length, T* grad_h,
                   T* grad_table, T* grad_scales) {
  constexpr int W = Lanes<T>::width;
  const int64_t C = plan.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t number = batch.number[i], sender = batch.sender[i];
    const T t = plan.tabulated ? batch.t[i] : T(0);
    const T* matrix = batch.matrix(plan, i) + path.b_offset * W;
    Vec<T> dots[D3][D1] = {};
    Vec<T> along = {};
    for (int64_t chunk = 0; chunk < path.span; ++chunk) {
      const int64_t p = path.first + chunk, row_in = path.row_in + chunk * D1;
      for (int64_t c = 0; c < C; c += Lanes<T>::width) {
        const int64_t left = C - c;
        const T* row = h + (sender * plan.rows_in + row_in) * C + c;
        Vec<T> w, slope = {};
        if (plan.tabulated) {
          const T* values = table + (batch.row[i] + plan.table_row(0, p, 0)) * C + c;
          slope = w = load(values + (COEFFICIENTS - 1) * C, left);
          for (int k = COEFFICIENTS - 2; k > 0; --k) {
            w = w * t + load(values + k * C, left);
            slope = slope * t + w;
          }
          w = w * t + load(values, left);
        } else {
          w = load(table + (number * plan.paths + p) * C + c, left);
        }
        const int64_t place = scales ? (number * plan.scale_rows + path.scale_row + chunk) * C + c : 0;
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
          Vec<T> q = g[0] * matrix[m * W];
          for (int n = 1; n < D3; ++n) q += g[n] * matrix[(n * D1 + m) * W];
          into_weight += q * x[m];
          if (grad_h) {
            T* target = grad_h + (sender * plan.rows_in + row_in + m) * C + c;
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
          store(grad_table + (number * plan.paths + p) * C + c, into_weight * scale, left);
      }
    }
    T* target = grad_b + (i / W * plan.b_size + path.b_offset) * W + i % W;
    for (int n = 0; n < D3; ++n)
      for (int m = 0; m < D1; ++m) target[(n * D1 + m) * W] = sum<T>(dots[n][m]);
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

// Most edges of a batch: few enough for what is kept of them to stay in cache.
constexpr int64_t EDGES_AT_ONCE = 512;

template <typename T> struct Worker {
  Batch<T> batch;
  Registers<Vec<T>> grad_b;
  std::vector<T> grad_length;
};

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
    static thread_local Worker<T> worker;
    Batch<T>& batch = worker.batch;
    T* part_h = grad_h ? (part == 0 ? grad_h : extra.data() + (part - 1) * size) : nullptr;
    const Share share(edges.first, part, threads);
    for (int64_t atom = share.begin, next; atom < share.end; atom = next) {
      next = batch.fill(plan, edges, sender, tables, vectors, atom, share.end, EDGES_AT_ONCE);
      Vec<T>* grad_b = worker.grad_b.reserve(batch.groups() * plan.b_size);
      // Lanes beyond the last edge are read, too.
      if (batch.groups()) std::fill(grad_b + (batch.groups() - 1) * plan.b_size, grad_b + batch.groups() * plan.b_size, Vec<T>{});
      worker.grad_length.assign(batch.groups() * Lanes<T>::width, T(0));
      for (const Path& path : plan.path) {
        for (int64_t a = atom; a < next; ++a) {
          const int64_t begin = batch.begin[a - atom], end = batch.begin[a - atom + 1];
          const T* grad = grad_out + path.row_out(atoms, a) * plan.channels;
          GAQ_DISPATCH(differentiate, path.d1, path.d3, plan, path, batch, begin, end, h, table, scales, grad,
                       reinterpret_cast<T*>(grad_b), worker.grad_length.data(), part_h, grad_table, grad_scales)
        }
      }
      batch.differentiate(plan, grad_b, worker.grad_length.data(), grad_vectors);
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

#define GAQ_EXPORT(NAME, T)                                                                                     \
  GAQ_KERNEL(convolution_backward, NAME, T) {                                                                   \
    backward<T>(ints, reals, atoms, Sorted(edges, atoms, receiver), sender, tables, vectors, features, weights, \
                scales, grad, grad_vectors, grad_features, grad_weights, grad_scales, threads);                 \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
