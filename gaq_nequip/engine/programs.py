"""A NequIP model as a program, which one call of C++ runs forward and backward.

`program_of` writes the program from the model's own modules, layer after layer:

    linear_1, exchange, convolution, linear_2 onto the self-connection, gate

Normalisations are parts of matrices. What the first layer makes of the types alone is a row for each type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from nequip.data import AtomicDataDict
from torch import Tensor

from gaq.kernels import program, radial, rounding
from gaq.kernels.builder import Block as Product
from gaq.kernels.builder import Builder
from gaq.kernels.chunks import ChunkedConvolution
from gaq.kernels.problem import ConvolutionProblem
from gaq.kernels.program import Exchange, Program
from gaq.kernels.recording import Layer, Recorded, Repulsion, Value, View
from gaq.model.state import state_of
from gaq.untyped import AnyModule
from gaq_nequip.engine.edges import EdgePart, Unsupported, edge_part, fit_harmonics, layer_sequence
from gaq_nequip.engine.fused import chunked_of
from gaq_nequip.engine.layouts import Message, messages_of, pieces_of
from gaq_nequip.engine.radial_functions import Cutoffs, RadialFunctions, cutoffs_of, radial_functions
from gaq_nequip.engine.reading import (
    Block,
    blocks_of,
    by_component,
    input_quantizer_of,
    linear_matrices,
    matrix_of,
    self_connection_matrices,
    type_features,
)
from gaq_nequip.sites import class_name

__all__ = ["NequIPProgram", "Step", "Unsupported", "program_of"]

FEATURES = AtomicDataDict.NODE_FEATURES_KEY
ENERGY = AtomicDataDict.PER_ATOM_ENERGY_KEY
_MODULES = {"SiLU": "silu", "Tanh": "tanh"}


class Step(NamedTuple):
    """Results of a step.

    Attributes:
        energies: of the atoms, (atoms,) in eV, float64.
        forces: (atoms, 3) in eV/Å, float64.
        virial: NequIP's, minus the derivative of the energy by a symmetric strain, (3, 3) in eV, float64.
    """

    energies: Tensor
    forces: Tensor
    virial: Tensor


@dataclass(frozen=True)
class NequIPProgram:
    """A model as a program, with everything that its steps need.

    Attributes:
        recorded: the program as data.
        program: operations of the model.
        problems: convolution of each layer.
        radials: radial network of each layer.
        pairs: number of the radial table of each pair of types, (senders, receivers), int64.
        r_max: largest cutoff in Å.
        type_names: of the model.
        shifts: energy that is added to that of the program, for each type, (types,) in eV, float64. It is the energy of
            an isolated atom, unless the first layer has a self-connection.
        layers: convolutions with tables of their radial weights in the dtype of the program.
    """

    recorded: Recorded
    program: Program
    problems: tuple[ConvolutionProblem, ...]
    radials: tuple[RadialFunctions, ...]
    pairs: Tensor
    r_max: float
    type_names: tuple[str, ...]
    shifts: Tensor
    layers: tuple[Layer, ...]

    def __call__(
        self,
        types: Tensor,
        sender: Tensor,
        receiver: Tensor,
        vectors: Tensor,
        types_of_senders: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute energies and their gradient.

        Args:
            types: of the atoms that receive, (atoms,), int64.
            sender: of each edge, (edges,), int64.
            receiver: of each edge, (edges,), int64.
            vectors: of edges from receiver to sender, as NequIP has them, (edges, 3) in Å.
            types_of_senders: on parts of space, of all atoms that send, (senders,), int64: local ones first.
            exchange: on parts of space; see `gaq.kernels.program.Exchange`.

        Returns:
            The energy of each atom, (atoms,) in eV, float64, and the gradient by the vectors, (edges, 3) in eV/Å in the
            dtype of the program.

        Raises:
            ValueError: for a program for parts of space without an exchange, or for another with one.
        """
        order = torch.argsort(types, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        ordered, counts = types[order], torch.bincount(types, minlength=len(self.type_names))
        ends = counts.cumsum(0)
        slices = torch.stack([torch.arange(counts.numel()), ends - counts, ends], dim=1)[counts > 0]
        of_senders = types if types_of_senders is None else types_of_senders
        one_table = self.radials[0].tables.shape[0] == 1
        tables = None if one_table else self.pairs[of_senders[sender], types[receiver]].contiguous()
        energies, grad = self.program(
            self.layers,
            (place[sender] if types_of_senders is None else sender).contiguous(),
            place[receiver].contiguous(),
            vectors.to(self.program.dtype).contiguous(),
            ordered.contiguous(),
            slices.contiguous(),
            order,
            senders=None if types_of_senders is None else types_of_senders.contiguous(),
            tables=tables,
            exchange=exchange,
        )
        return energies[place] + self.shifts[types], grad

    def step(self, positions: Tensor, types: Tensor, edges: Tensor, shifts: Tensor) -> Step:
        """Compute energies, forces and the virial of a structure.

        Args:
            positions: (atoms, 3) in Å.
            types: of the atoms, (atoms,), int64.
            edges: receiver and sender, as NequIP has them, (2, edges), int64.
            shifts: of the senders' periodic images, (edges, 3) in Å.
        """
        receiver, sender = edges[0].contiguous(), edges[1].contiguous()
        positions, shifts = positions.double().contiguous(), shifts.double().contiguous()
        # The other way round than their names say: vectors are from receiver to sender.
        vectors = program.edge_vectors(positions, receiver, sender, shifts)
        energies, grad = self(types, sender, receiver, vectors)
        of_one = torch.zeros(len(positions), dtype=torch.int64)
        forces, strain = program.forces_and_strain(vectors, grad.double(), receiver, sender, of_one, 1, True)
        assert strain is not None
        return Step(energies, forces, -strain[0])


def program_of(model: AnyModule, parts: bool = False, tolerance: float | None = None) -> NequIPProgram:
    """Write the program of a model.

    Args:
        model: a `NequIPGNNModel` on the CPU: float, converted or frozen.
        parts: whether the program is for parts of space.
        tolerance: bound of the error of the radial weights, relative to the largest one; None for that of
            `gaq.kernels.radial` for the model's dtype.

    Raises:
        Unsupported: for a model of which some module has no operation; the message names it.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built.
    """
    state = state_of(model)
    if state is not None and state.status not in ("converted", "frozen"):
        raise Unsupported("the model is in training: its weights are rounded anew in each call")
    if tolerance is None:
        tolerance = radial.TOLERANCE if model.model_dtype == torch.float32 else radial.DOUBLE_TOLERANCE
    with torch.no_grad():
        return _Writer(model, parts, tolerance).written()


@contextmanager
def _within(name: str) -> Iterator[None]:
    """Refuse what is refused within this context by the name of the module."""
    try:
        yield
    except ValueError as error:
        raise Unsupported(f"{name}: {error}") from error


class _Writer:
    """Writes the program of one model."""

    def __init__(self, model: AnyModule, parts: bool, tolerance: float) -> None:
        self.tolerance = tolerance
        self.dtype: torch.dtype = model.model_dtype
        self.type_names = tuple(model.type_names)
        self.modules: dict[str, AnyModule] = dict(layer_sequence(model).named_children())
        if class_name(next(iter(self.modules.values()))) != "NodeTypeEmbed":
            raise Unsupported("the first module embeds no types")
        self.edge: EdgePart = edge_part(model, by_pair=True)
        self.harmonics = fit_harmonics(self.edge.harmonics)
        self.cutoffs: Cutoffs = cutoffs_of(self.edge, len(self.type_names))
        one = torch.ones(1, dtype=torch.float64)
        self.builder = Builder(self.dtype, one, 0 * one, parts)
        self.problems: list[ConvolutionProblem] = []
        self.radials: list[RadialFunctions] = []

    def written(self) -> NequIPProgram:
        """Write all modules."""
        names = list(self.modules)
        layers = [name for name in names if class_name(self.modules[name]) == "ConvNetLayer"]
        first = names.index(layers[0])
        if names[first : first + len(layers)] != layers:
            raise Unsupported("other modules run between the convolution layers")
        rest = {name: self.modules[name] for name in names[first + len(layers) :]}
        readout, scales, shifts = self._after_layers(rest)
        features, attributes = type_features(self.modules[names[0]])
        x: Value | None = None
        for name in layers:
            with _within(name):
                x = self._layer(self.modules[name], x, features, attributes)
        assert x is not None
        with _within(next(iter(rest))):
            self._readout(readout, x, scales)
        recorded = self.builder.record()
        tabulated = [
            Layer(problem, functions.weights(self.dtype), None)
            for problem, functions in zip(self.problems, self.radials, strict=True)
        ]
        return NequIPProgram(
            recorded,
            Program(recorded),
            tuple(self.problems),
            tuple(self.radials),
            self.cutoffs.pairs,
            self.edge.r_max,
            self.type_names,
            shifts,
            tuple(tabulated),
        )

    # -- layers --

    def _layer(self, layer: AnyModule, x: Value | None, features: Tensor, attributes: Tensor) -> Value:
        """Operations of one layer.

        Args:
            layer: a `ConvNetLayer`.
            x: features of the layer before; None for the first.
            features, attributes: of each type.
        """
        block, gate = layer.conv, layer.equivariant_nonlin
        if class_name(block) != "InteractionBlock":
            raise Unsupported(f"there is no operation for the interaction of a {class_name(block)}")
        if class_name(gate) != "Gate":
            raise Unsupported(f"there is no operation for the nonlinearity of a {class_name(gate)}")
        chunked = chunked_of(block, self.harmonics, self.edge.r_max, torch.device("cpu"), self.dtype)
        self.problems.append(chunked.problem)
        network = block.edge_mlp.mlp
        self.radials.append(radial_functions(network, chunked, self.edge, self.cutoffs, self.dtype, self.tolerance))
        norm = block.avg_num_neighbors_norm.norm_const.double()  # (1, 1) or (types, 1)
        builder, channels, sc = self.builder, chunked.problem.channels, None
        old = x
        if x is None:
            # Everything before the first messages depends on the type alone.
            rows = block.linear_1(features).double() * norm
            sent = builder.gather(chunked.rows(rows).flatten(1), of_senders=True)
            if block.sc is not None:
                kept = block.sc(features, attributes).double()
                sc = builder.gather(by_component(kept, block.linear_2.irreps_out))
            if layer.resnet:
                old = builder.gather(features)
        else:
            if block.sc is not None:
                sc = self._self_connection(block, x, attributes)
            sent = builder.exchange(self._send(block, x, chunked, norm))
        message = builder.convolution(sent, chunked.problem.rows_out, channels)
        y = self._gate(gate, self._receive(block, message, chunked, sc))
        if layer.resnet:
            assert old is not None
            y = builder.add(old, y)
        return self._round(layer, blocks_of(layer.irreps_out[FEATURES]), y, in_place=True)

    def _round(self, module: AnyModule, blocks: Sequence[Block], x: Value, in_place: bool = False) -> Value:
        """Round the inputs of a module, or what a layer gives, where its blocks lie."""
        quantizer = input_quantizer_of(module)
        if quantizer is None:
            return x
        width = x.memory.width
        pieces = [rounding.Piece(b.components, b.channels, b.start, width, b.channels) for b in blocks]
        plan = rounding.plan(quantizer, pieces)
        if plan is None:
            raise Unsupported(f"the kernels do not round the features of a {class_name(module)} as its quantizer does")
        return self.builder.round(x, plan, in_place)

    def _linear(self, x: Value, width: int, blocks: Sequence[Product], onto: Value | None = None) -> Value:
        """Multiply by matrices of which several may add to the same place."""
        turns: list[list[Product]] = []
        for block in blocks:
            turn = next((t for t in turns if all(block[1] != other[1] for other in t)), None)
            if turn is None:
                turns.append([block])
            else:
                turn.append(block)
        for turn in turns:
            full = sum(written.components * matrix.shape[-1] for _, written, matrix in turn) == width
            onto = self.builder.linear(x, width, turn, onto, full)
        assert onto is not None, "a linear layer without matrices"
        return onto

    def _send(self, block: AnyModule, x: Value, chunked: ChunkedConvolution, norm: Tensor) -> Value:
        """What edges read of their senders, in the layout of the convolution."""
        linear, problem = block.linear_1, chunked.problem
        read = {b.start: b for b in blocks_of(linear.irreps_in)}
        width, channels = problem.rows_in * problem.channels, problem.channels
        starts, row = {}, 0
        for b in blocks_of(linear.irreps_out):
            starts[b.start] = row
            row += -(-b.channels // channels) * b.components
        x = self._round(linear, blocks_of(linear.irreps_in), x)
        blocks: list[Product] = []
        for start, to, matrix in linear_matrices(linear):
            components = read[start].components
            scaled = matrix * norm[0, 0] if norm.numel() == 1 else matrix * norm[:, :, None]
            for number, chunk in enumerate(scaled.split(channels, dim=-1)):
                # Channels that only fill up are zero.
                padded = torch.nn.functional.pad(chunk, (0, channels - chunk.shape[-1]))
                first = (starts[to] + number * components) * channels
                blocks.append((read[start].view(x.memory.width), View(components, width, channels, first), padded))
        return self._linear(x, width, blocks)

    def _self_connection(self, block: AnyModule, x: Value, attributes: Tensor) -> Value:
        irreps, irreps_out = block.irreps_in[FEATURES], block.linear_2.irreps_out
        x = self._round(block.sc, blocks_of(irreps), x)
        read, written = ({b.start: b for b in blocks_of(of)} for of in (irreps, irreps_out))
        width = int(irreps_out.dim)
        blocks = [
            (read[start].view(x.memory.width), written[to].view(width), matrix)
            for start, to, matrix in self_connection_matrices(block.sc, attributes)
        ]
        return self._linear(x, width, blocks)

    def _receive(self, block: AnyModule, x: Value, chunked: ChunkedConvolution, sc: Value | None) -> Value:
        """What `linear_2` makes of messages, added to the self-connection."""
        linear = block.linear_2
        messages, quantizer = messages_of(chunked), input_quantizer_of(linear)
        if quantizer is not None:
            pieces = [m.piece() for m in messages]
            plan = rounding.plan(quantizer, pieces) if all(m.full for m in messages) else None
            if plan is not None:
                x = self.builder.round(x, plan, in_place=True)
            else:
                # A quantizer takes scalars of both parities together, and no channels that only fill up.
                inputs = blocks_of(linear.irreps_in)
                width = int(linear.irreps_in.dim)
                moved = [copied for m, to in zip(messages, inputs, strict=True) for copied in m.copies(to, width)]
                x = self._round(linear, inputs, self.builder.copy(x, width, moved), in_place=True)
                messages = [Message(b.view(width), b.channels, ((0, b.channels),)) for b in inputs]
        message_at = {b.start: m for b, m in zip(blocks_of(linear.irreps_in), messages, strict=True)}
        written = {b.start: b for b in blocks_of(linear.irreps_out)}
        width = int(linear.irreps_out.dim)
        blocks = [
            (message_at[start].view, written[to].view(width), message_at[start].padded(matrix))
            for start, to, matrix in linear_matrices(linear)
        ]
        return self._linear(x, width, blocks, sc)

    def _gate(self, gate: AnyModule, x: Value) -> Value:
        x = self._round(gate, blocks_of(gate.irreps_in), x, in_place=True)
        pieces, width = pieces_of(gate)
        return self.builder.gate(x, width, pieces)

    # -- after the layers --

    def _after_layers(self, modules: dict[str, AnyModule]) -> tuple[AnyModule, Tensor, Tensor]:
        """Write the repulsion of nuclei, and return the read-out and each type's scale and shift, (types,)."""
        kinds = [class_name(module) for module in modules.values()]
        expected = ["ScalarMLP", "PerTypeScaleShift", "AtomwiseReduce"]
        repulsive = kinds[2:3] == ["ZBL"]
        if repulsive:
            expected.insert(2, "ZBL")
        for (name, _), kind, wanted in zip(modules.items(), kinds, expected, strict=False):
            if kind != wanted:
                raise Unsupported(f"there is no operation for {name}, a {kind}, in the place of a {wanted}")
        if len(kinds) != len(expected):
            raise Unsupported(f"after the layers there are {', '.join(kinds)}, and not {', '.join(expected)}")
        readout, scale_shift, *zbl, total = modules.values()
        fields = (readout.field, readout.out_field, scale_shift.field, scale_shift.out_field, total.field)
        if fields != (FEATURES, ENERGY, ENERGY, ENERGY, ENERGY) or total.reduce != "sum" or total.constant != 1.0:
            raise Unsupported(f"the modules after the layers read and write other fields: {fields}")
        if zbl:
            self.builder.repulsion(self._repulsion(zbl[0]))
        types = len(self.type_names)
        scales, shifts = torch.ones(types, dtype=torch.float64), torch.zeros(types, dtype=torch.float64)
        if scale_shift.has_scales:
            scales = scales * scale_shift.scales.double().flatten()
        if scale_shift.has_shifts:
            shifts = shifts + scale_shift.shifts.double().flatten()
        return readout, scales, shifts

    def _repulsion(self, zbl: AnyModule) -> Repulsion:
        """NequIP's repulsion; the numbers are those of its `_ZBL`."""
        power, numbers = float(zbl.cutoff.p), zbl.atomic_numbers.double()
        if power != int(power):
            raise Unsupported(f"the repulsion of nuclei ends with the power {power:g} of the distance")
        if zbl.per_atom_energy_field != ENERGY:
            raise Unsupported(f"the repulsion of nuclei is added to {zbl.per_atom_energy_field}")
        powers = numbers**0.23
        return Repulsion(
            torch.tensor([0.02817, 0.28022, 0.50986, 0.18175], dtype=torch.float64),
            2 * float(zbl._qqr2exesquare) * numbers[:, None] * numbers[None],  # it holds half of the constant
            (powers[:, None] + powers[None]) / 0.46850,
            torch.tensor(self.cutoffs.values, dtype=torch.float64)[self.cutoffs.pairs],
            int(power),
            (0.20162, 0.40290, 0.94229, 3.19980),
        )

    def _readout(self, readout: AnyModule, x: Value, scales: Tensor) -> None:
        network = readout.mlp_module.mlp
        modules = [network] if class_name(network) == "DeepLinearMLP" else list(network.children())
        for number, module in enumerate(modules):
            kind = class_name(module)
            if kind in _MODULES:
                x = self.builder.activation(x, _MODULES[kind], 1.0, 1)
            elif kind != "Identity":
                x = self._scalars(module, x, scales if number == len(modules) - 1 else None)
        if x.memory.width != 1:
            raise Unsupported(f"the read-out gives {x.memory.width} numbers")
        self.builder.energy(x)

    def _scalars(self, layer: AnyModule, x: Value, scales: Tensor | None) -> Value:
        """A layer from scalars to scalars, times the scales of the types."""
        matrix = matrix_of(layer)
        inputs, outputs = matrix.shape
        if inputs != x.memory.width:
            raise Unsupported(f"the read-out reads {inputs} of {x.memory.width} features")
        if scales is not None:
            alike = bool((scales == scales[0]).all())
            matrix = matrix * scales[0] if alike else matrix * scales[:, None, None]
        x = self._round(layer, [Block(0, inputs, 1)], x)
        return self.builder.linear(x, outputs, [(View(1, inputs, 0), View(1, outputs, 0), matrix)])
