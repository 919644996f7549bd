// SPDX-License-Identifier: GPL-2.0-only

#include "pair_gaq.h"

#include <algorithm>
#include <cstring>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"
#include "utils.h"

using namespace LAMMPS_NS;

PairGAQ::PairGAQ(LAMMPS* lmp) : Pair(lmp) {
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  // The virial is a sum over edges, which holds inside pair styles hybrid too.
  no_virial_fdotr_compute = 1;
  // The derivative of one atom's energy by another's position, which a heat flux needs, is not computed.
  centroidstressflag = CENTROID_NOTAVAIL;
}

PairGAQ::~PairGAQ() {
  if (potential != nullptr) gaq_potential_close(potential);
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

void PairGAQ::allocate() {
  const int types = atom->ntypes;
  memory->create(setflag, types + 1, types + 1, "pair:setflag");
  memory->create(cutsq, types + 1, types + 1, "pair:cutsq");
  for (int i = 1; i <= types; ++i) std::fill(setflag[i], setflag[i] + types + 1, 0);
  map = new int[types + 1];
  allocated = 1;
}

// pair_style gaq [head NAME] [threads N]
void PairGAQ::settings(int narg, char** arg) {
  head.clear();
  threads = 0;
  for (int i = 0; i < narg; i += 2) {
    const std::string keyword = arg[i];
    if (keyword != "head" && keyword != "threads")
      error->all(FLERR, "pair_style gaq: unknown keyword {}; there are head NAME and threads N", keyword);
    if (i + 1 == narg) error->all(FLERR, "pair_style gaq: {} needs a value", keyword);
    if (keyword == "head") {
      head = arg[i + 1];
    } else {
      threads = utils::inumeric(FLERR, arg[i + 1], false, lmp);
      if (threads < 1) error->all(FLERR, "pair_style gaq: threads must be at least 1, not {}", arg[i + 1]);
    }
  }
}

// pair_coeff * * FILE ELEMENT ..., an element for each type; NULL for types of other pair styles
void PairGAQ::coeff(int narg, char** arg) {
  if (narg != 3 + atom->ntypes)
    error->all(FLERR, "pair_style gaq: pair_coeff needs * * FILE and an element, or NULL, for each of {} atom types",
               atom->ntypes);
  if (!allocated) allocate();
  map_element2type(narg - 3, arg + 3);
  open(arg[2]);
  // In rows of doubles, as LAMMPS counts what it sends.
  row_bytes = gaq_potential_width(potential) * gaq_potential_bytes(potential);
  comm_forward = comm_reverse = doubles_per_row();
}

void PairGAQ::open(const char* file) {
  const std::string path = utils::get_potential_file_path(file);
  if (potential != nullptr) gaq_potential_close(potential);
  char message[1024] = "";
  potential = gaq_potential_open(path.empty() ? file : path.c_str(), nelements, elements,
                                 head.empty() ? nullptr : head.c_str(), message, sizeof(message));
  int failed = potential == nullptr, failures = 0;  // not const: LAMMPS's stand-in for MPI wants none
  MPI_Allreduce(&failed, &failures, 1, MPI_INT, MPI_SUM, world);
  if (failures == comm->nprocs) error->all(FLERR, "pair_style gaq: {}", message);
  if (failed) error->one(FLERR, "pair_style gaq: on rank {}: {}", comm->me, message);
}

void PairGAQ::init_style() {
  // Programs that use LAMMPS as a library may go on after an error.
  if (potential == nullptr) error->all(FLERR, "pair_style gaq: no file is open; pair_coeff has failed");
  if (strcmp(update->unit_style, "metal") != 0)
    error->all(FLERR, "pair_style gaq needs units metal (eV, Å), not units {}", update->unit_style);
  if (!force->newton_pair) error->all(FLERR, "pair_style gaq needs newton on: it adds forces to ghost atoms");
  for (int i = 1; i < 4; ++i)
    if (atom->nbonds > 0 && force->special_lj[i] == 0.0 && force->special_coul[i] == 0.0)
      error->all(FLERR, "pair_style gaq needs special_bonds lj/coul 1 1 1: bonded atoms would not be neighbors");
  neighbor->add_request(this, NeighConst::REQ_FULL);
  // A hybrid style asks for the sizes before pair_coeff has opened the file; LAMMPS sizes its buffers after this.
  force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
  force->pair->comm_reverse = std::max(force->pair->comm_reverse, comm_reverse);
}

double PairGAQ::init_one(int, int) { return gaq_potential_cutoff(potential); }

void PairGAQ::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  number_atoms();
  collect_edges();
  energies.assign(local, 0.0);
  gradient.assign(vectors.size(), 0.0);
  const auto call = [](void* self, int64_t back, void* rows, int64_t width) {
    static_cast<PairGAQ*>(self)->exchange(back, rows, width);
  };
  // Ranks without atoms call it too: all ranks exchange together.
  gaq_potential_compute(potential, local, atom_of.size(), element.data(), sender.size(), sender.data(), receiver.data(),
                        vectors.data(), call, this, threads > 0 ? threads : comm->nthreads, energies.data(),
                        gradient.data());
  add_energies();
  add_forces();
}

void PairGAQ::number_atoms() {
  const int all = atom->nlocal + atom->nghost;
  atom_of.clear();
  element.clear();
  index_of.assign(all, -1);
  for (int i = 0; i < all; ++i) {
    if (i == atom->nlocal) local = atom_of.size();
    const int kind = map[atom->type[i]];
    if (kind < 0) continue;
    index_of[i] = atom_of.size();
    atom_of.push_back(i);
    element.push_back(kind);
  }
  if (atom->nghost == 0) local = atom_of.size();
}

void PairGAQ::collect_edges() {
  double** const x = atom->x;
  const double cutoff = gaq_potential_cutoff(potential);
  sender.clear();
  receiver.clear();
  vectors.clear();
  for (int ii = 0; ii < list->inum; ++ii) {
    const int i = list->ilist[ii];
    if (index_of[i] < 0) continue;
    for (int jj = 0; jj < list->numneigh[i]; ++jj) {
      const int j = list->firstneigh[i][jj] & NEIGHMASK;
      if (index_of[j] < 0) continue;
      const double vector[3] = {x[i][0] - x[j][0], x[i][1] - x[j][1], x[i][2] - x[j][2]};
      const double square = vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2];
      if (square >= cutoff * cutoff) continue;
      sender.push_back(index_of[j]);
      receiver.push_back(index_of[i]);
      vectors.insert(vectors.end(), vector, vector + 3);
    }
  }
}

void PairGAQ::add_energies() {
  for (int64_t k = 0; k < local; ++k) {
    if (eflag_global) eng_vdwl += energies[k];
    if (eflag_atom) eatom[atom_of[k]] += energies[k];
  }
}

// Forces, and the virial: that of an edge is the vector times the force on the receiver, half for each end's atom.
void PairGAQ::add_forces() {
  double** const f = atom->f;
  for (size_t e = 0; e < sender.size(); ++e) {
    const int i = atom_of[receiver[e]], j = atom_of[sender[e]];
    const double *r = &vectors[3 * e], *g = &gradient[3 * e];
    for (int axis = 0; axis < 3; ++axis) {
      f[i][axis] -= g[axis];
      f[j][axis] += g[axis];
    }
    if (!vflag_either) continue;
    const double v[6] = {-r[0] * g[0], -r[1] * g[1], -r[2] * g[2], -r[0] * g[1], -r[0] * g[2], -r[1] * g[2]};
    for (int n = 0; n < 6; ++n) {
      if (vflag_global) virial[n] += v[n];
      if (!vflag_atom) continue;
      vatom[i][n] += 0.5 * v[n];
      vatom[j][n] += 0.5 * v[n];
    }
  }
}

void PairGAQ::exchange(int64_t back, void* new_rows, int64_t width) {
  rows = static_cast<char*>(new_rows);
  row_bytes = width * gaq_potential_bytes(potential);
  // LAMMPS takes the size of a message from these. They are the largest size again afterwards, for its buffers.
  const int widest = comm_forward;
  comm_forward = comm_reverse = doubles_per_row();
  if (back) {
    comm->reverse_comm(this);
  } else {
    comm->forward_comm(this);
  }
  comm_forward = comm_reverse = widest;
}

int PairGAQ::doubles_per_row() const { return (row_bytes + sizeof(double) - 1) / sizeof(double); }

// A place in a message is given by an atom's number in its list: atoms that the model does not see send zeros.
void PairGAQ::pack_row(int atom, double* buffer) const {
  const int64_t row = index_of[atom];
  if (row < 0) {
    std::fill(buffer, buffer + doubles_per_row(), 0.0);
  } else {
    memcpy(buffer, rows + row * row_bytes, row_bytes);
  }
}

int PairGAQ::pack_forward_comm(int count, int* indices, double* buffer, int, int*) {
  const int doubles = doubles_per_row();
  for (int k = 0; k < count; ++k) pack_row(indices[k], buffer + static_cast<int64_t>(k) * doubles);
  return count * doubles;
}

void PairGAQ::unpack_forward_comm(int count, int first, double* buffer) {
  const int doubles = doubles_per_row();
  for (int k = 0; k < count; ++k) {
    const int64_t row = index_of[first + k];
    if (row >= 0) memcpy(rows + row * row_bytes, buffer + static_cast<int64_t>(k) * doubles, row_bytes);
  }
}

int PairGAQ::pack_reverse_comm(int count, int first, double* buffer) {
  const int doubles = doubles_per_row();
  for (int k = 0; k < count; ++k) pack_row(first + k, buffer + static_cast<int64_t>(k) * doubles);
  return count * doubles;
}

void PairGAQ::unpack_reverse_comm(int count, int* indices, double* buffer) {
  const int doubles = doubles_per_row();
  for (int k = 0; k < count; ++k) {
    const int64_t row = index_of[indices[k]];
    if (row < 0) continue;
    const double* const added = buffer + static_cast<int64_t>(k) * doubles;
    if (gaq_potential_bytes(potential) == 4) {
      add_row<float>(row, added);
    } else {
      add_row<double>(row, added);
    }
  }
}

template <typename T> void PairGAQ::add_row(int64_t row, const double* buffer) {
  T* const target = reinterpret_cast<T*>(rows + row * row_bytes);
  const T* const added = reinterpret_cast<const T*>(buffer);
  for (size_t n = 0; n < row_bytes / sizeof(T); ++n) target[n] += added[n];
}

double PairGAQ::memory_usage() {
  const double atoms = atom_of.size() * sizeof(int) + (index_of.size() + element.size()) * sizeof(int64_t);
  const double edges = (sender.size() + receiver.size()) * sizeof(int64_t);
  return Pair::memory_usage() + atoms + edges + (vectors.size() + energies.size() + gradient.size()) * sizeof(double);
}
