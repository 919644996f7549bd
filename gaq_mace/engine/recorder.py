"""An engine's layers and read-outs as the operations of a program."""

from __future__ import annotations

from collections.abc import Sequence

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.kernels.builder import Builder
from gaq.kernels.recording import Gated, Repulsion, Transform, Value, View
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import alone
from gaq_mace.engine.interactions import AgnosticLayer, NonLinearLayer
from gaq_mace.engine.layouts import Rounder
from gaq_mace.engine.linears import Mixing
from gaq_mace.engine.reading import Unsupported, class_name, input_quantizer_of, inputs_of, matrices_of, multiplicity

__all__ = ["Recorder"]

FUNCTIONS: dict[object, str] = {
    torch.nn.functional.silu: "silu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.nn.functional.sigmoid: "sigmoid",
}
"""Activation functions of which there are operations."""
READOUTS = ("LinearReadoutBlock", "NonLinearReadoutBlock", "NonLinearBiasReadoutBlock")


class Recorder:
    """Writes the operations of a model.

    Args:
        model: a `ScaleShiftMACE` in float32 or float64 on the CPU.
        layers: the engine's, of that model.
        embedding: features of each species before the first layer, (species, channels); None where they depend on more
            than the species, and each call gives what the first layer makes of them (`gaq_mace.engine.starts`).
        parts: whether the program is for parts of space.
        species: those of the model's species that the program knows, (kept,), int64; None for all.

    Attributes:
        widths: numbers of an atom's features after each layer, which a call can give.
        recorded: the program.

    Raises:
        Unsupported: for layers and read-outs of which there are no operations.
    """

    def __init__(
        self,
        model: AnyModule,
        layers: Sequence[AnyModule],
        embedding: Tensor | None,
        parts: bool,
        species: Tensor | None = None,
    ) -> None:
        scale = torch.atleast_1d(model.scale_shift.scale)
        dtype = next(model.parameters()).dtype
        self.builder = Builder(dtype, scale, torch.atleast_1d(model.scale_shift.shift), parts)
        self.every = torch.arange(len(model.atomic_numbers))
        self.species = self.every if species is None else species
        if hasattr(model, "pair_repulsion"):
            self.builder.repulsion(_repulsion(model, self.species))
        if any(layer.radial is not None and layer.radial.transformed for layer in layers):
            self.builder.transform(_transform(model, self.species))
        self.widths: list[int] = []
        features: list[Value] = []
        for layer in layers:
            features.append(self._layer(layer, embedding, features[-1] if features else None))
            rows, channels = layer.out_rows, layer.round_out.channels
            self.builder.export(features[-1], channels, [r.stop - r.start for r in rows])
            self.widths.append(rows[-1].stop * channels)
        for number, readout in enumerate(model.readouts):
            which = -1 if len(model.readouts) == 1 else number
            self._readout(readout, number, features[which], self.widths[which])
        self.recorded = self.builder.record()

    # -- layers --

    def _layer(self, layer: AnyModule, embedding: Tensor | None, features: Value | None) -> Value:
        """Operations of one layer; `features` is None for the first."""
        if type(layer) not in (AgnosticLayer, NonLinearLayer):
            raise Unsupported("an interaction block computes attention")
        if layer.radial is None:
            raise Unsupported("hidden layers of a radial network are rounded, so that no table can hold them")
        if type(layer) is AgnosticLayer and layer.reads_edges:
            raise Unsupported("densities of edges are rounded")
        x, sc = (self._non_linear if type(layer) is NonLinearLayer else self._agnostic)(layer, embedding, features)
        of_species = slice(None) if layer.agnostic else self.species
        x = self.builder.contraction(x, layer.polynomial, layer.contraction_coefficients[of_species])
        x = self._mix(layer, layer.final, x, sc if layer.use_sc else None)
        return self._round(x, layer.round_out)

    def _agnostic(
        self, layer: AnyModule, embedding: Tensor | None, features: Value | None
    ) -> tuple[Value, Value | None]:
        """An `AgnosticLayer` before the contraction, and what is added after it."""
        builder, sc = self.builder, None
        if features is None:
            sent, *kept = self._start(layer, embedding)
            sc = kept[0] if kept else None
        else:
            if layer.residual:
                sc = self._skip(layer, features)
            sent = builder.exchange(self._mix(layer, layer.up, features))
        x = builder.convolution(sent, layer.problem.rows_out, layer.problem.channels, layer.radial.transformed)
        x = self._mixed_messages(layer, x)
        if layer.radial.density is not None:
            x = builder.divide_by_density(x)
        return (x, sc) if layer.residual else (self._skip(layer, x), None)

    def _non_linear(self, layer: AnyModule, embedding: Tensor | None, features: Value | None) -> tuple[Value, Value]:
        """A `NonLinearLayer` before the contraction, and what is added after it."""
        builder = self.builder
        if features is None:
            sent, sc, kept = self._start(layer, embedding)
        else:
            sc = self._mix(layer, layer.skip, features)
            x = self._mix(layer, layer.up, features)
            kept = self._mix(layer, layer.residual, x)
            sent = builder.exchange(x)
        x = builder.convolution(sent, layer.problem.rows_out, layer.problem.channels)
        x = builder.divide_by_density(self._mixed_messages(layer, x), float(layer.alpha), float(layer.beta))
        x = self._gate(layer, builder.add(x, kept))
        return self._mix(layer, layer.second, x), sc

    def _start(self, layer: AnyModule, embedding: Tensor | None) -> list[Value]:
        """What the first layer makes of the features of atoms before its messages: what is sent comes first."""
        if embedding is None:
            # The widths alone are read of what a layer makes of any features.
            one = torch.zeros(1, 1, layer.up.round.channels, dtype=self.builder.dtype)
            given = layer.before_messages(one, alone(self.every[:1]))
            return [self.builder.given(rows.shape[1]) for rows in given]
        with torch.no_grad():
            rows = layer.before_messages(embedding[:, None], alone(self.every))
        return [self.builder.gather(of[self.species], of_senders=number == 0) for number, of in enumerate(rows)]

    def _gate(self, layer: AnyModule, x: Value) -> Value:
        """The gate of a `NonLinearLayer`, whose first block holds scalars, then gates."""
        degrees, channels = layer.problem.groups, layer.second.round.channels
        functions = []
        for function in (layer.scalar_activation, layer.gate_activation):
            kind = FUNCTIONS.get(function.function)
            if kind is None:
                raise Unsupported("a gate has an activation function of its own")
            functions.append((kind, function.factor))
        pieces, features, out = [Gated(channels, 0, 0, *functions[0])], len(degrees) * channels, channels
        for number, l in enumerate(degrees[1:], start=1):  # noqa: E741
            pieces.append(Gated(channels, number * channels, out, *functions[1], 2 * l + 1, features))
            features += (2 * l + 1) * channels
            out += (2 * l + 1) * channels
        return self.builder.gate(x, out, pieces)

    def _round(self, x: Value, rounder: Rounder) -> Value:
        if rounder.quantizer is None:
            return x
        if rounder.plan is None:
            raise Unsupported("the kernels do not round as a quantizer of the model does")
        return self.builder.round(x, rounder.plan)

    def _mix(self, layer: AnyModule, mixing: Mixing, x: Value, onto: Value | None = None) -> Value:
        x = self._round(x, mixing.round)
        width_in = mixing.rows_in[-1].stop * mixing.round.channels
        written, width = _written([rows.stop - rows.start for rows in mixing.rows_out], mixing.channels)
        blocks = [
            (
                _rows(mixing.rows_in[i_in], mixing.round.channels, width_in),
                written[out],
                getattr(layer, f"{mixing.name}_{out}"),
            )
            for out, i_in in mixing.inputs.items()
        ]
        return self.builder.linear(x, width, blocks, onto, full=len(blocks) == len(mixing.rows_out))

    def _skip(self, layer: AnyModule, x: Value) -> Value:
        x = self._round(x, layer.round_skip)
        channels = layer.round_skip.channels
        width_in, width = layer.skip_rows_in[-1].stop * channels, layer.skip_rows[-1].stop * layer.skip_channels
        blocks = [
            (
                _rows(layer.skip_rows_in[i_in], channels, width_in),
                _rows(layer.skip_rows[out], layer.skip_channels, width),
                self._of_species(getattr(layer, f"skip_{out}")),
            )
            for out, i_in in layer.skip_inputs.items()
        ]
        return self.builder.linear(x, width, blocks, full=len(blocks) == len(layer.skip_rows))

    def _of_species(self, matrix: Tensor) -> Tensor:
        """The part of a matrix that belongs to the program's species; all where it is the same for each."""
        return matrix[self.species] if matrix.dim() == 3 else matrix

    def _mixed_messages(self, layer: AnyModule, x: Value) -> Value:
        """The linear layer that mixes the paths of messages."""
        if layer.message_quantizer is not None:
            if layer.message_plan is None:
                raise Unsupported("the kernels do not round messages as the model does")
            x = self.builder.round(x, layer.message_plan, in_place=True)
        problem, rows = layer.problem, layer.problem.group_rows()
        matrices = [getattr(layer, f"linear_{group}") for group in range(len(problem.groups))]
        components = [2 * l + 1 for l in problem.groups]  # noqa: E741
        written, width = _written(components, [matrix.shape[1] for matrix in matrices])
        blocks = []
        for group, (d, matrix) in enumerate(zip(components, matrices, strict=True)):
            length = matrix.shape[0]
            read = View(d, d * length, length, scaled_offset=sum(rows[:group]) * problem.channels)
            blocks.append((read, written[group], matrix))
        return self.builder.linear(x, width, blocks)

    # -- read-outs --

    def _readout(self, readout: AnyModule, number: int, x: Value, width: int) -> None:
        path = f"readouts.{number}"
        if class_name(readout) not in READOUTS:
            raise Unsupported(f"{path} is a {class_name(readout)}")
        if class_name(readout) == "LinearReadoutBlock":
            return self.builder.energy(self._scalars(readout.linear, path, x, width))
        (act,) = readout.non_linearity.acts
        kind = FUNCTIONS.get(getattr(act, "f", None))
        if kind is None:
            raise Unsupported(f"{path} has an activation function of its own")
        hidden = [readout.linear_1]
        if class_name(readout) == "NonLinearBiasReadoutBlock":
            hidden.append(readout.linear_mid)
        for linear in hidden:
            x = self._scalars(linear, path, x, width)
            width = x.memory.width
            x = self.builder.activation(x, kind, float(act.cst), int(getattr(readout, "num_heads", 1)))
        return self.builder.energy(self._scalars(readout.linear_2, path, x, width))

    def _scalars(self, linear: AnyModule, path: str, x: Value, width: int) -> Value:
        """A linear layer from features to scalars."""
        (block,) = inputs_of(linear)[0]
        channels = multiplicity(linear.irreps_in, f"inputs of {path}")
        if block != 0 or linear.irreps_in[0].ir.l != 0 or linear.irreps_in.dim != width:
            raise Unsupported(f"{path} reads other features than the first scalars")
        x = self._round(x, Rounder(input_quantizer_of(linear), linear.irreps_in, channels))
        matrix, bias = matrices_of(linear, biased=True)[0], linear.bias
        onto = self.builder.repeated(bias) if bias.numel() else None
        return self.builder.linear(x, matrix.shape[1], [(View(1, width, 0), View(1, matrix.shape[1], 0), matrix)], onto)


def _written(components: Sequence[int], channels: Sequence[int]) -> tuple[list[View], int]:
    """Views of blocks of features one after the other, and the width of all."""
    sizes = [d * c for d, c in zip(components, channels, strict=True)]
    width = sum(sizes)
    views = [View(d, width, c, sum(sizes[:i])) for i, (d, c) in enumerate(zip(components, channels, strict=True))]
    return views, width


def _rows(rows: slice, channels: int, width: int) -> View:
    """View of a block's rows in features of a width."""
    return View(rows.stop - rows.start, width, channels, rows.start * channels)


def _transform(model: AnyModule, species: Tensor) -> Transform:
    """The transform of distances between some species of a model.

    Raises:
        Unsupported: for a transform of which there is no operation.
    """
    embedding = model.radial_embedding
    transform, cutoff = embedding.distance_transform, embedding.cutoff_fn
    kinds = {"AgnesiTransform": ("agnesi", ("q", "p", "a"), 0.5), "SoftTransform": ("soft", ("alpha",), 1.0)}
    if class_name(transform) not in kinds or class_name(cutoff) != "PolynomialCutoff":
        raise Unsupported(f"distances are transformed by a {class_name(transform)}")
    kind, names, factor = kinds[class_name(transform)]
    radii = transform.covalent_radii.detach().double().cpu()[model.atomic_numbers.cpu()[species]]
    parameters = tuple(float(getattr(transform, name)) for name in names)
    return Transform(kind, parameters, factor * radii, float(cutoff.r_max), int(cutoff.p))


def _repulsion(model: AnyModule, species: Tensor) -> Repulsion:
    """The repulsion of nuclei of some species of a model; the numbers are those of MACE's `ZBLBasis`."""
    zbl, numbers = model.pair_repulsion_fn, model.atomic_numbers.cpu()[species]
    powers = numbers.double() ** float(zbl.a_exp)
    radii = zbl.covalent_radii.double().cpu()[numbers]
    return Repulsion(
        zbl.c.double(),
        14.3996 * numbers[:, None] * numbers[None],  # of integers: in torch's default dtype, as there
        (powers[:, None] + powers[None]) / (float(zbl.a_prefactor) * 0.529),
        radii[:, None] + radii[None],
        int(zbl.p),
    )
