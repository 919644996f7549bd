r"""A model as a program: operations on node features, forward and backward, that one call of C++ goes through.

`gaq.kernels.builder.Builder` records the operations, and makes a `Program` of them. Between the operations there is no
Python, no autograd graph and no allocation; `program.cpp` runs them.

Atoms are sorted by species. Gradients are those of the energy by the edge vectors; the convolutions, the densities and
the repulsion of nuclei add to them. On parts of space (`Recorded.parts`), as LAMMPS divides it, local atoms come first
among those that send, and an exchange copies features to the atoms of other parts and adds gradients back.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gaq.kernels.cpu.native import kernel
from gaq.kernels.recording import Layer, Recorded

__all__ = ["Exchange", "Program", "edge_vectors", "forces_and_strain"]

EXCHANGE = {
    torch.float32: ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    ),
    torch.float64: ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_double), ctypes.c_int64
    ),
}
"""C function of an exchange: context, whether back, rows (senders, width), width."""
Exchange = Callable[[bool, Tensor], None]
"""Exchange in Python: whether gradients come back, and rows of the senders, (senders, width), changed in place."""


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


class Program:
    """A model's operations, ready to be called; safe to use from several threads.

    Attributes:
        dtype: of the features.
        exports: number of the features that a call can give.
        parts: whether it is for parts of space.
        seconds: wall time of each kind of operation, to which calls add while it is a dictionary.
    """

    seconds: dict[str, float] | None = None

    def __init__(self, recorded: Recorded) -> None:
        self.dtype, self.exports, self.parts = recorded.dtype, recorded.exports, recorded.parts
        self.operations, self.heads, self.given = recorded.operations, recorded.heads, recorded.given
        self._run = kernel("program_run", self.dtype)
        made = ctypes.c_int64()
        # Copied or packed.
        arrays = (recorded.words, recorded.ints, recorded.reals, recorded.constants)
        sizes = [word for array in arrays for word in (array.data_ptr(), array.numel())]
        kernel("program_new", self.dtype)(*sizes, recorded.weights.data_ptr(), ctypes.addressof(made))
        self.handle = made.value
        weakref.finalize(self, kernel("program_delete", self.dtype), self.handle)

    def __call__(
        self,
        layers: Sequence[Layer],
        sender: Tensor,
        receiver: Tensor,
        vectors: Tensor,
        species: Tensor,
        slices: Tensor,
        place: Tensor,
        senders: Tensor | None = None,
        tables: Tensor | None = None,
        heads: Tensor | None = None,
        exports: Sequence[Tensor] = (),
        exchange: Exchange | None = None,
        given: Sequence[Tensor] = (),
        kinds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute energies and their gradient.

        Args:
            layers: convolutions and radial tables.
            sender: of each edge, (edges,), int64: number in the sorted order, or on parts of space in that of senders.
            receiver: of each edge in the sorted order, (edges,), int64.
            vectors: of edges, (edges, 3) in Å.
            species: of the atoms in the sorted order, (atoms,), int64.
            slices: species, first atom and end of each run of equal species, (slices, 3), int64.
            place: position of each sorted atom in the structure, (atoms,), int64.
            senders: species of all that send, (senders,), int64; None where these are the atoms.
            tables: number of each edge's radial table, (edges,), int64; None where there is one only.
            heads: number of each sorted atom's head, (atoms,), int64; None for the first.
            exports: memory for what the model exports, (atoms, width) each; none for nothing.
            exchange: on parts of space.
            given: rows of all kinds of atoms, (kinds, width) each, that the program reads (`Builder.given`).
            kinds: of the atoms in the sorted order, (atoms,), int64; None where nothing is given.

        Returns:
            The energy of each sorted atom, (atoms,) in float64, and the gradient by the vectors, (edges, 3).

        Raises:
            IndexError: for a head that the model does not have.
            ValueError: for a program for parts of space without an exchange, or for another with one; for rows of
                other widths than the program reads.

        What `exchange` raises is raised as well.
        """
        atoms, edges = species.numel(), sender.numel()
        if heads is not None and atoms and not 0 <= int(heads.min()) <= int(heads.max()) < self.heads:
            raise IndexError(f"head {int(heads.max())} of a model with {self.heads}")
        if self.parts != (exchange is not None):
            raise ValueError("an exchange belongs to a program for parts of space, and to no other")
        if (widths := tuple(rows.shape[1] for rows in given)) != self.given:
            raise ValueError(f"rows of {widths} numbers are given, not of {self.given}")
        energies = torch.empty(atoms, dtype=torch.float64)
        grad = torch.empty_like(vectors)
        plans = [layer.problem.plan(layer.weights.shape[-3]) for layer in layers]
        intervals = [0 if layer.density is None else layer.density.shape[-3] for layer in layers]
        densities = torch.tensor(intervals, dtype=torch.int64)
        sending = species if senders is None else senders
        counts = torch.tensor([atoms, sending.numel(), edges, len(slices), torch.get_num_threads(), len(layers)])
        integers = [sender, receiver, tables, species, sending, slices, heads, place, densities, kinds]
        inputs = [vectors, *(layer.weights for layer in layers), *(layer.density for layer in layers), *given]
        missing: list[Tensor | None] = [None] * (self.exports - len(exports))
        seconds = None if self.seconds is None else torch.zeros(len(self.operations), dtype=torch.float64)
        failed: list[BaseException] = []
        called = None if exchange is None else EXCHANGE[self.dtype](_callback(exchange, sending.numel(), failed))
        self._run(
            self.handle,
            counts.data_ptr(),
            _pointers([*integers, *(plan[0] for plan in plans)]),
            _pointers([plan[1] for plan in plans]),
            _pointers(inputs),
            _pointers([grad, *exports, *missing]),
            energies.data_ptr(),
            None if seconds is None else seconds.data_ptr(),
            0 if called is None else ctypes.cast(called, ctypes.c_void_p).value,
            0,
        )
        if failed:
            raise failed[0]
        if seconds is not None and self.seconds is not None:
            for name, value in zip(self.operations, seconds.tolist(), strict=True):
                self.seconds[name] = self.seconds.get(name, 0.0) + value
        return energies, grad


def _callback(exchange: Exchange, senders: int, failed: list[BaseException]) -> Callable[..., None]:
    """An exchange as C++ calls it. What it raises is kept: it cannot pass through C++."""
    import numpy as np

    def call(_context: int | None, back: int, rows: object, width: int) -> None:
        try:
            exchange(bool(back), torch.from_numpy(np.ctypeslib.as_array(rows, (senders, width))))
        except BaseException as error:  # an interruption as well; raised when C++ has returned
            failed.append(error)

    return call


def edge_vectors(positions: Tensor, sender: Tensor, receiver: Tensor, shifts: Tensor) -> Tensor:
    """Vectors from sender to receiver, (edges, 3): positions (atoms, 3), shifts of periodic images (edges, 3), in Å."""
    vectors = torch.empty_like(shifts)
    arguments = [t.data_ptr() for t in (sender, receiver, positions, shifts, vectors)]
    kernel("edge_vectors", vectors.dtype)(sender.numel(), *arguments)
    return vectors


def forces_and_strain(
    vectors: Tensor, grad: Tensor, sender: Tensor, receiver: Tensor, structure: Tensor, structures: int, strained: bool
) -> tuple[Tensor, Tensor | None]:
    """Forces, (atoms, 3) in eV/Å, and the derivative of the energies by a symmetric strain, (structures, 3, 3) in eV.

    Args:
        vectors: of edges, (edges, 3) in Å.
        grad: of the energy by the vectors, (edges, 3) in eV/Å.
        sender: of each edge, (edges,), int64.
        receiver: of each edge, (edges,), int64.
        structure: number of each atom's structure, (atoms,), int64.
        structures: their number.
        strained: whether the derivative by the strain is wanted; None otherwise.
    """
    forces = vectors.new_zeros(structure.numel(), 3)
    strain = torch.zeros(structures, 3, 3, dtype=torch.float64) if strained else None
    arguments = [t.data_ptr() for t in (sender, receiver, structure, vectors, grad, forces)]
    kernel("forces_and_strain", vectors.dtype)(
        sender.numel(), *arguments, None if strain is None else strain.data_ptr()
    )
    return forces, strain
