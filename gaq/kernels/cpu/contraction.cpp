// Polynomials of node features with coefficients for each species and channel, and their derivative, on the CPU.
// contraction.py has the mathematics and the layouts.
//
// The monomials form a tree: each is its parent times one more feature. The values of monomials with children are kept
// for a block of channels; the derivative walks the tree backwards.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "signatures.h"

namespace {

struct Node {
  int64_t parent;      // slot of the parent's value; -1: no parent, the monomial is a feature
  int64_t factor;      // row of the feature by which the parent is multiplied
  int64_t slot;        // slot of the monomial's value; -1: not kept, it has no children
  int64_t begin, end;  // range of the monomial's terms
};

struct Plan {
  int64_t channels, rows_in, rows_out, nodes, terms, slots;
  const Node* node;
  const int64_t* output;  // row of the output of each term

  explicit Plan(const int64_t* ints) {
    channels = ints[0], rows_in = ints[1], rows_out = ints[2], nodes = ints[3], terms = ints[4], slots = ints[5];
    node = reinterpret_cast<const Node*>(ints + 6);
    output = ints + 6 + 5 * nodes;
  }
};

template <typename T> struct Scratch {
  std::vector<Vec<T>> x, value, out, grad_x, grad_value;
  explicit Scratch(const Plan& p)
      : x(p.rows_in), value(p.slots), out(p.rows_out), grad_x(p.rows_in), grad_value(p.slots) {}
};

template <typename T>
void forward(const int64_t* ints, int64_t atoms, const int64_t* species, const T* x, const T* table, T* out,
             int64_t threads) {
  const Plan plan(ints);
  const int64_t C = plan.channels;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> s(plan);
#pragma omp for schedule(static)
    for (int64_t a = 0; a < atoms; ++a) {
      const T* coefficients = table + species[a] * plan.terms * C;
      for (int64_t c = 0; c < C; c += Lanes<T>::width) {
        const int64_t left = C - c;
        for (int64_t m = 0; m < plan.rows_in; ++m) s.x[m] = load(x + (a * plan.rows_in + m) * C + c, left);
        std::fill(s.out.begin(), s.out.end(), Vec<T>{});
        for (int64_t i = 0; i < plan.nodes; ++i) {
          const Node& n = plan.node[i];
          Vec<T> v = s.x[n.factor];
          if (n.parent >= 0) v *= s.value[n.parent];
          if (n.slot >= 0) s.value[n.slot] = v;
          for (int64_t t = n.begin; t < n.end; ++t) s.out[plan.output[t]] += v * load(coefficients + t * C + c, left);
        }
        for (int64_t o = 0; o < plan.rows_out; ++o) store(out + (a * plan.rows_out + o) * C + c, s.out[o], left);
      }
    }
  }
}

template <typename T>
void backward(const int64_t* ints, int64_t atoms, const int64_t* species, const T* x, const T* table, const T* grad_out,
              T* grad_x, int64_t threads) {
  const Plan plan(ints);
  const int64_t C = plan.channels;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> s(plan);
#pragma omp for schedule(static)
    for (int64_t a = 0; a < atoms; ++a) {
      const T* coefficients = table + species[a] * plan.terms * C;
      for (int64_t c = 0; c < C; c += Lanes<T>::width) {
        const int64_t left = C - c;
        for (int64_t m = 0; m < plan.rows_in; ++m) s.x[m] = load(x + (a * plan.rows_in + m) * C + c, left);
        for (int64_t o = 0; o < plan.rows_out; ++o) s.out[o] = load(grad_out + (a * plan.rows_out + o) * C + c, left);
        for (int64_t i = 0; i < plan.nodes; ++i) {
          const Node& n = plan.node[i];
          if (n.slot < 0) continue;
          s.value[n.slot] = n.parent >= 0 ? s.value[n.parent] * s.x[n.factor] : s.x[n.factor];
        }
        std::fill(s.grad_x.begin(), s.grad_x.end(), Vec<T>{});
        std::fill(s.grad_value.begin(), s.grad_value.end(), Vec<T>{});
        for (int64_t i = plan.nodes - 1; i >= 0; --i) {
          const Node& n = plan.node[i];
          Vec<T> g = {};
          if (n.slot >= 0) g = s.grad_value[n.slot];
          for (int64_t t = n.begin; t < n.end; ++t) g += s.out[plan.output[t]] * load(coefficients + t * C + c, left);
          if (n.parent >= 0) {
            s.grad_value[n.parent] += g * s.x[n.factor];
            s.grad_x[n.factor] += g * s.value[n.parent];
          } else {
            s.grad_x[n.factor] += g;
          }
        }
        for (int64_t m = 0; m < plan.rows_in; ++m) store(grad_x + (a * plan.rows_in + m) * C + c, s.grad_x[m], left);
      }
    }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                    \
  GAQ_KERNEL(contraction, NAME, T) { forward<T>(ints, atoms, species, features, coefficients, out, threads); } \
  GAQ_KERNEL(contraction_backward, NAME, T) {                                                                  \
    backward<T>(ints, atoms, species, features, coefficients, grad, grad_features, threads);                   \
  }
GAQ_EXPORT(float32, float)
GAQ_EXPORT(float64, double)
}
