"""MACE through the fused kernels: what a converted model runs by default at inference, on the CPU and on NVIDIA cards.

An `Engine` is built from a model (quantized and converted, or float) and computes the same function: the same weights,
the same rounding of features, float32 or float64 arithmetic as the model has it. Per-edge features are never written
to memory (`gaq.kernels.convolution`), the symmetric contraction is a folded polynomial (`gaq.kernels.contraction`), and
the radial network is a table (`gaq_mace.radial_tables`). What surrounds the interactions is MACE's own code.

Atoms are sorted by species within a call, so that weights of a species act on a slice.

On a card nothing in a step waits for it but the look at the species, and that only where they are not given in the same
tensor as before. Small steps are replayed as CUDA graphs (`gaq.kernels.gpu.graphs`), with the edges padded by some
that lie beyond the cutoff.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from e3nn import o3
from mace.modules.utils import get_outputs, prepare_graph
from mace.tools.scatter import scatter_sum
from torch import Tensor

from gaq.kernels import contraction, convolution, gpu, harmonics, linear, native, radial, rounding
from gaq.kernels.gpu.graphs import Graphs, Outputs, bucket
from gaq.packing import PLANES_MAX
from gaq.quantized import state_of
from gaq.quantizers.features import FeatureQuantizer
from gaq.quantizers.weights import QuantizedTensor
from gaq_mace.modules import original_class
from gaq_mace.radial_tables import RadialTables

__all__ = ["Engine", "Unsupported", "disabled", "engine_for", "engine_of", "give_up", "serves"]

INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)
COMPOSITIONS = 8
"""Orders of atoms that are kept."""
MOST_SPECIES = 8
"""On a card, radial tables for all pairs of the species that are there, up to so many species; for more the pairs that
edges join are looked up in every step."""
INPUTS = ("positions", "edge_index", "shifts", "unit_shifts", "cell", "batch", "node_attrs", "head", "ptr")
"""What a step reads."""


class Unsupported(ValueError):
    """The engine cannot compute this model; the message says which part. The reference path can."""


def _class_name(module: torch.nn.Module) -> str:
    return original_class(module).__name__


def _multiplicity(irreps: o3.Irreps, what: str) -> int:
    counts = {mul for mul, _ in irreps}
    if len(counts) != 1:
        raise Unsupported(f"{what} have different multiplicities: {irreps}")
    return counts.pop()


def _identity_or(module: torch.nn.Module) -> FeatureQuantizer | None:
    quantizer = getattr(module, "input_quantizer", None)
    return quantizer if isinstance(quantizer, FeatureQuantizer) else None


def _matrices(linear: o3.Linear, weight: Tensor | None = None, scaled: bool = True) -> dict[int, Tensor]:
    """For each output block the matrix (sum of input multiplicities, output multiplicity) and, in order, its inputs.

    Args:
        linear: whose.
        weight: something else of the layout of its weight.
        scaled: whether the normalisation of paths is multiplied in.
    """
    if linear.bias.numel():
        raise Unsupported("a linear layer has a bias")
    found: dict[int, list[Tensor]] = {}
    offset = 0
    weight = (linear.weight if weight is None else weight).detach().double().flatten()
    for ins in linear.instructions:
        rows, columns = ins.path_shape
        block = weight[offset : offset + rows * columns].view(rows, columns)
        offset += rows * columns
        found.setdefault(ins.i_out, []).append(block * ins.path_weight if scaled else block)
    return {out: torch.cat(blocks) for out, blocks in found.items()}


def _inputs(linear: o3.Linear) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for ins in linear.instructions:
        found.setdefault(ins.i_out, []).append(ins.i_in)
    return found


def _species_matrices(
    product: o3.FullyConnectedTensorProduct, weight: Tensor | None = None, scaled: bool = True
) -> dict[int, tuple[int, Tensor]]:
    """For each output block its input block and the matrices (species, in, out) of a product with one-hot species."""
    found: dict[int, tuple[int, Tensor]] = {}
    offset = 0
    weight = (product.weight if weight is None else weight).detach().double().flatten()
    for ins in product.instructions:
        shape = tuple(ins.path_shape)
        l = product.irreps_out[ins.i_out].ir.l  # noqa: E741
        size = shape[0] * shape[1] * shape[2]
        factor = ins.path_weight / (2 * l + 1) ** 0.5 if scaled else 1.0
        block = weight[offset : offset + size].view(shape) * factor
        offset += size
        if ins.i_out in found:
            raise Unsupported("several input blocks of a species product share an output block")
        found[ins.i_out] = (ins.i_in1, block.permute(1, 0, 2).contiguous())
    return found


@dataclass(frozen=True)
class _Integers:
    """A matrix as `gaq.kernels.linear.linear` takes it: codes (in, out), int8, and scales (groups, out)."""

    codes: Tensor
    scale: Tensor
    group_size: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, device: torch.device) -> _Integers | None:
        """From codes and the scale of each of them, (in, out); None where the operation cannot take them."""
        if float(codes.abs().max()) > 127:
            return None
        for size in (0, 128, 64, 32):
            groups = scales.split(size or scales.shape[0])
            if all(bool((group == group[0]).all()) for group in groups):
                scale = torch.stack([group[0] for group in groups])
                return cls(codes.to(device, torch.int8), scale.to(device, torch.float32), size)
        return None

    def __call__(self, x: Tensor) -> Tensor:
        return linear.linear(x, self.codes, self.scale, None, True, self.group_size)


def _rounds_all(quantizer: FeatureQuantizer | None) -> bool:
    """Whether all that enters a layer is rounded to 16 bits, so that doing so again changes little."""
    if quantizer is None or quantizer.scalar_top < PLANES_MAX or not quantizer.passes_through:
        return False
    return quantizer.round_scalars and (quantizer.round_vectors or all(d == 1 for d in quantizer.dimensions))


def _rows(irreps: o3.Irreps) -> list[slice]:
    """Where the components of each block lie in the layout (atoms, rows, channels)."""
    found, start = [], 0
    for _, ir in irreps:
        found.append(slice(start, start + ir.dim))
        start += ir.dim
    return found


def _to_mul_ir(x: Tensor, rows: list[slice]) -> Tensor:
    """(atoms, rows, channels) to e3nn's layout (atoms, irreps.dim)."""
    return torch.cat([x[:, r].transpose(1, 2).reshape(x.shape[0], -1) for r in rows], dim=1)


def _from_mul_ir(x: Tensor, rows: list[slice], channels: int) -> Tensor:
    parts, start = [], 0
    for r in rows:
        size = (r.stop - r.start) * channels
        parts.append(x[:, start : start + size].view(x.shape[0], channels, -1).transpose(1, 2))
        start += size
    return torch.cat(parts, dim=1)


class _Rounder:
    """A quantizer of features in e3nn's layout, applied to those of the kernels.

    Args:
        quantizer: as the model has it, or None.
        irreps: of its layout.
        channels: of every block.
    """

    def __init__(self, quantizer: FeatureQuantizer | None, irreps: o3.Irreps, channels: int) -> None:
        self.quantizer = quantizer
        self.rows = _rows(irreps)
        total = self.rows[-1].stop if self.rows else 0
        pieces = [
            rounding.Piece(r.stop - r.start, channels, r.start * channels, total * channels, channels)
            for r in self.rows
        ]
        self.plan = None if quantizer is None else rounding.plan(quantizer, pieces)

    def __call__(self, x: Tensor) -> Tensor:
        """(atoms, rows, channels), rounded."""
        if self.quantizer is None:
            return x
        if self.plan is not None:
            return rounding.round_features(x, self.plan, x.shape[0])
        return _from_mul_ir(self.quantizer(_to_mul_ir(x, self.rows)), self.rows, x.shape[2])


Knots = tuple[Tensor, "Tensor | None"]
"""Radial tables of a layer, and those of its density."""


@dataclass(frozen=True)
class _Composition:
    """Which atoms a structure has, and in which order: what of a step does not change while atoms only move.

    Attributes:
        key: the species of the atoms, as bytes.
        species: number of each atom's species, (atoms,), as the structure has them.
        by_species: atoms sorted by species, (atoms,); place: where each atom stands in that order.
        ordered: species in that order.
        bounds: species, first atom and end of each slice of equal species.
        tables: number of the radial table of a pair of species, (species, species); None where there is one table, or
            the edges have to be looked at.
        knots: the tables of each layer; None where the edges have to be looked at.
    """

    key: bytes
    species: Tensor
    by_species: Tensor
    place: Tensor
    ordered: Tensor
    bounds: list[tuple[int, int, int]]
    tables: Tensor | None
    knots: list[Knots] | None


class _Layer(torch.nn.Module):
    """One interaction and product of the model."""

    # What is read from the model and never changed; tensors lie where the model's do.
    contraction_coefficients: Tensor

    def __init__(self, model: Any, number: int, sh: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        block, product = model.interactions[number], model.products[number]
        name = _class_name(block)
        if name not in INTERACTIONS:
            raise Unsupported(f"interactions.{number} is a {name}; served are {', '.join(INTERACTIONS)}")
        if _identity_or(block) is not None:
            raise Unsupported(f"the density weights of interactions.{number} are rounded")
        if hasattr(block, "conv_fusion"):
            raise Unsupported(f"interactions.{number} brings a convolution kernel of its own")
        self.residual = "Residual" in name
        self.first = number == 0
        tp = block.conv_tp
        self.channels = _multiplicity(tp.irreps_in1, f"input features of interactions.{number}")
        _multiplicity(tp.irreps_out, f"messages of interactions.{number}")
        if any(ins.connection_mode != "uvu" or not ins.has_weight for ins in tp.instructions):
            raise Unsupported(f"interactions.{number}.conv_tp is not a channel-wise product")
        if [ir for _, ir in tp.irreps_in2] != [ir for _, ir in o3.Irreps.spherical_harmonics(len(sh) - 1)]:
            raise Unsupported(f"the edge attributes {tp.irreps_in2} are not plain spherical harmonics")

        linear_in = _inputs(block.linear)
        matrices = _matrices(block.linear)
        owner = {i_in: out for out, ins in linear_in.items() for i_in in ins}
        self.target = block.linear.irreps_out
        paths = []
        for ins in tp.instructions:
            l1, l2 = tp.irreps_in1[ins.i_in1].ir.l, tp.irreps_in2[ins.i_in2].ir.l
            l3 = tp.irreps_out[ins.i_out].ir.l
            if ins.i_out not in owner:
                raise Unsupported(f"a path of interactions.{number}.conv_tp is not read")
            coefficients = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * ins.path_weight
            paths.append(convolution.Path(ins.i_in1, l2, owner[ins.i_out], coefficients))
        self.problem = convolution.ConvolutionProblem(
            self.channels,
            tuple(ir.l for _, ir in tp.irreps_in1),
            tuple(ir.l for _, ir in self.target),
            tuple(paths),
            tuple(sh),
            float(model.r_max),
        )
        self.path_blocks = [ins.i_out for ins in tp.instructions]  # of the e3nn layout of messages
        self.message_rows = _rows(tp.irreps_out)
        self.messages = tp.irreps_out
        for group in range(len(self.target)):
            own = [self.path_blocks[p] for p in self.problem.group_paths(group)]
            if not own or own != linear_in.get(group):
                raise Unsupported(f"interactions.{number}.linear reads its inputs in an order of its own")
            matrix = matrices[group]
            if not hasattr(block, "density_fn"):
                matrix = matrix / float(block.avg_num_neighbors)
            self.register_buffer(f"linear_{group}", matrix.to(dtype))
        self.message_quantizer = _identity_or(block.linear)
        self.message_plan = self._plan_messages()

        tolerance = radial.TOLERANCE if dtype == torch.float32 else radial.DOUBLE_TOLERANCE
        try:
            self.radial = RadialTables(model, block, len(paths), self.channels, tolerance)
        except ValueError as error:
            raise Unsupported(str(error)) from error

        up = _matrices(block.linear_up)
        for out, inputs in _inputs(block.linear_up).items():
            if inputs != [out]:
                raise Unsupported(f"interactions.{number}.linear_up mixes blocks")
            self.register_buffer(f"up_{out}", up[out].to(dtype))
        if len(up) != len(tp.irreps_in1):
            raise Unsupported(f"interactions.{number}.linear_up leaves a block empty")
        self.in_rows = _rows(block.linear_up.irreps_in)
        self.round_up = _Rounder(_identity_or(block.linear_up), block.linear_up.irreps_in, self.channels)

        skip = _species_matrices(block.skip_tp)
        self.skip_inputs = {out: i_in for out, (i_in, _) in skip.items()}
        for out, (_, matrix) in skip.items():
            self.register_buffer(f"skip_{out}", matrix.to(dtype))
        self.round_skip = _Rounder(_identity_or(block.skip_tp), block.skip_tp.irreps_in1, self.channels)
        self.skip_rows = _rows(block.skip_tp.irreps_out)
        self.target_rows = _rows(self.target)

        self._fold(product, dtype)
        self.use_sc = bool(product.use_sc)
        self.agnostic = bool(getattr(product, "use_agnostic_product", False))
        self.out_irreps = product.linear.irreps_out
        self.out_rows = _rows(self.out_irreps)
        final = _matrices(product.linear)
        for out, inputs in _inputs(product.linear).items():
            if inputs != [out]:
                raise Unsupported(f"products.{number}.linear mixes blocks")
            self.register_buffer(f"final_{out}", final[out].to(dtype))
        self.round_final = _Rounder(_identity_or(product.linear), self.out_irreps, self.channels)
        self.round_out = _Rounder(_identity_or(product), self.out_irreps, self.channels)
        self.by_integers: dict[str, _Integers] = {}

    def _fold(self, product: Any, dtype: torch.dtype) -> None:
        symmetric = product.symmetric_contractions
        rows_in = sum(ir.dim for _, ir in self.target)
        outputs = symmetric.irreps_out
        tensors = []
        for own, rows in zip(symmetric.contractions, _rows(outputs), strict=True):
            for degree in range(own.correlation, 0, -1):
                coupling = own.U_tensors(degree)
                if coupling.dim() == degree + 1:
                    coupling = coupling[None]  # a scalar output has no axis of its own
                weights = own.weights_max if degree == own.correlation else own.weights[own.correlation - 1 - degree]
                if bool((weights != 0).any()):
                    # Thousands of small steps, which a card would take one launch each.
                    tensors.append((coupling.cpu(), weights.cpu(), rows.start))
        self.polynomial, coefficients = contraction.fold(tensors, rows_in, sum(ir.dim for _, ir in outputs))
        self.register_buffer("contraction_coefficients", coefficients.to(own.weights_max.device, dtype).contiguous())

    def integers(self, name: str, own: Any, found: QuantizedTensor, divisor: float) -> None:
        """Take the products of one of the layers through integers where its codes allow it.

        Args:
            name: of its matrices here: ``linear``, ``up``, ``skip`` or ``final``.
            own: the layer, a module of the model.
            found: its codes.
            divisor: what the matrices are divided by.
        """
        index = found.layout.scale_index(found.granularity, found.group_size)
        scales = found.scale.double().cpu()[index] / divisor
        device = self.contraction_coefficients.device
        if name == "skip":
            sizes = _species_matrices(own, scales)
            for out, (_, every) in _species_matrices(own, found.codes, scaled=False).items():
                for z, (matrix, size) in enumerate(zip(every, sizes[out][1], strict=True)):
                    self._take(f"skip_{out}.{z}", _Integers.of(matrix, size, device))
            return
        steps = _matrices(own, scales)
        for out, matrix in _matrices(own, found.codes, scaled=False).items():
            self._take(f"{name}_{out}", _Integers.of(matrix, steps[out], device))

    def _take(self, name: str, integers: _Integers | None) -> None:
        if integers is not None:
            self.by_integers[name] = integers

    # -- evaluation --

    def _product(self, rows: Tensor, name: str, species: int | None = None) -> Tensor:
        """(n, in) by a matrix of the layer, of a species where it has several."""
        integers = self.by_integers.get(name if species is None else f"{name}.{species}")
        if integers is not None:
            return integers(rows)
        matrix = getattr(self, name)
        return rows @ (matrix if species is None else matrix[species])

    def _mixed(self, x: Tensor, name: str, species: int | None = None) -> Tensor:
        """(atoms, rows, in) by a matrix of the layer.

        As one product of all rows: torch makes one an atom of rows that are part of a longer layout, at half the speed.
        """
        return self._product(x.reshape(-1, x.shape[2]), name, species).view(x.shape[0], x.shape[1], -1)

    def _species_product(self, x: Tensor, name: str, own: _Composition) -> Tensor:
        """(atoms, rows, in) by the matrix of each atom's species."""
        if len(own.bounds) == 1:
            return self._mixed(x, name, own.bounds[0][0])
        return torch.cat([self._mixed(x[a:b], name, z) for z, a, b in own.bounds])

    def _plan_messages(self) -> rounding.Plan | None:
        if self.message_quantizer is None:
            return None
        rows = self.problem.group_rows()
        pieces: dict[int, rounding.Piece] = {}
        for group, l in enumerate(self.problem.groups):  # noqa: E741
            paths = self.problem.group_paths(group)
            for k, path in enumerate(paths):
                pieces[self.path_blocks[path]] = rounding.Piece(
                    2 * l + 1,
                    self.channels,
                    k * self.channels,
                    rows[group] * self.channels,
                    len(paths) * self.channels,
                    sum(rows[:group]) * self.channels,
                )
        return rounding.plan(self.message_quantizer, [pieces[i] for i in range(len(pieces))])

    def _round_messages(self, groups: list[Tensor], atoms: int) -> list[Tensor]:
        if self.message_quantizer is None:
            return groups
        components = [2 * l + 1 for l in self.problem.groups]  # noqa: E741
        # (atoms, components, paths, channels) of each group; e3nn has one block a path, components last.
        views = [g.view(atoms, d, -1, self.channels) for g, d in zip(groups, components, strict=True)]
        blocks: dict[int, Tensor] = {}
        for group in range(len(groups)):
            for k, path in enumerate(self.problem.group_paths(group)):
                blocks[self.path_blocks[path]] = views[group][:, :, k]
        flat = [blocks[i].transpose(1, 2).reshape(atoms, -1) for i in range(len(blocks))]
        rounded = self.message_quantizer(torch.cat(flat, dim=1)).split([f.shape[1] for f in flat], dim=1)
        found = []
        for group, d in enumerate(components):
            own = [
                rounded[self.path_blocks[p]].view(atoms, self.channels, d).transpose(1, 2)
                for p in self.problem.group_paths(group)
            ]
            found.append(torch.cat(own, dim=2).reshape(atoms * d, -1))
        return found

    def _skip(self, x: Tensor, rows_in: list[slice], rows_out: list[slice], own: _Composition) -> Tensor:
        """The product with the species, (atoms, rows, channels)."""
        parts = []
        for out, rows in enumerate(rows_out):
            if out in self.skip_inputs:
                parts.append(self._species_product(x[:, rows_in[self.skip_inputs[out]]], f"skip_{out}", own))
            else:  # nothing of this degree goes in
                parts.append(x.new_zeros(x.shape[0], rows.stop - rows.start, self.channels))
        return torch.cat(parts, dim=1)

    def tables(self, pairs: tuple[int, ...], like: Tensor) -> Knots:
        """Radial tables of some pairs of species.

        Raises:
            Unsupported: if one cannot be made.
        """
        try:
            return self.radial.tables(pairs, like.dtype, like.device)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def _density(self, knots: Tensor, graph: convolution.Graph, vectors: Tensor, atoms: int) -> Tensor:
        """What the message of each atom is divided by, less one, (atoms,)."""
        lengths = vectors.norm(dim=-1)
        if graph.tables is None:
            edge = radial.evaluate(knots, lengths, self.problem.r_max)
        else:
            edge = radial.evaluate_several(knots, lengths, self.problem.r_max, graph.tables, 1)
        return edge.new_zeros(atoms).index_add(0, graph.receiver, edge[:, 0, 0])

    def forward(
        self, features: Tensor, graph: convolution.Graph, vectors: Tensor, own: _Composition, tables: Knots
    ) -> Tensor:
        """Node features of the next layer, (atoms, rows, channels)."""
        atoms = features.shape[0]
        sc = None
        if self.residual:
            x = self.round_skip(features)
            sc = self._skip(x, self.in_rows, self.skip_rows, own)
        x = self.round_up(features)
        x = torch.cat([self._mixed(x[:, r], f"up_{i}") for i, r in enumerate(self.in_rows)], dim=1)
        knots, density_knots = tables
        message = convolution.convolution(self.problem, graph, x, vectors, knots)
        if self.message_plan is not None:
            message = rounding.round_features(message, self.message_plan, atoms)
        groups = self.problem.split(message, atoms)
        if self.message_plan is None:
            groups = self._round_messages(groups, atoms)
        mixed = [
            self._product(g, f"linear_{i}").view(atoms, 2 * l + 1, -1)
            for i, (g, l) in enumerate(zip(groups, self.problem.groups, strict=True))  # noqa: E741
        ]
        x = torch.cat(mixed, dim=1)
        if density_knots is not None:
            x = x / (self._density(density_knots, graph, vectors, atoms) + 1)[:, None, None]
        if not self.residual:
            x = self.round_skip(x)
            x = self._skip(x, self.target_rows, self.skip_rows, own)
        species = torch.zeros_like(own.ordered) if self.agnostic else own.ordered
        x = contraction.contraction(self.polynomial, x, species, self.contraction_coefficients)
        x = self.round_final(x)
        x = torch.cat([self._mixed(x[:, r], f"final_{i}") for i, r in enumerate(self.out_rows)], dim=1)
        if self.use_sc and sc is not None:
            x = x + sc
        return self.round_out(x)


class Engine(torch.nn.Module):
    """A MACE model as a run of fused kernels.

    Args:
        model: a float or converted `ScaleShiftMACE` on the CPU or a card, in float32 or float64. An engine serves it
            where it lies now.

    Raises:
        Unsupported: for parts the kernels do not serve, and on a card without Triton.
        gaq.kernels.native.CompilerError: where the kernels cannot be built.
    """

    embedding: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        device = next(model.parameters()).device
        if not gpu.chosen(device):
            native.library()
        elif (reason := gpu.why_not()) is not None:
            raise Unsupported(reason)
        state = state_of(model)
        if state is not None and state.status != "converted":
            raise Unsupported("the model is in training: its weights are rounded anew in each call")
        for part in ("joint_embedding", "embedding_readout"):
            if hasattr(model, part):
                raise Unsupported(f"the model has a {part}")
        dtype = next(model.parameters()).dtype
        attributes = model.spherical_harmonics
        sh = harmonics.fit(
            lambda d: o3.spherical_harmonics(
                attributes.irreps_out, d, normalize=attributes.normalize, normalization=attributes.normalization
            ),
            attributes.irreps_out.lmax,
        )
        self.layers = torch.nn.ModuleList(_Layer(model, i, sh, dtype) for i in range(len(model.interactions)))
        if _integer_linears() and state is not None and dtype == torch.float32 and gpu.chosen(device):
            self._by_integers(model)
        embedding = _matrices(model.node_embedding.linear)[0]
        self.register_buffer("embedding", embedding.to(dtype))
        self.r_max = float(model.r_max)
        # MACE's own modules, not registered here: they belong to the model.
        self.__dict__["model"] = model
        self.__dict__["quantizers"] = [m for m in model.modules() if isinstance(m, FeatureQuantizer)]
        rest = [model.atomic_energies_fn, model.readouts, model.scale_shift, getattr(model, "pair_repulsion_fn", None)]
        self.rest = [
            (held, name)
            for part in rest
            if part is not None
            for module in _python_modules(part)
            for held in (module._parameters, module._buffers)
            for name in held
        ]
        self.graphs = Graphs()
        self.compositions: OrderedDict[tuple[bytes, torch.device], _Composition] = OrderedDict()
        self.last: tuple[weakref.ref[Tensor], int, _Composition] | None = None

    def _by_integers(self, model: Any) -> None:
        from gaq_mace.model import quantized_weights

        codes = quantized_weights(model)
        before: FeatureQuantizer | None = None
        for number, own in enumerate(self.layers):
            layer: Any = own
            block, product = model.interactions[number], model.products[number]
            parts = (
                ("linear", f"interactions.{number}.linear", block.linear),
                ("up", f"interactions.{number}.linear_up", block.linear_up),
                ("skip", f"interactions.{number}.skip_tp", block.skip_tp),
                ("final", f"products.{number}.linear", product.linear),
            )
            for name, path, module in parts:
                reads = _identity_or(module)
                if reads is None and (name == "up" or (name == "skip" and layer.residual)):
                    # Node features are rounded once, where the layer before gives them out.
                    reads = before
                weight = codes.get(f"{path}.weight")
                if weight is not None and _rounds_all(reads):
                    mean = name == "linear" and not hasattr(block, "density_fn")
                    layer.integers(name, module, weight, float(block.avg_num_neighbors) if mean else 1.0)
            before = _identity_or(product)

    def rounds_as_deployed(self) -> bool:
        """Whether the model's quantizers are all switched on, as they were when the engine was made."""
        return all(
            q.scalars_enabled and q.vectors_enabled and q.vector_range_factor == 1.0 and not q.observing
            for q in self.__dict__["quantizers"]
        )

    def _composition(self, attributes: Tensor) -> _Composition:
        """What is known of a structure from its atoms, (atoms, species) as one-hot vectors."""
        known = not attributes.is_inference()
        if known and self.last is not None and self.last[0]() is attributes and self.last[1] == attributes._version:
            return self.last[2]
        species = attributes.argmax(dim=1)
        # Here the host waits for the card.
        listed = species.cpu().numpy()
        key = listed.tobytes(), attributes.device
        own = self.compositions.get(key)
        if own is None:
            own = self.compositions[key] = self._sorted(key[0], species, np.bincount(listed).tolist(), attributes)
            while len(self.compositions) > COMPOSITIONS:
                self.compositions.popitem(last=False)
        self.compositions.move_to_end(key)
        self.last = (weakref.ref(attributes), attributes._version, own) if known else None
        return own

    def _sorted(self, key: bytes, species: Tensor, counts: list[int], like: Tensor) -> _Composition:
        by_species = torch.argsort(species, stable=True)
        place = torch.empty_like(by_species)
        place[by_species] = torch.arange(by_species.numel(), device=place.device)
        bounds, start = [], 0
        for z, count in enumerate(counts):
            if count:
                bounds.append((z, start, start + count))
            start += count
        radial_tables: Any = self.layers[0].radial
        pairs: tuple[int, ...] | None = (0,)
        tables = None
        if radial_tables.by_species:
            present = [z for z, _, _ in bounds]
            pairs = None
            # On the CPU nothing waits, and only tables of pairs that are met need be made.
            if gpu.chosen(species.device) and 0 < len(present) <= MOST_SPECIES:
                pairs = tuple(sorted({radial_tables.code(a, b) for a in present for b in present}))
                numbers = torch.zeros(radial_tables.elements, radial_tables.elements, dtype=torch.int64)
                for first in present:
                    for second in present:
                        numbers[first, second] = pairs.index(radial_tables.code(first, second))
                tables = numbers.to(species.device)
        layers: Any = self.layers
        knots = None if pairs is None else [layer.tables(pairs, like) for layer in layers]
        return _Composition(key, species, by_species, place, species[by_species], bounds, tables, knots)

    def _tables(self, own: _Composition, edges: Tensor, like: Tensor) -> tuple[list[Knots], Tensor | None]:
        """The radial tables of each layer, and the number of each edge's; of no interest to most models."""
        if own.knots is not None:
            return own.knots, None if own.tables is None else own.tables[own.species[edges[0]], own.species[edges[1]]]
        radial_tables: Any = self.layers[0].radial
        first, second = own.species[edges[0]], own.species[edges[1]]
        codes = torch.minimum(first, second) * radial_tables.elements + torch.maximum(first, second)
        found, numbers = torch.unique(codes, return_inverse=True)
        # Without edges any table will do.
        pairs = tuple(found.tolist()) or (0,)
        layers: Any = self.layers
        return [layer.tables(pairs, like) for layer in layers], numbers

    def forward(self, data: dict[str, Tensor], **options: bool) -> dict[str, Tensor | None]:
        """What `ScaleShiftMACE.forward` returns, for the same arguments.

        Where the step was replayed as a CUDA graph, the results are without a graph of autograd: the forces have been
        taken.
        """
        own = self._composition(data["node_attrs"])
        replayed = self._replayed(data, own, options)
        return self._step(data, own, options) if replayed is None else replayed

    def _replayed(self, data: dict[str, Tensor], own: _Composition, options: dict[str, bool]) -> Outputs | None:
        """The results by a CUDA graph; None where the step is not one that is recorded."""
        atoms, edges = data["positions"].shape[0], data["edge_index"].shape[1]
        device = data["positions"].device
        given: dict[str, Tensor] = {name: data[name] for name in INPUTS if data.get(name) is not None}
        if own.knots is None or not atoms or not self.graphs.serves(device, edges):
            return None
        # Who differentiates by something else, or further, needs a graph of autograd.
        inner = data.get("displacement") is not None or any(t.grad_fn is not None for t in given.values())
        asked = any(t.requires_grad for name, t in given.items() if name != "positions")
        if inner or asked or not options.get("compute_force", True) or not torch.is_grad_enabled():
            return None
        size = bucket(edges)
        shapes = tuple(
            (name, t.dtype, t.device, size if name in ("edge_index", "shifts", "unit_shifts") else t.shape)
            for name, t in given.items()
        )
        chosen = tuple(sorted(name for name, on in options.items() if on))
        # The stress is computed from the virial afterwards: the determinant of the cell need not be fit for recording.
        stress = options.get("compute_stress", False)
        inside = {
            **options,
            "compute_stress": False,
            "compute_virials": stress or options.get("compute_virials", False),
        }

        def prepare() -> tuple[Any, dict[str, Tensor]]:
            return (lambda held: self._step({k: v.detach() for k, v in held.items()}, own, inside)), padded(given, size)

        # A graph reads what the rest of the model holds where it lies.
        places = tuple(t.data_ptr() for held, name in self.rest if (t := held[name]) is not None)
        key = (own.key, chosen, shapes, places)
        found = self.graphs(key, {**given, "edges": edges}, prepare, device)
        if found is not None and stress:
            found["stress"] = _stress(found["virials"], data["cell"])
        return found

    def _step(self, data: dict[str, Tensor], own: _Composition, options: dict[str, bool]) -> Outputs:
        """A step; where the data have a number of `edges`, those beyond it contribute nothing."""
        model: Any = self.__dict__["model"]
        stress = options.get("compute_stress", False)
        virials = options.get("compute_virials", False)
        context = prepare_graph(
            data,
            compute_virials=virials,
            compute_stress=stress,
            compute_displacement=options.get("compute_displacement", False),
        )
        heads = context.node_heads.to(torch.int64)
        atoms = context.num_atoms_arange
        vectors, lengths = context.vectors, context.lengths
        if "edges" in data:
            vectors = self._beyond(vectors, data["edges"])
            lengths = vectors.norm(dim=-1, keepdim=True)
        batch, graphs = data["batch"], context.num_graphs
        node_e0 = model.atomic_energies_fn(data["node_attrs"])[atoms, heads]
        e0 = scatter_sum(src=node_e0, index=batch, dim=0, dim_size=graphs).to(vectors.dtype)

        edges = own.place[data["edge_index"]]
        knots, tables = self._tables(own, data["edge_index"], vectors)
        graph = convolution.Graph(edges[0], edges[1], tables)

        features = self.embedding[own.ordered][:, None]
        energies, kept = [torch.zeros_like(node_e0)], []
        if hasattr(model, "pair_repulsion"):
            numbers = model.atomic_numbers
            energies = [model.pair_repulsion_fn(lengths, data["node_attrs"], data["edge_index"], numbers)]
        layer: Any
        for layer, own_tables in zip(self.layers, knots, strict=True):
            features = layer(features, graph, vectors, own, own_tables)
            kept.append(_to_mul_ir(features, layer.out_rows)[own.place])
        for i, readout in enumerate(model.readouts):
            read = kept[-1 if len(model.readouts) == 1 else i]
            energies.append(readout(read, heads)[atoms, heads])
        interaction = model.scale_shift(torch.stack(energies, dim=0).sum(dim=0), heads)
        interaction_energy = scatter_sum(interaction, batch, dim=-1, dim_size=graphs)
        total = e0 + interaction_energy
        node_energy = node_e0.clone().double() + interaction.clone().double()
        forces, virial, stresses, hessian, edge_forces = get_outputs(
            energy=interaction_energy,
            positions=context.positions,
            displacement=context.displacement,
            vectors=vectors,
            cell=context.cell,
            training=False,
            compute_force=options.get("compute_force", True),
            compute_virials=virials,
            compute_stress=stress,
            compute_hessian=False,
            compute_edge_forces=False,
        )
        return {
            "energy": total,
            "node_energy": node_energy,
            "interaction_energy": interaction_energy,
            "forces": forces,
            "edge_forces": edge_forces,
            "virials": virial,
            "stress": stresses,
            "atomic_virials": None,
            "atomic_stresses": None,
            "hessian": hessian,
            "displacement": context.displacement,
            "node_feats": torch.cat(kept, dim=-1),
        }

    def _beyond(self, vectors: Tensor, edges: Tensor) -> Tensor:
        """Edge vectors, with those of number `edges` and more so long that nothing is left of them, and no gradient."""
        # Longer than the cutoff, and than the radii of two atoms together, where a pair repulsion ends.
        far = torch.full((), 2.0 * self.r_max + 10.0, dtype=vectors.dtype, device=vectors.device)
        counts = torch.arange(vectors.shape[0], device=vectors.device) < edges
        return torch.where(counts[:, None], vectors, far)


def padded(data: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The data of a step with as many edges as asked for, and the number of those that count as `edges`.

    Each further one joins an atom with itself, all atoms in turn, so that no atom gets many.
    """
    edges, atoms = data["edge_index"].shape[1], data["positions"].shape[0]
    device = data["edge_index"].device
    own = torch.arange(size - edges, device=device) % atoms
    found = {**data, "edge_index": torch.cat([data["edge_index"], own.expand(2, -1)], dim=1)}
    for name in ("shifts", "unit_shifts"):
        if name in data:
            found[name] = torch.nn.functional.pad(data[name], (0, 0, 0, size - edges))
    found["edges"] = torch.full((), edges, dtype=torch.int64, device=device)
    return found


def _stress(virials: Tensor | None, cell: Tensor) -> Tensor:
    """As `mace.modules.utils.compute_forces_virials` has it, (graphs, 3, 3) in eV/Å³."""
    assert virials is not None
    first, second, third = cell.detach().view(-1, 3, 3).unbind(1)
    # Not by a determinant: libraries of linear algebra may wait for the card.
    volume = (torch.linalg.cross(first, second) * third).sum(-1).abs()
    stress = -virials / volume.view(-1, 1, 1)
    return torch.where(torch.abs(stress) < 1e10, stress, torch.zeros_like(stress))


_disabled = False


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context models run through the reference path."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def _integer_linears() -> bool:
    """Whether ``GAQ_LINEAR=int8`` asks for integer products of a model's linear layers on a card.

    Raises:
        ValueError: for a value that is not known.
    """
    wanted = os.environ.get("GAQ_LINEAR", "float")
    if wanted not in ("float", "int8"):
        raise ValueError(f"GAQ_LINEAR: int8, or float as if it were not set, not {wanted!r}")
    return wanted == "int8"


def switched_off() -> bool:
    """Whether the engine is turned off, here or by ``GAQ_ENGINE=0``."""
    return _disabled or os.environ.get("GAQ_ENGINE", "1") == "0"


# MACE asks for a differentiable backward pass in all of these.
_NOT_SERVED = ("compute_hessian", "compute_edge_forces", "compute_atomic_stresses", "lammps_mliap")


def engine_for(model: Any, options: dict[str, Any]) -> Engine | None:
    """The engine a call of a model goes through, or None.

    Only at inference, on the CPU or an NVIDIA card: training needs second derivatives, as do Hessians, and a graph that
    is traced for something else has to consist of operations that are known there. Why a model is not served at all is
    said once, in a warning.
    """
    if options.get("training", False) or any(options.get(name, False) for name in _NOT_SERVED) or switched_off():
        return None
    state = state_of(model)
    if state is None or state.status != "converted" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in (torch.float32, torch.float64):
        return None
    own = engine_of(model)
    return own if own is not None and own.rounds_as_deployed() else None


def serves(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call of a model goes through the engine."""
    return engine_for(model, options) is not None


def _python_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """A module and those within, but the scripted ones: these are e3nn's code, and replaced as a whole if at all."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]


class _Parts:
    """The modules and parameters of a model, to see in a moment whether one of them has been replaced or changed.

    A walk through all modules in every step would be most of what a replayed step leaves to the host.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = _python_modules(model)
        self.lengths = [(own, len(own)) for m in modules for own in (m._modules, m._parameters)]
        self.children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self.parameters = [(m._parameters, name, p) for m in modules for name, p in m._parameters.items()]
        self.weights = list(model.parameters())

    def complete(self) -> bool:
        """Whether the model consists of what it did."""
        same = all(own.get(name) is child for own, name, child in self.children)
        same = same and all(own.get(name) is p for own, name, p in self.parameters)
        return same and all(len(own) == length for own, length in self.lengths)

    def state(self) -> tuple[Any, ...]:
        """Where the weights lie, and what tells one state of them from another."""
        return tuple((p.device, p.data_ptr(), p._version, p.dtype) for p in self.weights)


def engine_of(model: Any) -> Engine | None:
    """The engine of a model, built anew when its weights have changed; None where the kernels do not serve it."""
    kept = model.__dict__.get("gaq_engine")
    parts = kept[2] if kept is not None and kept[2].complete() else _Parts(model)
    key = (_integer_linears(), *parts.state())
    if kept is None or kept[0] != key:
        engine: Engine | None = None
        try:
            engine = Engine(model)
        except (Unsupported, native.CompilerError) as error:
            _warn(error)
        kept = (key, engine, parts)
    elif kept[2] is not parts:
        kept = (*kept[:2], parts)
    model.__dict__["gaq_engine"] = kept
    return kept[1]  # type: ignore[no-any-return]


def give_up(model: Any, error: Unsupported) -> None:
    """A structure has shown what the engine cannot compute: say so, and keep to the reference path."""
    _warn(error)
    key, _, parts = model.__dict__["gaq_engine"]
    model.__dict__["gaq_engine"] = (key, None, parts)


def _warn(error: Exception) -> None:
    warnings.warn(f"gaq: this model runs through the reference path: {error}", stacklevel=4)
