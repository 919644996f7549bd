// A deployed model as plain C: what pair styles and other programs call. `gaq deploy` writes the files.
//
// Atoms are local ones first, then ghosts, which stand for atoms of other parts of space or for periodic images.
// Lengths are in Å, energies in eV.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct gaq_potential gaq_potential;

// Copies the rows of local atoms to the ghosts that stand for them (`back` 0), or adds those of ghosts to the rows of
// the atoms for which they stand (`back` 1). There are `width` numbers in a row, and a row for each atom.
typedef void (*gaq_exchange)(void* context, int64_t back, void* rows, int64_t width);

// Opens a file for the types of atoms of the caller: `symbols` are their elements, null for a type that does not take
// part (its atoms have no edges and no energy). `head` is a name, or null for the first. Null where that fails, with
// the reason in `message`, a text of at most `size` bytes.
gaq_potential* gaq_potential_open(const char* file, int64_t types, const char* const* symbols, const char* head,
                                  char* message, int64_t size);
void gaq_potential_close(gaq_potential* potential);

// Atoms within this distance are neighbours.
double gaq_potential_cutoff(const gaq_potential* potential);
// Most numbers of an atom that an exchange moves; 0 where nothing is exchanged.
int64_t gaq_potential_width(const gaq_potential* potential);
// Bytes of a number that is exchanged: 4 (float) or 8 (double).
int64_t gaq_potential_bytes(const gaq_potential* potential);

// Computes the energies of local atoms, and the gradient of their sum over all parts of space by the vectors. An edge
// has a sender, which may be any atom, a receiver, which is local, and a vector from sender to receiver; edges beyond
// the cutoff are ignored. `type` counts from 0. `exchange` is null where there are no ghosts.
void gaq_potential_compute(const gaq_potential* potential, int64_t local, int64_t all, const int64_t* type,
                           int64_t edges, const int64_t* sender, const int64_t* receiver, const double* vectors,
                           gaq_exchange exchange, void* context, int64_t threads, double* energies, double* gradient);

#ifdef __cplusplus
}
#endif
