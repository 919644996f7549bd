// A model as a program: its operations on node features one after the other, forward and backward, in one call.
// builder.py has the operations and their arguments, and writes programs.
//
// Slots are memory for a row of each atom or sender. They are kept by each thread from call to call.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "activations.h"
#include "edges.h"
#include "lanes.h"
#include "matrices.h"
#include "plan.h"
#include "signatures.h"

extern "C" {
GAQ_DECLARE_KERNELS(float32, float)
GAQ_DECLARE_KERNELS(float64, double)
}

namespace {

template <typename T> struct Kernels;
#define GAQ_USE(NAME, T)                                                      \
  template <> struct Kernels<T> {                                             \
    static constexpr auto convolution = gaq_convolution_##NAME;               \
    static constexpr auto convolution_back = gaq_convolution_backward_##NAME; \
    static constexpr auto contraction = gaq_contraction_##NAME;               \
    static constexpr auto contraction_back = gaq_contraction_backward_##NAME; \
    static constexpr auto round = gaq_round_##NAME;                           \
  };
GAQ_USE(float32, float)
GAQ_USE(float64, double)

// Where the rows of a matrix lie in a slot.
struct View {
  int64_t slot, scaled_offset, offset, components, atom_stride, row_stride;
};

// Copies the features of local atoms to the atoms of other parts of space, or adds gradients back; see program.py.
template <typename T> using Exchange = void (*)(void* context, int64_t back, T* rows, int64_t width);

// What a call reads and writes, in the order of `Program.call` in program.py.
template <typename T> struct Call {
  int64_t atoms, senders, edges, slices, threads;
  const int64_t *sender, *receiver, *tables, *species, *species_of_sender, *slice, *head, *place;
  const int64_t* const* plans;  // integers of each layer's convolution
  const double* const* plan_reals;
  const T* vectors;
  const T* const* weights;    // of each layer: radial tables of its convolution
  const T* const* densities;  // and of its edge density
  const int64_t* density_intervals;
  const int64_t* kind;    // of each atom
  const T* const* given;  // rows of all kinds
  T* grad_vectors;
  T* const* exported;
  double* energies;
  double* seconds;  // of each step, added to what is there; null where nobody asks
  Exchange<T> exchange;
  void* context;
};

// Radial function of one channel, and its slope, at a length.
template <typename T>
inline void look_up(const T* table, int64_t intervals, T scale, T length, T& value, T& slope) {
  const T position = length * scale;
  const int64_t interval = std::min<int64_t>(int64_t(position), intervals - 1);
  const T t = position - T(interval), *k = table + interval * COEFFICIENTS;
  value = k[COEFFICIENTS - 1], slope = 0;
  for (int i = COEFFICIENTS - 2; i >= 0; --i) slope = slope * t + value, value = value * t + k[i];
  slope *= scale;
}

// An activation function of one number, and its slope.
inline void activate(int64_t kind, double x, double& value, double& slope) {
  if (kind == ACTIVATION_tanh) {
    value = std::tanh(x), slope = 1 - value * value;
    return;
  }
  const double s = 1 / (1 + std::exp(-x));
  value = kind == ACTIVATION_sigmoid ? s : x * s;
  slope = kind == ACTIVATION_sigmoid ? s * (1 - s) : s * (1 + x * (1 - s));
}

// In the order of TRANSFORMS in recording.py.
enum Transform { TRANSFORM_agnesi, TRANSFORM_soft };

// Transformed distances, and their slopes, as MACE's AgnesiTransform and SoftTransform have them; `length` is the sum
// of the lengths of both species.
inline void agnesi(double r, double length, const double* of, double& u, double& slope) {
  const double x = r / length, q = of[0], p = of[1], a = of[2];
  const double power = std::pow(x, q), rest = std::pow(x, q - p), part = a * power / (1 + rest);
  u = 1 / (1 + part);
  slope = -u * u * part * (q - (q - p) * rest / (1 + rest)) / r;
}
inline void soft(double r, double length, const double* of, double& u, double& slope) {
  const double near = 0.75 * length, far = 4.0 / 3.0 * length, alpha = of[0] / (far - near);
  const double y = std::tanh(alpha * (r - 0.5 * (near + far))), part = 0.5 * (1 + y);
  u = near + (r - near) * part;
  slope = part + (r - near) * 0.5 * alpha * (1 - y * y);
}

// Polynomial envelope, and its slope.
inline void envelope(double x, double p, double& value, double& slope) {
  const double power = std::pow(x, p);
  value = 1 - power * ((p + 1) * (p + 2) / 2 - x * (p * (p + 2) - x * p * (p + 1) / 2));
  slope = -power / x * p * (p + 1) * (p + 2) / 2 * (1 - x) * (1 - x);
}

template <typename T> class Program {
 public:
  // `weights` are the matrices, which are kept packed only.
  Program(std::vector<int64_t> code, std::vector<int64_t> ints, std::vector<double> reals, std::vector<T> constants,
          const T* weights)
      : code(std::move(code)), ints(std::move(ints)), reals(std::move(reals)), constants(std::move(constants)) {
    const int64_t* at = this->code.data();
    slots = *at++, matrix_count = *at++, steps = *at++, layers = *at++;
    for (int64_t i = 0; i < slots; ++i, at += 2) slot.push_back({at[0], at[1]});
    // For each species that a matrix has, one after the other.
    for (int64_t i = 0; i < matrix_count; ++i, at += 5) {
      first_matrix.push_back(matrices.size());
      for (int64_t z = 0; z < at[3]; ++z)
        matrices.emplace_back(weights + at[0] + z * at[1] * at[2], at[1], at[2], at[4] != 0);
    }
    first_step = at;
  }

  void run(const Call<T>& call) const {
    Arena& arena = *of_thread<Arena>();
    arena.reserve(*this, call);
    std::fill(call.energies, call.energies + call.atoms, 0.0);
    std::fill(call.grad_vectors, call.grad_vectors + 3 * call.edges, T(0));
    const int64_t* at = first_step;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t length = at[1];
      const auto begin = std::chrono::steady_clock::now();
      step(at[0], at + 2, call, arena);
      if (call.seconds)
        call.seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      at += 2 + length;
    }
  }

 private:
  struct Slot {
    int64_t of_senders, width;
  };
  struct Arena {
    std::vector<Registers<Vec<T>>> memory;
    std::vector<T*> at;
    // Of each edge: transformed distance and its slope, cutoff function and its slope.
    std::vector<T> radial;
    std::vector<int64_t> alike;  // the species of each atom where species do not matter

    const T* of_edges(int64_t transformed) const { return transformed ? radial.data() : nullptr; }

    void reserve(const Program& program, const Call<T>& call) {
      while (int64_t(memory.size()) < program.slots) memory.emplace_back();
      at.resize(program.slots);
      alike.resize(call.atoms);
      for (int64_t i = 0; i < program.slots; ++i) {
        const Slot& of = program.slot[i];
        const int64_t size = (of.of_senders ? call.senders : call.atoms) * of.width;
        at[i] = reinterpret_cast<T*>(memory[i].reserve(size / Lanes<T>::width + 1));
      }
    }
  };

  std::vector<int64_t> code, ints;
  std::vector<double> reals;
  std::vector<T> constants;
  int64_t slots, matrix_count, steps, layers;
  std::vector<Slot> slot;
  std::vector<int64_t> first_matrix;
  std::vector<Packed<T>> matrices;
  const int64_t* first_step;

  template <typename U> Rows<U> rows(const int64_t* words, const Call<T>& call, Arena& arena) const {
    const View v{words[0], words[1], words[2], words[3], words[4], words[5]};
    return {arena.at[v.slot] + v.scaled_offset * call.atoms + v.offset, v.components, v.atom_stride, v.row_stride};
  }

  // With few features, threads cost more time than they save.
  static int64_t threads_for(int64_t values, const Call<T>& call) {
    return std::min<int64_t>(call.threads, 1 + (values >> 15));
  }

  void step(int64_t operation, const int64_t* a, const Call<T>& call, Arena& arena) const {
    switch (operation) {
      case STEP_gather: return gather(a, call, arena);
      case STEP_linear: return linear(a, call, arena);
      case STEP_round: return round(a, call, arena);
      case STEP_convolution: return convolution(a, call, arena);
      case STEP_convolution_back: return convolution_back(a, call, arena);
      case STEP_contraction: return contraction(a, call, arena);
      case STEP_contraction_back: return contraction_back(a, call, arena);
      case STEP_density: return density(a, call, arena);
      case STEP_density_back: return density_back(a, call, arena);
      case STEP_divide: return divide(a, call, arena);
      case STEP_divide_back: return divide_back(a, call, arena);
      case STEP_activation: return activation(a, call, arena);
      case STEP_activation_back: return activation_back(a, call, arena);
      case STEP_energy: return energy(a, call, arena);
      case STEP_seed: return seed(a, call, arena);
      case STEP_repulsion: return repulsion(a, call, arena);
      case STEP_scale_shift: return scale_shift(a, call, arena);
      case STEP_add: return add(a, call, arena);
      case STEP_zero: return zero(a, call, arena);
      case STEP_exchange: return exchange(a, call, arena);
      case STEP_exchange_back: return exchange_back(a, call, arena);
      case STEP_export: return export_rows(a, call, arena);
      case STEP_gate: return gate(a, call, arena);
      case STEP_gate_back: return gate_back(a, call, arena);
      case STEP_copy: return copy(a, call, arena);
      case STEP_given: return given(a, call, arena);
      case STEP_repeated: return repeated(a, call, arena);
      case STEP_transform: return transform(a, call, arena);
    }
  }

  // slot, of_senders, width, constants
  void gather(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t count = a[1] ? call.senders : call.atoms, width = a[2];
    const int64_t* species = a[1] ? call.species_of_sender : call.species;
    T* to = arena.at[a[0]];
#pragma omp parallel for schedule(static) num_threads(call.threads) if (threads_for(count * width, call) > 1)
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * width, constants.data() + a[3] + species[i] * width, width * sizeof(T));
  }

  // slot, width, number of the rows that are given
  void given(const int64_t* a, const Call<T>& call, Arena& arena) const {
    for (int64_t i = 0; i < call.atoms; ++i)
      std::memcpy(arena.at[a[0]] + i * a[1], call.given[a[2]] + call.kind[i] * a[1], a[1] * sizeof(T));
  }

  // slot, width, constants
  void repeated(const int64_t* a, const Call<T>& call, Arena& arena) const {
    for (int64_t i = 0; i < call.atoms; ++i)
      std::memcpy(arena.at[a[0]] + i * a[1], constants.data() + a[2], a[1] * sizeof(T));
  }

  // view (6) of the input, view (6) of the output, matrix, by_species, add
  void linear(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const Rows<const T> in = rows<const T>(a, call, arena);
    const Rows<T> out = rows<T>(a + 6, call, arena);
    const Packed<T>* matrix = matrices.data() + first_matrix[a[12]];
    const int64_t d = a[3];
    if (!a[13]) return matrix->multiply(in, out, 0, call.atoms * d, a[14], call.threads);
    for (int64_t i = 0; i < call.slices; ++i) {
      const int64_t* s = call.slice + 3 * i;
      matrix[s[0]].multiply(in, out, s[1] * d, s[2] * d, a[14], call.threads);
    }
  }

  // input, output, width, integers, reals
  void round(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const T* in = arena.at[a[0]];
    T* out = arena.at[a[1]];
    if (in != out) std::memcpy(out, in, call.atoms * a[2] * sizeof(T));
    Kernels<T>::round(ints.data() + a[3], reals.data() + a[4], call.atoms, in, out,
                      threads_for(call.atoms * a[2], call));
  }

  // layer, features, messages, transformed
  void convolution(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t layer = a[0];
    Kernels<T>::convolution(call.plans[layer], call.plan_reals[layer], call.senders, call.atoms, call.edges,
                            call.sender, call.receiver, call.tables, call.vectors, arena.at[a[1]], call.weights[layer],
                            nullptr, arena.of_edges(a[3]), arena.at[a[2]], call.threads);
  }

  // layer, features, gradient of the messages, that of the features or -1, width of the features,
  // transformed
  void convolution_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t layer = a[0];
    T* grad_features = a[3] < 0 ? nullptr : arena.at[a[3]];
    if (grad_features) std::fill(grad_features, grad_features + call.senders * a[4], T(0));
    Kernels<T>::convolution_back(call.plans[layer], call.plan_reals[layer], call.senders, call.atoms, call.edges,
                                 call.sender, call.receiver, call.tables, call.vectors, arena.at[a[1]],
                                 call.weights[layer], nullptr, arena.of_edges(a[5]), arena.at[a[2]], call.grad_vectors,
                                 grad_features, nullptr, nullptr, call.threads);
  }

  // input, output, integers, coefficients, by_species
  void contraction(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t* species = a[4] ? call.species : arena.alike.data();
    Kernels<T>::contraction(ints.data() + a[2], call.atoms, species, arena.at[a[0]], constants.data() + a[3],
                            arena.at[a[1]], call.threads);
  }

  // input, gradient of the output, that of the input, integers, coefficients, by_species
  void contraction_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t* species = a[5] ? call.species : arena.alike.data();
    Kernels<T>::contraction_back(ints.data() + a[3], call.atoms, species, arena.at[a[0]], constants.data() + a[4],
                                 arena.at[a[1]], arena.at[a[2]], call.threads);
  }

  // Transformed distances: kind, number of the first parameter, species, power of the cutoff function. The parameters
  // are the cutoff and those of the transform, and a length of each species.
  void transform(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const double r_max = reals[a[1]], *of = reals.data() + a[1] + 1, *lengths = of + 3;
    arena.radial.resize(4 * call.edges);
    for (int64_t e = 0; e < call.edges; ++e) {
      const T* v = call.vectors + 3 * e;
      const double r = std::sqrt(double(v[0]) * v[0] + double(v[1]) * v[1] + double(v[2]) * v[2]);
      const double of_pair = lengths[call.species_of_sender[call.sender[e]]] + lengths[call.species[call.receiver[e]]];
      double u = 0, slope = 0, cutoff = 0, steep = 0;
      if (r < r_max) {
        (a[0] == TRANSFORM_agnesi ? agnesi : soft)(r, of_pair, of, u, slope);
        envelope(r / r_max, double(a[3]), cutoff, steep);
      }
      T* to = arena.radial.data() + 4 * e;
      to[0] = T(u), to[1] = T(slope), to[2] = T(cutoff), to[3] = T(steep / r_max);
    }
  }

  // Calls `f(edge, receiver, length, function, slope)` for the edges within the cutoff, those of an atom in order.
  // `radial` is that of the edges where tables are over transformed distances.
  template <typename F> void for_edges(int64_t layer, const Call<T>& call, const T* radial, F f) const {
    const T r_max = T(call.plan_reals[layer][0]);
    const int64_t intervals = call.density_intervals[layer];
    const Sorted sorted(call.edges, call.atoms, call.receiver);
#pragma omp parallel for schedule(static) num_threads(call.threads) if (threads_for(call.edges, call) > 1)
    for (int64_t atom = 0; atom < call.atoms; ++atom)
      for (int64_t k = sorted.first[atom]; k < sorted.first[atom + 1]; ++k) {
        const int64_t e = sorted.order[k];
        const T* v = call.vectors + 3 * e;
        const T length = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
        const T* of = radial ? radial + 4 * e : nullptr;
        if (radial ? of[2] == 0 : !(length < r_max)) continue;
        T value, slope;
        look_up(call.densities[layer] + (call.tables ? call.tables[e] : 0) * intervals * COEFFICIENTS, intervals,
                T(intervals) / r_max, radial ? of[0] : length, value, slope);
        if (radial) slope = of[2] * slope * of[1] + of[3] * value, value *= of[2];
        f(e, atom, length, value, slope);
      }
  }

  // layer, output, transformed
  void density(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T* out = arena.at[a[1]];
    std::fill(out, out + call.atoms, T(0));
    for_edges(a[0], call, arena.of_edges(a[2]), [&](int64_t, int64_t atom, T, T value, T) { out[atom] += value; });
  }

  // layer, gradient of the densities, transformed
  void density_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const T* grad = arena.at[a[1]];
    for_edges(a[0], call, arena.of_edges(a[2]), [&](int64_t e, int64_t atom, T length, T, T slope) {
      const T along = grad[atom] * slope / length;
      for (int k = 0; k < 3; ++k) call.grad_vectors[3 * e + k] += along * call.vectors[3 * e + k];
    });
  }

  // slot, densities, width, number of the constant and the factor
  void divide(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T *x = arena.at[a[0]], *density = arena.at[a[1]];
    const T constant = T(reals[a[3]]), by_density = T(reals[a[3] + 1]);
    for (int64_t i = 0; i < call.atoms; ++i) {
      const T factor = 1 / (constant + by_density * density[i]);
      for (int64_t c = 0; c < a[2]; ++c) x[i * a[2] + c] *= factor;
    }
  }

  // gradient of the output, which becomes that of the input; output, densities, gradient of the densities, width,
  // number of the constant and the factor
  void divide_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T *grad = arena.at[a[0]], *by_density = arena.at[a[3]];
    const T *x = arena.at[a[1]], *density = arena.at[a[2]];
    const int64_t width = a[4];
    const T constant = T(reals[a[5]]), slope = T(reals[a[5] + 1]);
    constexpr int W = Lanes<T>::width;
    for (int64_t i = 0; i < call.atoms; ++i) {
      const T factor = 1 / (constant + slope * density[i]);
      Vec<T> total = {};
      for (int64_t c = 0; c < width; c += W) {
        T* g = grad + i * width + c;
        const Vec<T> of = load(g, width - c);
        total += of * load(x + i * width + c, width - c);
        store(g, of * factor, width - c);
      }
      by_density[i] = -sum<T>(total) * factor * slope;
    }
  }

  // Calls `f(atom, column, within)`: a column is within the part of the atom's head, or there is one head only.
  template <typename F> static void for_columns(const Call<T>& call, int64_t width, int64_t heads, F f) {
    const int64_t part = width / heads;
    for (int64_t i = 0; i < call.atoms; ++i)
      for (int64_t c = 0; c < width; ++c) f(i * width + c, heads == 1 || c / part == call.head[i]);
  }

  // input, output, width, kind, heads, number of the factor
  void activation(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const T* in = arena.at[a[0]];
    T* out = arena.at[a[1]];
    const double factor = reals[a[5]];
    for_columns(call, a[2], a[4], [&](int64_t at, bool within) {
      double value = 0, slope;
      if (within) activate(a[3], double(in[at]), value, slope);
      out[at] = T(factor * value);
    });
  }

  // gradient of the output, which becomes that of the input; input, width, kind, heads, number of the factor
  void activation_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T* grad = arena.at[a[0]];
    const T* in = arena.at[a[1]];
    const double factor = reals[a[5]];
    for_columns(call, a[2], a[4], [&](int64_t at, bool within) {
      double value, slope = 0;
      if (within) activate(a[3], double(in[at]), value, slope);
      grad[at] = T(grad[at] * factor * slope);
    });
  }

  // A piece of a gate as recording.py writes it, with its factor.
  struct Gated {
    int64_t channels, scalars, out, kind, components, features;
    T factor;
  };
  std::vector<Gated> gated(int64_t count, int64_t first_int, int64_t first_real) const {
    std::vector<Gated> pieces;
    const int64_t* p = ints.data() + first_int;
    for (int64_t i = 0; i < count; ++i, p += 6)
      pieces.push_back({p[0], p[1], p[2], p[3], p[4], p[5], T(reals[first_real + i])});
    return pieces;
  }

  // input, output, their widths, pieces, integers, number of the first factor
  void gate(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const std::vector<Gated> pieces = gated(a[4], a[5], a[6]);
    constexpr int W = Lanes<T>::width;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (threads_for(call.atoms * a[2], call) > 1)
    for (int64_t i = 0; i < call.atoms; ++i) {
      const T* x = arena.at[a[0]] + i * a[2];
      T* to = arena.at[a[1]] + i * a[3];
      for (const Gated& p : pieces)
        for (int64_t c = 0; c < p.channels; c += W) {
          const int64_t left = p.channels - c;
          Vec<T> value, slope;
          activate<T>(p.kind, p.factor, load(x + p.scalars + c, left), value, slope);
          if (!p.components) store(to + p.out + c, value, left);
          for (int64_t m = c, end = c + p.components * p.channels; m < end; m += p.channels)
            store(to + p.out + m, load(x + p.features + m, left) * value, left);
        }
    }
  }

  // gradient of the output, input, gradient of the input, widths of input and output, pieces, integers, number of the
  // first factor
  void gate_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const std::vector<Gated> pieces = gated(a[5], a[6], a[7]);
    constexpr int W = Lanes<T>::width;
#pragma omp parallel for schedule(static) num_threads(call.threads) if (threads_for(call.atoms * a[3], call) > 1)
    for (int64_t i = 0; i < call.atoms; ++i) {
      const T *grad = arena.at[a[0]] + i * a[4], *x = arena.at[a[1]] + i * a[3];
      T* to = arena.at[a[2]] + i * a[3];
      for (const Gated& p : pieces)
        for (int64_t c = 0; c < p.channels; c += W) {
          const int64_t left = p.channels - c;
          Vec<T> value, slope, along = {};
          activate<T>(p.kind, p.factor, load(x + p.scalars + c, left), value, slope);
          if (!p.components) along = load(grad + p.out + c, left);
          for (int64_t m = c, end = c + p.components * p.channels; m < end; m += p.channels) {
            const Vec<T> of = load(grad + p.out + m, left);
            along += of * load(x + p.features + m, left);
            store(to + p.features + m, of * value, left);
          }
          store(to + p.scalars + c, along * slope, left);
        }
    }
  }

  // view (6) of the input, view (6) of the output, length of a row
  void copy(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const Rows<const T> in = rows<const T>(a, call, arena);
    const Rows<T> out = rows<T>(a + 6, call, arena);
#pragma omp parallel for schedule(static) \
    num_threads(call.threads) if (threads_for(call.atoms * a[3] * a[12], call) > 1)
    for (int64_t i = 0; i < call.atoms; ++i)
      for (int64_t m = 0; m < in.components; ++m)
        std::memcpy(out.first + i * out.atom_stride + m * out.row_stride,
                    in.first + i * in.atom_stride + m * in.row_stride, a[12] * sizeof(T));
  }

  static int64_t head(const Call<T>& call, int64_t atom) { return call.head ? call.head[atom] : 0; }

  // slot, width
  void energy(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const T* x = arena.at[a[0]];
    for (int64_t i = 0; i < call.atoms; ++i) call.energies[i] += x[i * a[1] + std::min(head(call, i), a[1] - 1)];
  }

  // slot, width, number of the first head's factor
  void seed(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T* grad = arena.at[a[0]];
    std::fill(grad, grad + call.atoms * a[1], T(0));
    for (int64_t i = 0; i < call.atoms; ++i)
      grad[i * a[1] + std::min(head(call, i), a[1] - 1)] = T(reals[a[2] + head(call, i)]);
  }

  // number of the first head's factor, of the first head's constant
  void scale_shift(const int64_t* a, const Call<T>& call, Arena&) const {
    for (int64_t i = 0; i < call.atoms; ++i)
      call.energies[i] = reals[a[0] + head(call, i)] * call.energies[i] + reals[a[1] + head(call, i)];
  }

  // Repulsion of nuclei (Ziegler, Biersack and Littmark 1985) with a polynomial envelope: number of its first constant,
  // number of the first head's factor, species, power of the envelope.
  void repulsion(const int64_t* a, const Call<T>& call, Arena&) const {
    // Four factors and exponents, then of each pair of species: charges, 1 / length, cutoff.
    const double *c = reals.data() + a[0], *exponents = c + 4, *of_pairs = c + 8;
    const double p = double(a[3]);
    for (int64_t e = 0; e < call.edges; ++e) {
      const int64_t receiver = call.receiver[e];
      const double* pair = of_pairs + 3 * (call.species_of_sender[call.sender[e]] * a[2] + call.species[receiver]);
      const T* v = call.vectors + 3 * e;
      const double r = std::sqrt(double(v[0]) * v[0] + double(v[1]) * v[1] + double(v[2]) * v[2]);
      if (!(r < pair[2])) continue;
      double phi = 0, slope = 0;
      for (int i = 0; i < 4; ++i) {
        const double term = c[i] * std::exp(-exponents[i] * r * pair[1]);
        phi += term, slope -= exponents[i] * pair[1] * term;
      }
      double inside, steep;
      envelope(r / pair[2], p, inside, steep);
      steep /= pair[2];
      const double half = 0.5 * pair[0] / r;
      call.energies[receiver] += half * phi * inside;
      const double along = half * (slope * inside + phi * steep - phi * inside / r) / r;
      const double factor = along * reals[a[1] + head(call, receiver)];
      for (int k = 0; k < 3; ++k) call.grad_vectors[3 * e + k] += T(factor * v[k]);
    }
  }

  // slot that is added, slot to which, width
  void add(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const T* x = arena.at[a[0]];
    T* to = arena.at[a[1]];
    for (int64_t i = 0, size = call.atoms * a[2]; i < size; ++i) to[i] += x[i];
  }

  // slot, of_senders, width
  void zero(const int64_t* a, const Call<T>& call, Arena& arena) const {
    T* to = arena.at[a[0]];
    std::fill(to, to + (a[1] ? call.senders : call.atoms) * a[2], T(0));
  }

  // slot of local atoms, slot of senders, width
  void exchange(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t width = a[2];
    const T* x = arena.at[a[0]];
    T* to = arena.at[a[1]];
    for (int64_t i = 0; i < call.atoms; ++i) std::memcpy(to + call.place[i] * width, x + i * width, width * sizeof(T));
    std::fill(to + call.atoms * width, to + call.senders * width, T(0));
    call.exchange(call.context, 0, to, width);
  }

  // slot of senders, slot of local atoms, width
  void exchange_back(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t width = a[2];
    T* grad = arena.at[a[0]];
    T* to = arena.at[a[1]];
    call.exchange(call.context, 1, grad, width);
    for (int64_t i = 0; i < call.atoms; ++i)
      std::memcpy(to + i * width, grad + call.place[i] * width, width * sizeof(T));
  }

  // slot, channels, number of the export, blocks, components of each block
  void export_rows(const int64_t* a, const Call<T>& call, Arena& arena) const {
    const int64_t channels = a[1], *d = a + 4, blocks = a[3];
    T* out = call.exported[a[2]];
    if (!out) return;
    int64_t width = 0;
    for (int64_t b = 0; b < blocks; ++b) width += d[b] * channels;
    for (int64_t i = 0; i < call.atoms; ++i) {
      const T* x = arena.at[a[0]] + i * width;
      T* to = out + call.place[i] * width;
      for (int64_t b = 0; b < blocks; x += d[b] * channels, to += d[b] * channels, ++b)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t m = 0; m < d[b]; ++m) to[c * d[b] + m] = x[m * channels + c];
    }
  }
};

template <typename T>
void run(int64_t program, const int64_t* counts, const int64_t* const* integers, const double* const* reals,
         const T* const* inputs, T* const* outputs, double* energies, double* seconds, int64_t exchange,
         int64_t context) {
  const int64_t layers = counts[5];
  Call<T> call;
  call.atoms = counts[0], call.senders = counts[1], call.edges = counts[2], call.slices = counts[3];
  call.threads = counts[4];
  call.sender = integers[0], call.receiver = integers[1], call.tables = integers[2], call.species = integers[3];
  call.species_of_sender = integers[4], call.slice = integers[5], call.head = integers[6], call.place = integers[7];
  call.density_intervals = integers[8], call.kind = integers[9], call.plans = integers + 10;
  call.plan_reals = reals;
  call.vectors = inputs[0], call.weights = inputs + 1, call.densities = inputs + 1 + layers;
  call.given = inputs + 1 + 2 * layers;
  call.grad_vectors = outputs[0], call.exported = outputs + 1;
  call.energies = energies, call.seconds = seconds;
  call.exchange = reinterpret_cast<Exchange<T>>(exchange), call.context = reinterpret_cast<void*>(context);
  reinterpret_cast<const Program<T>*>(program)->run(call);
}

// Vectors of edges from positions and the shifts of periodic images.
template <typename T>
void edge_vectors(int64_t edges, const int64_t* sender, const int64_t* receiver, const T* positions, const T* shifts,
                  T* vectors) {
  for (int64_t e = 0; e < edges; ++e)
    for (int k = 0; k < 3; ++k)
      vectors[3 * e + k] = positions[3 * receiver[e] + k] - positions[3 * sender[e] + k] + shifts[3 * e + k];
}

// Forces, and the symmetric derivative of the energy by a strain of each structure.
template <typename T>
void forces_and_strain(int64_t edges, const int64_t* sender, const int64_t* receiver, const int64_t* structure,
                       const T* vectors, const T* grad, T* forces, double* strain) {
  for (int64_t e = 0; e < edges; ++e) {
    const T *g = grad + 3 * e, *v = vectors + 3 * e;
    for (int k = 0; k < 3; ++k) forces[3 * receiver[e] + k] -= g[k], forces[3 * sender[e] + k] += g[k];
    if (!strain) continue;
    double* of = strain + 9 * structure[receiver[e]];
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) of[3 * i + j] += 0.5 * (double(v[i]) * g[j] + double(v[j]) * g[i]);
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T)                                                                                   \
  GAQ_KERNEL(program_new, NAME, T) {                                                                          \
    *program = reinterpret_cast<int64_t>(new Program<T>({code, code + code_count}, {ints, ints + int_count},  \
                                                        {reals, reals + real_count},                          \
                                                        {constants, constants + constant_count}, weights));   \
  }                                                                                                           \
  GAQ_KERNEL(program_delete, NAME, T) { delete reinterpret_cast<Program<T>*>(program); }                      \
  GAQ_KERNEL(program_run, NAME, T) {                                                                          \
    run<T>(program, counts, integers, reals, inputs, outputs, energies, seconds, exchange, context);          \
  }                                                                                                           \
  GAQ_KERNEL(edge_vectors, NAME, T) { edge_vectors<T>(edges, sender, receiver, positions, shifts, vectors); } \
  GAQ_KERNEL(forces_and_strain, NAME, T) {                                                                    \
    forces_and_strain<T>(edges, sender, receiver, structure, vectors, grad, forces, strain);                  \
  }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
