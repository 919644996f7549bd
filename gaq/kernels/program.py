r"""A model as a program: operations on node features, forward and backward, that one call of C++ goes through.

A `Builder` records the operations of the forward pass on `Value`s, rows of numbers of each atom. `Builder.build` adds
those of the backward pass in reverse order (each has its derivative here, in terms of the same operations), finds out
which values can share memory, and gives a `Program`. Between the operations there is no Python, no autograd graph and
no allocation; `program.cpp` runs them.

Atoms are sorted by species. Gradients are those of the energy by the edge vectors; the convolutions, the densities and
the repulsion of nuclei add to them. On parts of space (`Builder.parts`), as LAMMPS divides it, local atoms come first
among those that send, and an exchange copies features to the atoms of other parts and adds gradients back.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaq.kernels import contraction, rounding, signatures
from gaq.kernels.convolution import ConvolutionProblem
from gaq.kernels.cpu.native import kernel

__all__ = [
    "ACTIVATIONS",
    "Builder",
    "Exchange",
    "Gated",
    "Layer",
    "Program",
    "Recorded",
    "Repulsion",
    "Value",
    "View",
    "edge_vectors",
    "forces_and_strain",
]

ACTIVATIONS = ("silu", "tanh")
"""Functions of `Builder.activation` and `Builder.gate`."""
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


@dataclass(eq=False)
class _Memory:
    """Memory of a value: `width` numbers of each atom, or of each sender."""

    of_senders: bool
    width: int
    used: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Value:
    """Rows of numbers of all atoms, (atoms, width).

    Attributes:
        memory: where they lie; values may share it.
        differentiable: whether it depends on positions.
        grad: memory of the gradient, once there is one.
    """

    memory: _Memory
    differentiable: bool
    grad: _Memory | None = None


@dataclass(frozen=True)
class View:
    """Where the rows of a matrix lie in a value. Offsets and strides are in numbers.

    Attributes:
        components: rows of each atom.
        atom_stride: from one atom to the next.
        row_stride: from one row of an atom to the next.
        offset: constant part of the first row's offset.
        scaled_offset: part of the first row's offset that is multiplied by the number of atoms.
    """

    components: int
    atom_stride: int
    row_stride: int
    offset: int = 0
    scaled_offset: int = 0

    def words(self) -> list[int]:
        """The view as `program.cpp` reads it, without the slot."""
        return [self.scaled_offset, self.offset, self.components, self.atom_stride, self.row_stride]


@dataclass(frozen=True)
class Repulsion:
    """Repulsion of nuclei by pairs of species.

    Attributes:
        factors: the four of the screening function.
        charges: product of the charges, (species, species) in eV Å.
        rates: inverse of the screening length, (species, species) in 1/Å.
        cutoffs: (species, species) in Å.
        power: of the polynomial envelope.
        exponents: the four of the screening function, in units of the inverse screening length.
    """

    factors: Tensor
    charges: Tensor
    rates: Tensor
    cutoffs: Tensor
    power: int
    exponents: tuple[float, float, float, float] = (3.2, 0.9423, 0.4028, 0.2016)


@dataclass(frozen=True)
class Gated:
    """Features that functions of scalars multiply, and scalars that become such functions; see `Builder.gate`.

    Offsets are in numbers, within the row of an atom. The components of features follow each other every `channels`.

    Attributes:
        channels: number of scalars, and of features.
        scalars: offset of the scalars.
        out: offset of the result.
        kind: of `ACTIVATIONS`.
        factor: by which the function is multiplied.
        components: of each feature; 0 where the result is the function itself.
        features: offset of the features.
    """

    channels: int
    scalars: int
    out: int
    kind: str
    factor: float
    components: int = 0
    features: int = 0

    def words(self) -> list[int]:
        """The integers as `program.cpp` reads them."""
        return [
            self.channels,
            self.scalars,
            self.out,
            ACTIVATIONS.index(self.kind),
            self.components,
            self.features,
        ]


@dataclass(frozen=True)
class Layer:
    """Convolution of a layer, as a call of a program reads it.

    Attributes:
        problem: of the convolution.
        weights: radial tables, (tables * paths, intervals, COEFFICIENTS, channels).
        density: tables of the edge density, (tables, intervals, COEFFICIENTS, 1); None without.
    """

    problem: ConvolutionProblem
    weights: Tensor
    density: Tensor | None


@dataclass(frozen=True)
class Recorded:
    """A program as `program.cpp` reads it, and as a file holds it.

    Attributes:
        dtype: of the features.
        words: slots, matrices and operations, int64.
        ints: what operations read, int64.
        reals: what operations read, float64.
        constants: what operations read, in the dtype of the features.
        weights: matrices, end to end, in the dtype of the features.
        operations: name of each operation.
        exports: number of the features that a call can give.
        parts: whether it is for parts of space.
        layers: number of convolutions.
        heads: number of heads.
        width: most numbers of an atom that an exchange moves.
    """

    dtype: torch.dtype
    words: Tensor
    ints: Tensor
    reals: Tensor
    constants: Tensor
    weights: Tensor
    operations: tuple[str, ...]
    exports: int
    parts: bool
    layers: int
    heads: int
    width: int


Argument = int | _Memory
Block = tuple[View, View, Tensor]
"""Where a linear layer reads and writes, and its matrix (in, out) or those of all species, (species, in, out)."""


class Builder:
    """Records the operations of a model.

    Args:
        dtype: of the features.
        scales: by which each head's energies are multiplied, (heads,).
        shifts: that are added then, (heads,) in eV.
        parts: whether programs are for parts of space.
    """

    def __init__(self, dtype: torch.dtype, scales: Tensor, shifts: Tensor, parts: bool = False) -> None:
        self.dtype, self.parts = dtype, parts
        self.steps: list[tuple[str, list[Argument]]] = []
        self.tape: list[Callable[[], None]] = []
        self.ints: list[int] = []
        self.reals: list[float] = []
        self.constants: list[Tensor] = []
        self.constant_count = 0
        # Apart from the constants: the program keeps them packed only.
        self.weights: list[Tensor] = []
        self.weight_count = 0
        self.matrices: list[list[int]] = []
        self.exports = 0
        self.layers = 0
        self.widest = 0
        if scales.shape != shifts.shape:
            raise ValueError(f"factors of {tuple(scales.shape)} heads, and constants of {tuple(shifts.shape)}")
        self.heads = scales.numel()
        self.scales, self.shifts = self._real(scales), self._real(shifts)

    # -- constants --

    def _real(self, values: Tensor) -> int:
        """Keep numbers in float64, and return the place of the first."""
        self.reals += values.detach().double().flatten().tolist()
        return len(self.reals) - values.numel()

    def _integer(self, values: Tensor) -> int:
        self.ints += values.flatten().tolist()
        return len(self.ints) - values.numel()

    def _constant(self, values: Tensor) -> int:
        """Keep numbers in the dtype of the features, and return the place of the first."""
        self.constants.append(values.detach().to(self.dtype).contiguous().flatten())
        self.constant_count += values.numel()
        return self.constant_count - values.numel()

    def _weight(self, matrix: Tensor) -> int:
        """Keep a matrix in the dtype of the features, and return its place."""
        self.weights.append(matrix.detach().to(self.dtype).contiguous().flatten())
        self.weight_count += matrix.numel()
        return self.weight_count - matrix.numel()

    def _matrix(self, at: int, shape: torch.Size, transposed: bool) -> int:
        """Number of a matrix, or of those of all species."""
        species, (rows, columns) = shape[0] if len(shape) == 3 else 1, shape[-2:]
        self.matrices.append([at, *((columns, rows) if transposed else (rows, columns)), species, int(transposed)])
        return len(self.matrices) - 1

    # -- values --

    def _memory(self, width: int, of_senders: bool = False) -> _Memory:
        return _Memory(of_senders and self.parts, width)

    def _step(self, name: str, *arguments: Argument) -> None:
        self.steps.append((name, list(arguments)))

    def _target(self, value: Value) -> tuple[_Memory, bool]:
        """Memory of a value's gradient, and whether there is something in it to which to add."""
        if value.grad is not None:
            return value.grad, True
        value.grad = self._memory(value.memory.width, value.memory.of_senders)
        return value.grad, False

    def _pass_on(self, value: Value, grad: _Memory) -> None:
        """Give a value the gradient of a result that was the value itself."""
        if value.grad is None:
            value.grad = grad
        elif value.grad is not grad:
            self._step("add", grad, value.grad, grad.width)

    # -- operations --

    def gather(self, rows: Tensor, of_senders: bool = False) -> Value:
        """Rows of each atom's species, from those of all species, (species, width)."""
        memory = self._memory(rows.shape[1], of_senders)
        self._step("gather", memory, int(memory.of_senders), memory.width, self._constant(rows))
        return Value(memory, False)

    def round(self, x: Value, plan: rounding.Plan, in_place: bool = False) -> Value:
        """Round features by a plan; the gradient passes unchanged."""
        out = Value(x.memory if in_place else self._memory(x.memory.width), x.differentiable)
        at = self._integer(plan.ints), self._real(plan.reals)
        self._step("round", x.memory, out.memory, x.memory.width, *at)

        def back() -> None:
            if out.grad is not None:
                self._pass_on(x, out.grad)

        if x.differentiable:
            self.tape.append(back)
        return out

    def linear(
        self, x: Value, width: int, blocks: Sequence[Block], onto: Value | None = None, full: bool = True
    ) -> Value:
        """Multiply blocks of features by matrices.

        Args:
            x: features.
            width: of the result.
            blocks: no two of them write to the same place.
            onto: a value of that width to which the result is added. It cannot be read later.
            full: whether the blocks write all of the result; what they do not write is zero.
        """
        out = Value(self._memory(width) if onto is None else onto.memory, x.differentiable)
        if onto is not None:
            out.differentiable |= onto.differentiable
        if not full and onto is None:
            self._step("zero", out.memory, int(out.memory.of_senders), width)
        places = []
        for read, written, matrix in blocks:
            at, species = self._weight(matrix), matrix.dim() == 3
            number = self._matrix(at, matrix.shape, False)
            ends = int(species), int(onto is not None)
            self._step("linear", x.memory, *read.words(), out.memory, *written.words(), number, *ends)
            places.append(at)

        def back() -> None:
            if out.grad is None:
                return
            if x.differentiable:
                self._linear_back(x, out.grad, blocks, places)
            if onto is not None and onto.differentiable:
                self._pass_on(onto, out.grad)

        if out.differentiable:
            self.tape.append(back)
        return out

    def _linear_back(self, x: Value, grad: _Memory, blocks: Sequence[Block], places: Sequence[int]) -> None:
        target, add = self._target(x)
        read_once = {(read.scaled_offset, read.offset) for read, _, _ in blocks}
        covered = sum(matrix.shape[-2] * read.components for read, _, matrix in blocks)
        if not add and (len(read_once) < len(blocks) or covered < x.memory.width):
            self._step("zero", target, int(target.of_senders), target.width)
            add = True
        for (read, written, matrix), at in zip(blocks, places, strict=True):
            number = self._matrix(at, matrix.shape, True)
            species = int(matrix.dim() == 3)
            self._step("linear", grad, *written.words(), target, *read.words(), number, species, int(add))

    def convolution(self, x: Value, rows_out: int, channels: int) -> Value:
        """Messages of the next layer's convolution from the features of senders."""
        layer, out = self.layers, Value(self._memory(rows_out * channels), True)
        self.layers += 1
        self._step("convolution", layer, x.memory, out.memory)

        def back() -> None:
            if out.grad is None:
                return
            target: Argument = -1
            if x.differentiable:
                target, add = self._target(x)
                assert not add, "features of senders are read by one convolution only"
            self._step("convolution_back", layer, x.memory, out.grad, target, x.memory.width)

        self.tape.append(back)
        return out

    def contraction(self, x: Value, polynomial: contraction.Polynomial, coefficients: Tensor) -> Value:
        """Polynomials of features; coefficients (species, terms, channels)."""
        channels = coefficients.shape[2]
        out = Value(self._memory(polynomial.rows_out * channels), x.differentiable)
        at = self._integer(polynomial.plan_of(channels)), self._constant(coefficients)
        self._step("contraction", x.memory, out.memory, *at)

        def back() -> None:
            if out.grad is None:
                return
            target, add = self._target(x)
            assert not add, "features are contracted once"
            self._step("contraction_back", x.memory, out.grad, target, *at)

        if x.differentiable:
            self.tape.append(back)
        return out

    def divide_by_density(self, x: Value) -> Value:
        """Divide features by one plus the sum of the densities of the edges, of the layer that was convolved last."""
        layer, density, width = self.layers - 1, self._memory(1), x.memory.width
        self._step("density", layer, density)
        self._step("divide", x.memory, density, width)
        out = Value(x.memory, True)

        def back() -> None:
            if out.grad is None:
                return
            by_density = self._memory(1)
            self._step("divide_back", out.grad, out.memory, density, by_density, width)
            self._step("density_back", layer, by_density)
            self._pass_on(x, out.grad)

        self.tape.append(back)
        return out

    def activation(self, x: Value, kind: str, factor: float, heads: int) -> Value:
        """Apply a function (`ACTIVATIONS`) to scalars, times a factor; zero outside the part of the atom's head."""
        out = Value(self._memory(x.memory.width), x.differentiable)
        rest = (x.memory.width, ACTIVATIONS.index(kind), heads, self._real(torch.tensor([factor], dtype=torch.float64)))
        self._step("activation", x.memory, out.memory, *rest)

        def back() -> None:
            if out.grad is not None:
                self._step("activation_back", out.grad, x.memory, *rest)
                self._pass_on(x, out.grad)

        self.tape.append(back)
        return out

    def gate(self, x: Value, width: int, pieces: Sequence[Gated]) -> Value:
        """Apply functions to scalars, and multiply features by functions of scalars.

        Args:
            x: scalars and features; each of its numbers is read by one piece. Nothing else reads it.
            width: of the result, whose numbers are all written.
            pieces: of the features.
        """
        out = Value(self._memory(width), x.differentiable)
        assert sum(p.channels * (p.components + 1) for p in pieces) == x.memory.width, "a number is not read once"
        assert sum(p.channels * (p.components or 1) for p in pieces) == width, "a number is not written once"
        words = torch.tensor([word for piece in pieces for word in piece.words()], dtype=torch.int64)
        factors = torch.tensor([piece.factor for piece in pieces], dtype=torch.float64)
        rest = (x.memory.width, width, len(pieces), self._integer(words), self._real(factors))
        self._step("gate", x.memory, out.memory, *rest)

        def back() -> None:
            if out.grad is None:
                return
            target, add = self._target(x)
            assert not add, "gated features are read by nothing else"
            self._step("gate_back", out.grad, x.memory, target, *rest)

        if x.differentiable:
            self.tape.append(back)
        return out

    def copy(self, x: Value, width: int, blocks: Sequence[tuple[View, View, int]]) -> Value:
        """Copy features to other places.

        Args:
            x: features.
            width: of the result.
            blocks: where rows are read and written, and their length. They write all of the result.
        """
        out = Value(self._memory(width), x.differentiable)
        for read, written, columns in blocks:
            self._step("copy", x.memory, *read.words(), out.memory, *written.words(), columns)

        def back() -> None:
            if out.grad is None:
                return
            target, add = self._target(x)
            assert not add, "features that are copied are read by nothing else"
            if sum(read.components * columns for read, _, columns in blocks) < x.memory.width:
                self._step("zero", target, int(target.of_senders), target.width)
            for read, written, columns in blocks:
                self._step("copy", out.grad, *written.words(), target, *read.words(), columns)

        if x.differentiable:
            self.tape.append(back)
        return out

    def add(self, x: Value, onto: Value) -> Value:
        """Add features to others of the same width, which cannot be read later."""
        out = Value(onto.memory, x.differentiable or onto.differentiable)
        self._step("add", x.memory, onto.memory, x.memory.width)

        def back() -> None:
            if out.grad is None:
                return
            if x.differentiable:
                # A copy: more is added to the gradient of either.
                target, add = self._target(x)
                row = View(1, target.width, 0).words()
                if add:
                    self._step("add", out.grad, target, target.width)
                else:
                    self._step("copy", out.grad, *row, target, *row, target.width)
            if onto.differentiable:
                self._pass_on(onto, out.grad)

        if out.differentiable:
            self.tape.append(back)
        return out

    def energy(self, x: Value) -> None:
        """Add the column of each atom's head to its energy."""
        width = x.memory.width
        self._step("energy", x.memory, width)

        def back() -> None:
            target, add = self._target(x)
            assert not add, "energies are read by nothing else"
            self._step("seed", target, width, self.scales)

        if x.differentiable:
            self.tape.append(back)

    def repulsion(self, pairs: Repulsion) -> None:
        """Add the repulsion of nuclei."""
        at = self._real(pairs.factors)
        self._real(torch.tensor(pairs.exponents, dtype=torch.float64))
        self._real(torch.stack([pairs.charges, pairs.rates, pairs.cutoffs], dim=-1))
        self._step("repulsion", at, self.scales, pairs.charges.shape[0], pairs.power)

    def exchange(self, x: Value) -> Value:
        """Features of all senders from those of local atoms."""
        if not self.parts:
            return x
        out, width = Value(self._memory(x.memory.width, of_senders=True), x.differentiable), x.memory.width
        self.widest = max(self.widest, width)
        self._step("exchange", x.memory, out.memory, width)

        def back() -> None:
            if out.grad is None:
                return
            target, add = self._target(x)
            assert not add, "what is exchanged is read by nothing else"
            self._step("exchange_back", out.grad, target, width)

        if x.differentiable:
            self.tape.append(back)
        return out

    def export(self, x: Value, channels: int, components: Sequence[int]) -> None:
        """Give features to the caller, in e3nn's layout and the order of the structure."""
        self._step("export", x.memory, channels, self.exports, len(components), *components)
        self.exports += 1

    # -- the program --

    def build(self) -> Program:
        """Add the backward pass, and make the program."""
        return Program(self.record())

    def record(self) -> Recorded:
        """Add the backward pass, and give the program as data."""
        self._step("scale_shift", self.scales, self.shifts)
        for back in reversed(self.tape):
            back()
        slots = self._slots()
        words: list[int] = []
        for name, arguments in self.steps:
            plain = [slots[id(a)] if isinstance(a, _Memory) else a for a in arguments]
            words += [signatures.STEPS.index(name), len(plain), *plain]
        sizes = self._sizes
        # What steps find in `ints` stands behind the rest: they have places relative to its beginning.
        head = [len(sizes), len(self.matrices), len(self.steps), self.layers]
        head += [word for size in sizes for word in size] + [word for matrix in self.matrices for word in matrix]
        none = torch.zeros(0, dtype=self.dtype)
        return Recorded(
            dtype=self.dtype,
            words=torch.tensor([*head, *words], dtype=torch.int64),
            ints=torch.tensor(self.ints, dtype=torch.int64),
            reals=torch.tensor(self.reals, dtype=torch.float64),
            constants=torch.cat([none, *self.constants]),
            weights=torch.cat([none, *self.weights]),
            operations=tuple(name for name, _ in self.steps),
            exports=self.exports,
            parts=self.parts,
            layers=self.layers,
            heads=self.heads,
            width=self.widest,
        )

    def _slots(self) -> dict[int, int]:
        """Number of the slot of each memory: those that are not used at the same time share one."""
        for number, (_, arguments) in enumerate(self.steps):
            for argument in arguments:
                if isinstance(argument, _Memory):
                    argument.used.append(number)
        memories = {id(a): a for _, arguments in self.steps for a in arguments if isinstance(a, _Memory)}
        self._sizes: list[list[int]] = []
        free: list[int] = []
        slots: dict[int, int] = {}
        ends: list[tuple[int, int]] = []
        for key, memory in sorted(memories.items(), key=lambda item: item[1].used[0]):
            free += [slot for end, slot in ends if end < memory.used[0]]
            ends = [(end, slot) for end, slot in ends if end >= memory.used[0]]
            fitting = [slot for slot in free if self._sizes[slot][0] == memory.of_senders]
            if fitting:
                # The one whose size is nearest.
                slot = min(fitting, key=lambda number: abs(self._sizes[number][1] - memory.width))
                free.remove(slot)
                self._sizes[slot][1] = max(self._sizes[slot][1], memory.width)
            else:
                slot = len(self._sizes)
                self._sizes.append([int(memory.of_senders), memory.width])
            slots[key] = slot
            ends.append((memory.used[-1], slot))
        return slots


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
        self.operations, self.heads = recorded.operations, recorded.heads
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

        Returns:
            The energy of each sorted atom, (atoms,) in float64, and the gradient by the vectors, (edges, 3).

        Raises:
            IndexError: for a head that the model does not have.
            ValueError: for a program for parts of space without an exchange, or for another with one.

        What `exchange` raises is raised as well.
        """
        atoms, edges = species.numel(), sender.numel()
        if heads is not None and atoms and not 0 <= int(heads.min()) <= int(heads.max()) < self.heads:
            raise IndexError(f"head {int(heads.max())} of a model with {self.heads}")
        if self.parts != (exchange is not None):
            raise ValueError("an exchange belongs to a program for parts of space, and to no other")
        energies = torch.empty(atoms, dtype=torch.float64)
        grad = torch.empty_like(vectors)
        plans = [layer.problem.plan(layer.weights.shape[-3]) for layer in layers]
        intervals = [0 if layer.density is None else layer.density.shape[-3] for layer in layers]
        densities = torch.tensor(intervals, dtype=torch.int64)
        sending = species if senders is None else senders
        counts = torch.tensor([atoms, sending.numel(), edges, len(slices), torch.get_num_threads(), len(layers)])
        integers = [sender, receiver, tables, species, sending, slices, heads, place, densities]
        inputs = [vectors, *(layer.weights for layer in layers), *(layer.density for layer in layers)]
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
