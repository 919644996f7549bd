r"""What a program consists of, as it is being recorded: values, steps, constants and matrices.

`gaq.kernels.builder` has the operations that write steps, `gaq.kernels.program` calls what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaq.kernels import signatures
from gaq.kernels.convolution import ConvolutionProblem

__all__ = [
    "ACTIVATIONS",
    "Gated",
    "Layer",
    "Memory",
    "Recorded",
    "Recording",
    "Repulsion",
    "Transform",
    "Value",
    "View",
]

ACTIVATIONS = ("silu", "tanh", "sigmoid")
"""Functions of `Builder.activation` and `Builder.gate`."""
TRANSFORMS = ("agnesi", "soft")
"""Functions of `Transform`."""


@dataclass(eq=False)
class Memory:
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

    memory: Memory
    differentiable: bool
    grad: Memory | None = None


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
class Transform:
    """Transform of distances, with the cutoff function that multiplies what is made of them.

    Attributes:
        kind: of `TRANSFORMS`.
        parameters: q, p and a of an Agnesi transform, alpha of a soft one.
        lengths: of each species, (species,) in Å: half of the covalent radius (Agnesi), or the radius.
        r_max: cutoff in Å.
        power: of the cutoff function, a polynomial envelope.
    """

    kind: str
    parameters: tuple[float, ...]
    lengths: Tensor
    r_max: float
    power: int


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
        given: widths of the rows that a call gives (`Builder.given`).
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
    given: tuple[int, ...] = ()


Argument = int | Memory


class Recording:
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
        self.given_widths: list[int] = []
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

    def _memory(self, width: int, of_senders: bool = False) -> Memory:
        return Memory(of_senders and self.parts, width)

    def _step(self, name: str, *arguments: Argument) -> None:
        self.steps.append((name, list(arguments)))

    def _target(self, value: Value) -> tuple[Memory, bool]:
        """Memory of a value's gradient, and whether there is something in it to which to add."""
        if value.grad is not None:
            return value.grad, True
        value.grad = self._memory(value.memory.width, value.memory.of_senders)
        return value.grad, False

    def _pass_on(self, value: Value, grad: Memory) -> None:
        """Give a value the gradient of a result that was the value itself."""
        if value.grad is None:
            value.grad = grad
        elif value.grad is not grad:
            self._step("add", grad, value.grad, grad.width)

    def record(self) -> Recorded:
        """Add the backward pass, and give the program as data."""
        self._step("scale_shift", self.scales, self.shifts)
        for back in reversed(self.tape):
            back()
        slots = self._slots()
        words: list[int] = []
        for name, arguments in self.steps:
            plain = [slots[id(a)] if isinstance(a, Memory) else a for a in arguments]
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
            given=tuple(self.given_widths),
        )

    def _slots(self) -> dict[int, int]:
        """Number of the slot of each memory: those that are not used at the same time share one."""
        for number, (_, arguments) in enumerate(self.steps):
            for argument in arguments:
                if isinstance(argument, Memory):
                    argument.used.append(number)
        memories = {id(a): a for _, arguments in self.steps for a in arguments if isinstance(a, Memory)}
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
