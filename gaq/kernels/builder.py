r"""A model's operations, forward and backward.

A `Builder` records the operations of the forward pass on `Value`s, rows of numbers of each atom. `Builder.build` adds
those of the backward pass in reverse order (each has its derivative here, in terms of the same operations), finds out
which values can share memory, and gives a `Program`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gaq.kernels import contraction, rounding
from gaq.kernels.program import Program
from gaq.kernels.recording import (
    ACTIVATIONS,
    TRANSFORMS,
    Argument,
    Gated,
    Memory,
    Recording,
    Repulsion,
    Transform,
    Value,
    View,
)

__all__ = ["Block", "Builder"]

Block = tuple[View, View, Tensor]
"""Where a linear layer reads and writes, and its matrix (in, out) or those of all species, (species, in, out)."""


class Builder(Recording):
    """Records the operations of a model; the arguments are those of `Recording`."""

    def gather(self, rows: Tensor, of_senders: bool = False) -> Value:
        """Rows of each atom's species, from those of all species, (species, width)."""
        memory = self._memory(rows.shape[1], of_senders)
        self._step("gather", memory, int(memory.of_senders), memory.width, self._constant(rows))
        return Value(memory, False)

    def given(self, width: int) -> Value:
        """Rows of each atom's kind, from those of all kinds that a call gives, (kinds, width)."""
        memory = self._memory(width)
        self._step("given", memory, width, len(self.given_widths))
        self.given_widths.append(width)
        return Value(memory, False)

    def repeated(self, row: Tensor) -> Value:
        """The same row for each atom, (width,)."""
        memory = self._memory(row.numel())
        self._step("repeated", memory, memory.width, self._constant(row))
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

    def _linear_back(self, x: Value, grad: Memory, blocks: Sequence[Block], places: Sequence[int]) -> None:
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

    def transform(self, of: Transform) -> None:
        """Transform distances, for the convolutions and densities whose tables are over transformed ones."""
        parameters = [of.r_max, *of.parameters, *[0.0] * (3 - len(of.parameters))]
        at = self._real(torch.tensor(parameters, dtype=torch.float64))
        self._real(of.lengths)
        self._step("transform", TRANSFORMS.index(of.kind), at, of.lengths.numel(), of.power)

    def convolution(self, x: Value, rows_out: int, channels: int, transformed: bool = False) -> Value:
        """Messages of the next layer's convolution from the features of senders.

        Args:
            x: features.
            rows_out: rows of an atom's messages.
            channels: of each row.
            transformed: whether the layer's tables are over transformed distances; see `transform`.
        """
        self.transformed = int(transformed)
        layer, out = self.layers, Value(self._memory(rows_out * channels), True)
        self.layers += 1
        self._step("convolution", layer, x.memory, out.memory, int(transformed))

        def back() -> None:
            if out.grad is None:
                return
            target: Argument = -1
            if x.differentiable:
                target, add = self._target(x)
                assert not add, "features of senders are read by one convolution only"
            self._step("convolution_back", layer, x.memory, out.grad, target, x.memory.width, int(transformed))

        self.tape.append(back)
        return out

    def contraction(self, x: Value, polynomial: contraction.Polynomial, coefficients: Tensor) -> Value:
        """Polynomials of features; coefficients (species, terms, channels), or of one species for all atoms."""
        channels = coefficients.shape[2]
        out = Value(self._memory(polynomial.rows_out * channels), x.differentiable)
        by_species = int(coefficients.shape[0] > 1)
        at = self._integer(polynomial.plan_of(channels)), self._constant(coefficients), by_species
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

    def divide_by_density(self, x: Value, constant: float = 1.0, factor: float = 1.0) -> Value:
        """Divide features by a constant plus the sum of the densities of the edges times a factor.

        The densities are those of the layer that was convolved last.
        """
        numbers = self._real(torch.tensor([constant, factor], dtype=torch.float64))
        layer, density, width, transformed = self.layers - 1, self._memory(1), x.memory.width, self.transformed
        self._step("density", layer, density, transformed)
        self._step("divide", x.memory, density, width, numbers)
        out = Value(x.memory, True)

        def back() -> None:
            if out.grad is None:
                return
            by_density = self._memory(1)
            self._step("divide_back", out.grad, out.memory, density, by_density, width, numbers)
            self._step("density_back", layer, by_density, transformed)
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

    def build(self) -> Program:
        """Add the backward pass, and make the program."""
        return Program(self.record())
