// SPDX-License-Identifier: GPL-2.0-only
//
// Pair style gaq: models that `gaq deploy` wrote. docs/lammps.md says how to use it, README.md how to build it.

#ifdef PAIR_CLASS
// clang-format off
PairStyle(gaq,PairGAQ);
// clang-format on
#else

#ifndef LMP_PAIR_GAQ_H
#define LMP_PAIR_GAQ_H

#include <cstdint>
#include <string>
#include <vector>

#include "pair.h"
#include "potential.h"

namespace LAMMPS_NS {

class PairGAQ : public Pair {
 public:
  PairGAQ(class LAMMPS*);
  ~PairGAQ() override;

  void settings(int, char**) override;
  void coeff(int, char**) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  double memory_usage() override;

  int pack_forward_comm(int, int*, double*, int, int*) override;
  void unpack_forward_comm(int, int, double*) override;
  int pack_reverse_comm(int, int, double*) override;
  void unpack_reverse_comm(int, int*, double*) override;

 private:
  gaq_potential* potential = nullptr;
  std::string head;     // empty: the model's first
  int64_t threads = 0;  // 0: as many as LAMMPS uses

  // The model's atoms are those whose type has an element: local ones first, then ghosts.
  int64_t local = 0;
  std::vector<int> atom_of;       // LAMMPS's index of each of the model's atoms
  std::vector<int64_t> index_of;  // and back; -1 for atoms that the model does not see
  std::vector<int64_t> element;   // of each of the model's atoms
  std::vector<int64_t> sender, receiver;
  std::vector<double> vectors;   // (edges, 3), from sender to receiver, in Å
  std::vector<double> energies;  // of local atoms, in eV
  std::vector<double> gradient;  // (edges, 3), of the total energy by the vectors, in eV/Å

  // The exchange in progress: the model's rows, a row for each of its atoms.
  char* rows = nullptr;
  int64_t row_bytes = 0;

  void allocate();
  void open(const char* file);
  void number_atoms();
  void collect_edges();
  void add_energies();
  void add_forces();
  void exchange(int64_t back, void* new_rows, int64_t width);
  int doubles_per_row() const;
  void pack_row(int atom, double* buffer) const;
  template <typename T> void add_row(int64_t row, const double* buffer);
};

}  // namespace LAMMPS_NS

#endif
#endif
