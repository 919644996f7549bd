// Product of each edge's features with those of its centre atom, and its derivative, on the CPU. product.py has the
// mathematics and the layouts.
//
// Coefficients, path weights and the features of a centre make one small matrix for each channel, which serves all
// edges of the centre.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "edges.h"
#include "lanes.h"
#include "signatures.h"

namespace {

// One coefficient that is not zero.
struct Entry {
  int64_t path, j, pair;
  double value;
};

// One element (i, k) of a centre's matrix.
struct Pair {
  int64_t i, k;
};

struct Plan {
  int64_t channels, d1, d2, d3, paths;
  std::vector<Pair> pairs;
  std::vector<Entry> entries;

  Plan(const int64_t* ints, const double* reals) {
    channels = ints[0], d1 = ints[1], d2 = ints[2], d3 = ints[3], paths = ints[4];
    const int64_t pair_count = ints[5], entry_count = ints[6];
    const int64_t* p = ints + 7;
    for (int64_t n = 0; n < pair_count; ++n, p += 2) pairs.push_back({p[0], p[1]});
    for (int64_t n = 0; n < entry_count; ++n, p += 3) entries.push_back({p[0], p[1], p[2], reals[n]});
  }
};

// From (channel, component) in memory to a register of channels for each component, and back.
template <typename T> void transpose_in(const T* source, int64_t left, int64_t d, Vec<T>* target) {
  constexpr int W = Lanes<T>::width;
  T* flat = reinterpret_cast<T*>(target);
  if (left < W) std::fill(flat, flat + d * W, T(0));
  const int64_t count = std::min<int64_t>(left, W);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t i = 0; i < d; ++i) flat[i * W + lane] = source[lane * d + i];
}
template <typename T> void transpose_out(const Vec<T>* source, int64_t left, int64_t d, T* target) {
  constexpr int W = Lanes<T>::width;
  const T* flat = reinterpret_cast<const T*>(source);
  const int64_t count = std::min<int64_t>(left, W);
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t i = 0; i < d; ++i) target[lane * d + i] = flat[i * W + lane];
}

// Working memory of a thread, for one slice of channels.
template <typename T> struct Scratch {
  std::vector<Vec<T>> x, y, out, grad, matrix, grad_matrix, weights;

  explicit Scratch(const Plan& plan)
      : x(plan.d1), y(plan.d2), out(std::max(plan.d1, std::max(plan.d2, plan.d3))), grad(plan.d3),
        matrix(plan.pairs.size()), grad_matrix(plan.pairs.size()), weights(plan.paths) {}

  void load_centre(const Plan& plan, const T* x2, const T* w, int64_t c) {
    const int64_t left = plan.channels - c;
    transpose_in(x2 + c * plan.d2, left, plan.d2, y.data());
    transpose_in(w + c * plan.paths, left, plan.paths, weights.data());
    std::fill(matrix.begin(), matrix.end(), Vec<T>{});
    for (const Entry& e : plan.entries) matrix[e.pair] += weights[e.path] * y[e.j] * T(e.value);
  }
};

template <typename T>
void forward(const Plan& plan, int64_t atoms, const Sorted& edges, const T* x1, const T* x2, const T* w, T* out,
             int64_t threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Scratch<T> s(plan);
    const Share share(edges.first, part, threads);
    for (int64_t a = share.begin; a < share.end; ++a) {
      if (edges.first[a] == edges.first[a + 1]) continue;
      for (int64_t c = 0; c < plan.channels; c += Lanes<T>::width) {
        const int64_t left = plan.channels - c;
        s.load_centre(plan, x2 + a * plan.channels * plan.d2, w, c);
        for (int64_t n = edges.first[a]; n < edges.first[a + 1]; ++n) {
          const int64_t row = edges.order[n] * plan.channels + c;
          transpose_in(x1 + row * plan.d1, left, plan.d1, s.x.data());
          std::fill(s.out.begin(), s.out.end(), Vec<T>{});
          for (size_t p = 0; p < plan.pairs.size(); ++p) s.out[plan.pairs[p].k] += s.x[plan.pairs[p].i] * s.matrix[p];
          transpose_out(s.out.data(), left, plan.d3, out + row * plan.d3);
        }
      }
    }
  }
}

template <typename T>
void backward(const Plan& plan, int64_t atoms, const Sorted& edges, const T* x1, const T* x2, const T* w, const T* grad,
              T* grad_x1, T* grad_x2, int64_t threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    Scratch<T> s(plan);
    const Share share(edges.first, part, threads);
    for (int64_t a = share.begin; a < share.end; ++a) {
      for (int64_t c = 0; c < plan.channels; c += Lanes<T>::width) {
        const int64_t left = plan.channels - c;
        s.load_centre(plan, x2 + a * plan.channels * plan.d2, w, c);
        std::fill(s.grad_matrix.begin(), s.grad_matrix.end(), Vec<T>{});
        for (int64_t n = edges.first[a]; n < edges.first[a + 1]; ++n) {
          const int64_t row = edges.order[n] * plan.channels + c;
          transpose_in(x1 + row * plan.d1, left, plan.d1, s.x.data());
          transpose_in(grad + row * plan.d3, left, plan.d3, s.grad.data());
          std::fill(s.out.begin(), s.out.end(), Vec<T>{});
          for (size_t p = 0; p < plan.pairs.size(); ++p) {
            const Pair& pair = plan.pairs[p];
            s.out[pair.i] += s.grad[pair.k] * s.matrix[p];
            s.grad_matrix[p] += s.x[pair.i] * s.grad[pair.k];
          }
          transpose_out(s.out.data(), left, plan.d1, grad_x1 + row * plan.d1);
        }
        std::fill(s.out.begin(), s.out.end(), Vec<T>{});
        for (const Entry& e : plan.entries) s.out[e.j] += s.weights[e.path] * s.grad_matrix[e.pair] * T(e.value);
        transpose_out(s.out.data(), left, plan.d2, grad_x2 + (a * plan.channels + c) * plan.d2);
      }
    }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                            \
  GAQ_KERNEL(product, NAME, T) {                                                                                       \
    forward<T>(Plan(ints, reals), atoms, Sorted(edges, atoms, centre), x, y, weights, out, threads);                   \
  }                                                                                                                    \
  GAQ_KERNEL(product_backward, NAME, T) {                                                                              \
    backward<T>(Plan(ints, reals), atoms, Sorted(edges, atoms, centre), x, y, weights, grad, grad_x, grad_y, threads); \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
