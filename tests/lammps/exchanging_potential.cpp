// A small potential behind the interface of deployed models, for tests of the pair style: two rounds of messages, with
// exchanges of one and of three numbers, forward and back. exchanging_potential.py has the same in torch.
//
// Its files hold `exchanging BYTES CUTOFF ELEMENT CHARGE ...`; BYTES is 4 or 8. `head` doubles the energy.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "potential.h"

struct gaq_potential {
  int64_t bytes;
  double cutoff, scale;
  std::vector<double> charges;
};

namespace {

gaq_potential* refused(char* message, int64_t size, const std::string& reason) {
  snprintf(message, size, "%s", reason.c_str());
  return nullptr;
}

// Weight of a distance, and its derivative by the vector divided by the vector.
void weight(const gaq_potential* p, const double* r, double* value, double* slope) {
  const double u = 1.0 - (r[0] * r[0] + r[1] * r[1] + r[2] * r[2]) / (p->cutoff * p->cutoff);
  *value = u > 0 ? u * u * u : 0.0;
  *slope = u > 0 ? -6.0 * u * u / (p->cutoff * p->cutoff) : 0.0;
}

template <typename T>
void compute(const gaq_potential* p, int64_t local, int64_t all, const int64_t* type, int64_t edges,
             const int64_t* sender, const int64_t* receiver, const double* vectors, gaq_exchange exchange,
             void* context, double* energies, double* gradient) {
  std::vector<T> density(all, 0), grad_density(all, 0);
  std::vector<T> dipole(3 * all, 0), grad_dipole(3 * all, 0);
  std::vector<double> w(edges), slope(edges);
  const auto move = [&](int64_t back, std::vector<T>& rows, int64_t width) {
    if (exchange != nullptr) exchange(context, back, rows.data(), width);
  };
  for (int64_t e = 0; e < edges; ++e) {
    weight(p, vectors + 3 * e, &w[e], &slope[e]);
    density[receiver[e]] += p->charges[type[sender[e]]] * w[e];
  }
  move(0, density, 1);
  for (int64_t e = 0; e < edges; ++e)
    for (int axis = 0; axis < 3; ++axis)
      dipole[3 * receiver[e] + axis] += density[sender[e]] * w[e] * vectors[3 * e + axis];
  move(0, dipole, 3);
  for (int64_t i = 0; i < local; ++i) {
    double square = 0;
    for (int axis = 0; axis < 3; ++axis) square += dipole[3 * i + axis] * dipole[3 * i + axis];
    energies[i] = p->scale * (p->charges[type[i]] * density[i] + 0.1 * density[i] * density[i] + 0.3 * square);
    grad_density[i] = p->scale * (p->charges[type[i]] + 0.2 * density[i]);
    for (int axis = 0; axis < 3; ++axis) grad_dipole[3 * i + axis] = p->scale * 0.6 * dipole[3 * i + axis];
  }
  for (int64_t e = 0; e < edges; ++e) {
    const int64_t i = receiver[e], j = sender[e];
    double product = 0;
    for (int axis = 0; axis < 3; ++axis) {
      product += dipole[3 * i + axis] * dipole[3 * j + axis];
      grad_dipole[3 * i + axis] += p->scale * w[e] * dipole[3 * j + axis];
      grad_dipole[3 * j + axis] += p->scale * w[e] * dipole[3 * i + axis];
    }
    energies[i] += p->scale * w[e] * product;
    for (int axis = 0; axis < 3; ++axis) gradient[3 * e + axis] = p->scale * product * slope[e] * vectors[3 * e + axis];
  }
  move(1, grad_dipole, 3);
  for (int64_t e = 0; e < edges; ++e) {
    const double* const r = vectors + 3 * e;
    const T* const grad = &grad_dipole[3 * receiver[e]];
    const double along = grad[0] * r[0] + grad[1] * r[1] + grad[2] * r[2];
    grad_density[sender[e]] += w[e] * along;
    for (int axis = 0; axis < 3; ++axis)
      gradient[3 * e + axis] += density[sender[e]] * (along * slope[e] * r[axis] + w[e] * grad[axis]);
  }
  move(1, grad_density, 1);
  for (int64_t e = 0; e < edges; ++e)
    for (int axis = 0; axis < 3; ++axis)
      gradient[3 * e + axis] +=
          grad_density[receiver[e]] * p->charges[type[sender[e]]] * slope[e] * vectors[3 * e + axis];
}

}  // namespace

extern "C" {

gaq_potential* gaq_potential_open(const char* file, int64_t types, const char* const* symbols, const char* head,
                                  char* message, int64_t size) {
  std::ifstream stream(file);
  if (!stream) return refused(message, size, std::string(file) + ": cannot be read");
  std::string kind, element;
  gaq_potential read{0, 0, 1.0, {}};
  stream >> kind >> read.bytes >> read.cutoff;
  if (kind != "exchanging" || !stream) return refused(message, size, std::string(file) + ": not a model");
  if (head != nullptr && strcmp(head, "double") != 0)
    return refused(message, size, std::string(file) + ": no head " + head);
  if (head != nullptr) read.scale = 2.0;
  std::map<std::string, double> charges;
  for (double charge; stream >> element >> charge;) charges[element] = charge;
  for (int64_t i = 0; i < types; ++i) {
    if (charges.count(symbols[i]) == 0)
      return refused(message, size, std::string(file) + ": does not know " + symbols[i]);
    read.charges.push_back(charges[symbols[i]]);
  }
  return new gaq_potential(read);
}

void gaq_potential_close(gaq_potential* potential) { delete potential; }
double gaq_potential_cutoff(const gaq_potential* potential) { return potential->cutoff; }
int64_t gaq_potential_width(const gaq_potential*) { return 3; }
int64_t gaq_potential_bytes(const gaq_potential* potential) { return potential->bytes; }

void gaq_potential_compute(const gaq_potential* potential, int64_t local, int64_t all, const int64_t* type,
                           int64_t edges, const int64_t* sender, const int64_t* receiver, const double* vectors,
                           gaq_exchange exchange, void* context, int64_t, double* energies, double* gradient) {
  (potential->bytes == 4 ? compute<float> : compute<double>)(potential, local, all, type, edges, sender, receiver,
                                                             vectors, exchange, context, energies, gradient);
}
}
