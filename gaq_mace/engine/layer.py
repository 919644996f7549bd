"""One interaction of MACE and the product basis after it, through the fused kernels."""

from __future__ import annotations

from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.kernels import contraction, convolution, radial, rounding
from gaq_mace.engine.compositions import Composition, Knots
from gaq_mace.engine.integers import Integers
from gaq_mace.engine.layouts import Rounder, rows_of
from gaq_mace.engine.radial_tables import RadialTables
from gaq_mace.engine.reading import (
    Unsupported,
    class_name,
    identity_or,
    inputs_of,
    matrices_of,
    multiplicity,
    species_matrices_of,
)

__all__ = ["INTERACTIONS", "Layer"]

INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)


class Layer(torch.nn.Module):
    """One interaction and product of the model."""

    # What is read from the model and never changed; tensors lie where the model's do.
    contraction_coefficients: Tensor

    def __init__(self, model: Any, number: int, sh: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        block, product = model.interactions[number], model.products[number]
        name = class_name(block)
        if name not in INTERACTIONS:
            raise Unsupported(f"interactions.{number} is a {name}; served are {', '.join(INTERACTIONS)}")
        if identity_or(block) is not None:
            raise Unsupported(f"the density weights of interactions.{number} are rounded")
        if hasattr(block, "conv_fusion"):
            raise Unsupported(f"interactions.{number} brings a convolution kernel of its own")
        self.residual = "Residual" in name
        tp = block.conv_tp
        self.channels = multiplicity(tp.irreps_in1, f"input features of interactions.{number}")
        multiplicity(tp.irreps_out, f"messages of interactions.{number}")
        if any(ins.connection_mode != "uvu" or not ins.has_weight for ins in tp.instructions):
            raise Unsupported(f"interactions.{number}.conv_tp is not a channel-wise product")
        if [ir for _, ir in tp.irreps_in2] != [ir for _, ir in o3.Irreps.spherical_harmonics(len(sh) - 1)]:
            raise Unsupported(f"the edge attributes {tp.irreps_in2} are not plain spherical harmonics")

        linear_in = inputs_of(block.linear)
        matrices = matrices_of(block.linear)
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
        for group in range(len(self.target)):
            own = [self.path_blocks[p] for p in self.problem.group_paths(group)]
            if not own or own != linear_in.get(group):
                raise Unsupported(f"interactions.{number}.linear reads its inputs in an order of its own")
            matrix = matrices[group]
            if not hasattr(block, "density_fn"):
                matrix = matrix / float(block.avg_num_neighbors)
            self.register_buffer(f"linear_{group}", matrix.to(dtype))
        self.message_quantizer = identity_or(block.linear)
        self.message_plan = self._plan_messages()

        tolerance = radial.TOLERANCE if dtype == torch.float32 else radial.DOUBLE_TOLERANCE
        try:
            self.radial = RadialTables(model, block, len(paths), self.channels, tolerance)
        except ValueError as error:
            raise Unsupported(str(error)) from error

        up = matrices_of(block.linear_up)
        for out, inputs in inputs_of(block.linear_up).items():
            if inputs != [out]:
                raise Unsupported(f"interactions.{number}.linear_up mixes blocks")
            self.register_buffer(f"up_{out}", up[out].to(dtype))
        if len(up) != len(tp.irreps_in1):
            raise Unsupported(f"interactions.{number}.linear_up leaves a block empty")
        self.in_rows = rows_of(block.linear_up.irreps_in)
        self.round_up = Rounder(identity_or(block.linear_up), block.linear_up.irreps_in, self.channels)

        skip = species_matrices_of(block.skip_tp)
        self.skip_inputs = {out: i_in for out, (i_in, _) in skip.items()}
        for out, (_, matrix) in skip.items():
            self.register_buffer(f"skip_{out}", matrix.to(dtype))
        self.round_skip = Rounder(identity_or(block.skip_tp), block.skip_tp.irreps_in1, self.channels)
        self.skip_rows = rows_of(block.skip_tp.irreps_out)
        self.target_rows = rows_of(self.target)

        self._fold(product, dtype)
        self.use_sc = bool(product.use_sc)
        self.agnostic = bool(getattr(product, "use_agnostic_product", False))
        self.out_irreps = product.linear.irreps_out
        self.out_rows = rows_of(self.out_irreps)
        final = matrices_of(product.linear)
        for out, inputs in inputs_of(product.linear).items():
            if inputs != [out]:
                raise Unsupported(f"products.{number}.linear mixes blocks")
            self.register_buffer(f"final_{out}", final[out].to(dtype))
        self.round_final = Rounder(identity_or(product.linear), self.out_irreps, self.channels)
        self.round_out = Rounder(identity_or(product), self.out_irreps, self.channels)
        self.by_integers: dict[str, Integers] = {}

    def _fold(self, product: Any, dtype: torch.dtype) -> None:
        symmetric = product.symmetric_contractions
        rows_in = sum(ir.dim for _, ir in self.target)
        outputs = symmetric.irreps_out
        tensors = []
        for own, rows in zip(symmetric.contractions, rows_of(outputs), strict=True):
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

    def take(self, name: str, integers: Integers | None) -> None:
        """Take the products of a matrix through integers, where they are given."""
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

    def _species_product(self, x: Tensor, name: str, own: Composition) -> Tensor:
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

    def _skip(self, x: Tensor, rows_in: list[slice], rows_out: list[slice], own: Composition) -> Tensor:
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
        self, features: Tensor, graph: convolution.Graph, vectors: Tensor, own: Composition, tables: Knots
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
