// Polynomials of node features with coefficients for each species and channel, and their derivative, on the CPU.
// contraction.py has the mathematics and the layouts.
//
// The monomials form a tree: each is its parent times one more feature. The values of monomials with children are kept
// for a block of channels; the derivative walks the tree backwards.

#include <algorithm>
#include <cstdint>
#include <type_traits>
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

// Atoms that are computed at once: neighbours of one species, which share their coefficients. Their sums do not wait
// for each other.
constexpr int AT_ONCE = 4;

struct Run {
  int64_t first, count;
};

std::vector<Run> runs(int64_t atoms, const int64_t* species) {
  std::vector<Run> made;
  for (int64_t a = 0; a < atoms; a += made.back().count) {
    int64_t end = a + 1;
    while (end < atoms && end - a < AT_ONCE && species[end] == species[a]) ++end;
    // Kinds of runs: of all, of two and of one.
    made.push_back({a, end - a == AT_ONCE ? AT_ONCE : end - a >= 2 ? 2 : 1});
  }
  return made;
}

// Values of the atoms of a run stand side by side.
template <typename T> struct Scratch {
  std::vector<Vec<T>> x, value, out, grad_x, grad_value;
  explicit Scratch(const Plan& p)
      : x(AT_ONCE * p.rows_in), value(AT_ONCE * p.slots), out(AT_ONCE * p.rows_out), grad_x(AT_ONCE * p.rows_in),
        grad_value(AT_ONCE * p.slots) {}
};

// Rows of the atoms of a run, for the channels from c on.
template <typename T, int ATOMS>
void read(const T* from, int64_t atom, int64_t rows, int64_t channels, int64_t c, Vec<T>* to) {
  for (int64_t m = 0; m < rows; ++m)
    for (int j = 0; j < ATOMS; ++j) *to++ = load(from + ((atom + j) * rows + m) * channels + c, channels - c);
}
template <typename T, int ATOMS>
void write(const Vec<T>* from, int64_t atom, int64_t rows, int64_t channels, int64_t c, T* to) {
  for (int64_t m = 0; m < rows; ++m)
    for (int j = 0; j < ATOMS; ++j) store(to + ((atom + j) * rows + m) * channels + c, *from++, channels - c);
}

template <typename T, int ATOMS>
void forward(const Plan& plan, Scratch<T>& s, int64_t atom, const T* x, const T* coefficients, T* out) {
  const int64_t C = plan.channels;
  for (int64_t c = 0; c < C; c += Lanes<T>::width) {
    const int64_t left = C - c;
    read<T, ATOMS>(x, atom, plan.rows_in, C, c, s.x.data());
    std::fill(s.out.begin(), s.out.end(), Vec<T>{});
    for (int64_t i = 0; i < plan.nodes; ++i) {
      const Node& n = plan.node[i];
      Vec<T> v[ATOMS];
#pragma GCC unroll 8
      for (int j = 0; j < ATOMS; ++j) {
        v[j] = s.x[ATOMS * n.factor + j];
        if (n.parent >= 0) v[j] *= s.value[ATOMS * n.parent + j];
        if (n.slot >= 0) s.value[ATOMS * n.slot + j] = v[j];
      }
      for (int64_t t = n.begin; t < n.end; ++t) {
        const Vec<T> coefficient = load(coefficients + t * C + c, left);
        Vec<T>* sums = s.out.data() + ATOMS * plan.output[t];
#pragma GCC unroll 8
        for (int j = 0; j < ATOMS; ++j) sums[j] += v[j] * coefficient;
      }
    }
    write<T, ATOMS>(s.out.data(), atom, plan.rows_out, C, c, out);
  }
}

template <typename T, int ATOMS>
void backward(const Plan& plan, Scratch<T>& s, int64_t atom, const T* x, const T* coefficients, const T* grad_out,
              T* grad_x) {
  const int64_t C = plan.channels;
  for (int64_t c = 0; c < C; c += Lanes<T>::width) {
    const int64_t left = C - c;
    read<T, ATOMS>(x, atom, plan.rows_in, C, c, s.x.data());
    read<T, ATOMS>(grad_out, atom, plan.rows_out, C, c, s.out.data());
    for (int64_t i = 0; i < plan.nodes; ++i) {
      const Node& n = plan.node[i];
      if (n.slot < 0) continue;
#pragma GCC unroll 8
      for (int j = 0; j < ATOMS; ++j) {
        const Vec<T> v = s.x[ATOMS * n.factor + j];
        s.value[ATOMS * n.slot + j] = n.parent >= 0 ? s.value[ATOMS * n.parent + j] * v : v;
      }
    }
    std::fill(s.grad_x.begin(), s.grad_x.end(), Vec<T>{});
    std::fill(s.grad_value.begin(), s.grad_value.end(), Vec<T>{});
    for (int64_t i = plan.nodes - 1; i >= 0; --i) {
      const Node& n = plan.node[i];
      Vec<T> g[ATOMS] = {};
      if (n.slot >= 0)
#pragma GCC unroll 8
        for (int j = 0; j < ATOMS; ++j) g[j] = s.grad_value[ATOMS * n.slot + j];
      for (int64_t t = n.begin; t < n.end; ++t) {
        const Vec<T> coefficient = load(coefficients + t * C + c, left);
        const Vec<T>* grads = s.out.data() + ATOMS * plan.output[t];
#pragma GCC unroll 8
        for (int j = 0; j < ATOMS; ++j) g[j] += grads[j] * coefficient;
      }
      Vec<T>* into_x = s.grad_x.data() + ATOMS * n.factor;
      if (n.parent >= 0) {
#pragma GCC unroll 8
        for (int j = 0; j < ATOMS; ++j) {
          s.grad_value[ATOMS * n.parent + j] += g[j] * s.x[ATOMS * n.factor + j];
          into_x[j] += g[j] * s.value[ATOMS * n.parent + j];
        }
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < ATOMS; ++j) into_x[j] += g[j];
      }
    }
    write<T, ATOMS>(s.grad_x.data(), atom, plan.rows_in, C, c, grad_x);
  }
}

// Calls `f(scratch, run, coefficients of its species, number of its atoms as a constant)` for all runs.
template <typename T, typename F>
void for_runs(const Plan& plan, int64_t atoms, const int64_t* species, const T* table, int64_t threads, F f) {
  const std::vector<Run> all = runs(atoms, species);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<T> s(plan);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < int64_t(all.size()); ++i) {
      const int64_t first = all[i].first;
      const T* coefficients = table + species[first] * plan.terms * plan.channels;
      switch (all[i].count) {
        case AT_ONCE: f(s, first, coefficients, std::integral_constant<int, AT_ONCE>()); break;
        case 2: f(s, first, coefficients, std::integral_constant<int, 2>()); break;
        case 1: f(s, first, coefficients, std::integral_constant<int, 1>()); break;
      }
    }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                              \
  GAQ_KERNEL(contraction, NAME, T) {                                                                     \
    const Plan plan(ints);                                                                               \
    for_runs<T>(plan, atoms, species, coefficients, threads,                                             \
                [&](Scratch<T>& s, int64_t atom, const T* of, auto count) {                              \
                  forward<T, decltype(count)::value>(plan, s, atom, features, of, out);                  \
                });                                                                                      \
  }                                                                                                      \
  GAQ_KERNEL(contraction_backward, NAME, T) {                                                            \
    const Plan plan(ints);                                                                               \
    for_runs<T>(plan, atoms, species, coefficients, threads,                                             \
                [&](Scratch<T>& s, int64_t atom, const T* of, auto count) {                              \
                  backward<T, decltype(count)::value>(plan, s, atom, features, of, grad, grad_features); \
                });                                                                                      \
  }
GAQ_EXPORT(float32, float)
GAQ_EXPORT(float64, double)
}
