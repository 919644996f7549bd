"""One interaction of MACE and the product basis after it, through the fused kernels."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.kernels import contraction, convolution, radial, rounding
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.integers import Integers
from gaq_mace.engine.layouts import Rounder, rows_of
from gaq_mace.engine.radial_tables import Knots, RadialTables
from gaq_mace.engine.reading import (
    Unsupported,
    class_name,
    input_quantizer_of,
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


def _refuse_unsupported(block: AnyModule, number: int, sh: list[Tensor]) -> None:
    name = class_name(block)
    if name not in INTERACTIONS:
        raise Unsupported(f"interactions.{number} is a {name}; served are {', '.join(INTERACTIONS)}")
    if input_quantizer_of(block) is not None:
        raise Unsupported(f"the density weights of interactions.{number} are rounded")
    if hasattr(block, "conv_fusion"):
        raise Unsupported(f"interactions.{number} brings a convolution kernel of its own")
    tp = block.conv_tp
    if any(ins.connection_mode != "uvu" or not ins.has_weight for ins in tp.instructions):
        raise Unsupported(f"interactions.{number}.conv_tp is not a channel-wise product")
    if [ir for _, ir in tp.irreps_in2] != [ir for _, ir in o3.Irreps.spherical_harmonics(len(sh) - 1)]:
        raise Unsupported(f"the edge attributes {tp.irreps_in2} are not plain spherical harmonics")


class Layer(torch.nn.Module):
    """One interaction block of MACE and the product basis after it, through the fused kernels.

    Its tensors are read from the model once and never changed; they lie on the model's device.

    Args:
        model: a `ScaleShiftMACE`.
        number: of the interaction block.
        sh: coefficients of the spherical harmonics; see `gaq.kernels.harmonics.fit`.
        dtype: of the model.

    Raises:
        Unsupported: for a block that the kernels do not serve.
    """

    contraction_coefficients: Tensor

    def __init__(self, model: AnyModule, number: int, sh: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        block, product = model.interactions[number], model.products[number]
        _refuse_unsupported(block, number, sh)
        self.residual = "Residual" in class_name(block)
        self.channels = multiplicity(block.conv_tp.irreps_in1, f"input features of interactions.{number}")
        multiplicity(block.conv_tp.irreps_out, f"messages of interactions.{number}")
        self._read_convolution(block, number, sh, float(model.r_max))
        self._read_message_linear(block, number, dtype)
        tolerance = radial.TOLERANCE if dtype == torch.float32 else radial.DOUBLE_TOLERANCE
        try:
            self.radial = RadialTables(model, block, len(self.problem.paths), self.channels, tolerance)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        self._read_node_linears(block, number, dtype)
        self._fold(product, dtype)
        self._read_product(product, number, dtype)
        self.by_integers: dict[str, Integers] = {}

    # -- reading the model --

    def _read_convolution(self, block: AnyModule, number: int, sh: list[Tensor], r_max: float) -> None:
        tp = block.conv_tp
        group_of = {i_in: out for out, ins in inputs_of(block.linear).items() for i_in in ins}
        self.target = block.linear.irreps_out
        paths = []
        for ins in tp.instructions:
            l1, l2 = tp.irreps_in1[ins.i_in1].ir.l, tp.irreps_in2[ins.i_in2].ir.l
            l3 = tp.irreps_out[ins.i_out].ir.l
            if ins.i_out not in group_of:
                raise Unsupported(f"a path of interactions.{number}.conv_tp is not read")
            coefficients = o3.wigner_3j(l1, l2, l3, dtype=torch.float64) * ins.path_weight
            paths.append(convolution.Path(ins.i_in1, l2, group_of[ins.i_out], coefficients))
        self.problem = convolution.ConvolutionProblem(
            self.channels,
            tuple(ir.l for _, ir in tp.irreps_in1),
            tuple(ir.l for _, ir in self.target),
            tuple(paths),
            tuple(sh),
            r_max,
        )
        self.path_blocks = [ins.i_out for ins in tp.instructions]  # of the e3nn layout of messages

    def _read_message_linear(self, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read the linear layer that mixes the paths of a message, and the rounding of what it reads."""
        matrices, inputs = matrices_of(block.linear), inputs_of(block.linear)
        for group in range(len(self.target)):
            blocks = [self.path_blocks[p] for p in self.problem.group_paths(group)]
            if not blocks or blocks != inputs.get(group):
                raise Unsupported(f"interactions.{number}.linear reads its inputs in an order of its own")
            matrix = matrices[group]
            if not hasattr(block, "density_fn"):
                matrix = matrix / float(block.avg_num_neighbors)
            self.register_buffer(f"linear_{group}", matrix.to(dtype))
        self.message_quantizer = input_quantizer_of(block.linear)
        self.message_plan = self._plan_messages()

    def _read_node_linears(self, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read ``linear_up`` and the product with the species, ``skip_tp``."""
        up = matrices_of(block.linear_up)
        for out, inputs in inputs_of(block.linear_up).items():
            if inputs != [out]:
                raise Unsupported(f"interactions.{number}.linear_up mixes blocks")
            self.register_buffer(f"up_{out}", up[out].to(dtype))
        if len(up) != len(block.conv_tp.irreps_in1):
            raise Unsupported(f"interactions.{number}.linear_up leaves a block empty")
        self.in_rows = rows_of(block.linear_up.irreps_in)
        self.round_up = Rounder(input_quantizer_of(block.linear_up), block.linear_up.irreps_in, self.channels)

        skip = species_matrices_of(block.skip_tp)
        self.skip_inputs = {out: i_in for out, (i_in, _) in skip.items()}
        for out, (_, matrix) in skip.items():
            self.register_buffer(f"skip_{out}", matrix.to(dtype))
        self.round_skip = Rounder(input_quantizer_of(block.skip_tp), block.skip_tp.irreps_in1, self.channels)
        self.skip_rows = rows_of(block.skip_tp.irreps_out)
        self.target_rows = rows_of(self.target)

    def _read_product(self, product: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read the linear layer after the contraction, and the rounding around it."""
        self.use_sc = bool(product.use_sc)
        self.agnostic = bool(getattr(product, "use_agnostic_product", False))
        self.out_irreps = product.linear.irreps_out
        self.out_rows = rows_of(self.out_irreps)
        final = matrices_of(product.linear)
        for out, inputs in inputs_of(product.linear).items():
            if inputs != [out]:
                raise Unsupported(f"products.{number}.linear mixes blocks")
            self.register_buffer(f"final_{out}", final[out].to(dtype))
        self.round_final = Rounder(input_quantizer_of(product.linear), self.out_irreps, self.channels)
        self.round_out = Rounder(input_quantizer_of(product), self.out_irreps, self.channels)

    def _fold(self, product: AnyModule, dtype: torch.dtype) -> None:
        """Fold the weights of the symmetric contraction into its coupling tensors."""
        symmetric = product.symmetric_contractions
        rows_in = sum(ir.dim for _, ir in self.target)
        outputs = symmetric.irreps_out
        tensors = []
        for part, rows in zip(symmetric.contractions, rows_of(outputs), strict=True):
            for degree in range(part.correlation, 0, -1):
                coupling = part.U_tensors(degree)
                if coupling.dim() == degree + 1:
                    coupling = coupling[None]  # a scalar output has no axis for its component
                lower = part.correlation - 1 - degree
                weights = part.weights_max if degree == part.correlation else part.weights[lower]
                if bool((weights != 0).any()):
                    # On the CPU: folding takes thousands of small steps, each of them a launch on a GPU.
                    tensors.append((coupling.cpu(), weights.cpu(), rows.start))
        self.polynomial, coefficients = contraction.fold(tensors, rows_in, sum(ir.dim for _, ir in outputs))
        self.register_buffer("contraction_coefficients", coefficients.to(part.weights_max.device, dtype).contiguous())

    def take(self, name: str, integers: Integers | None) -> None:
        """Compute the products with a matrix from its integer codes, where there are any."""
        if integers is not None:
            self.by_integers[name] = integers

    # -- evaluation --

    def _product(self, rows: Tensor, name: str, species: int | None = None) -> Tensor:
        """Multiply rows (n, in) by a matrix of the layer, or by the matrix of a species."""
        integers = self.by_integers.get(name if species is None else f"{name}.{species}")
        if integers is not None:
            return integers(rows)
        matrix = getattr(self, name)
        return rows @ (matrix if species is None else matrix[species])

    def _mixed(self, x: Tensor, name: str, species: int | None = None) -> Tensor:
        """Multiply features (atoms, rows, in) by a matrix of the layer.

        All rows go into one product. Given rows that are part of a longer layout, torch would make one product for
        each atom, at half the speed.
        """
        return self._product(x.reshape(-1, x.shape[2]), name, species).view(x.shape[0], x.shape[1], -1)

    def _species_product(self, x: Tensor, name: str, composition: Composition) -> Tensor:
        """Multiply features (atoms, rows, in) by the matrix of each atom's species."""
        if len(composition.bounds) == 1:
            return self._mixed(x, name, composition.bounds[0][0])
        return torch.cat([self._mixed(x[a:b], name, z) for z, a, b in composition.bounds])

    def _plan_messages(self) -> rounding.Plan | None:
        """Plan the rounding of messages where they lie; None where they are not rounded, or the kernel cannot."""
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
        """Round the messages of all groups with the quantizer itself, in e3nn's layout."""
        if self.message_quantizer is None:
            return groups
        components = [2 * l + 1 for l in self.problem.groups]  # noqa: E741
        # (atoms, components, paths, channels) of each group; e3nn has a block for each path, components last.
        views = [g.view(atoms, d, -1, self.channels) for g, d in zip(groups, components, strict=True)]
        blocks: dict[int, Tensor] = {}
        for group in range(len(groups)):
            for k, path in enumerate(self.problem.group_paths(group)):
                blocks[self.path_blocks[path]] = views[group][:, :, k]
        flat = [blocks[i].transpose(1, 2).reshape(atoms, -1) for i in range(len(blocks))]
        rounded = self.message_quantizer(torch.cat(flat, dim=1)).split([f.shape[1] for f in flat], dim=1)
        rounded_groups = []
        for group, d in enumerate(components):
            blocks_of_group = [
                rounded[self.path_blocks[p]].view(atoms, self.channels, d).transpose(1, 2)
                for p in self.problem.group_paths(group)
            ]
            rounded_groups.append(torch.cat(blocks_of_group, dim=2).reshape(atoms * d, -1))
        return rounded_groups

    def _skip(self, x: Tensor, rows_in: list[slice], rows_out: list[slice], composition: Composition) -> Tensor:
        """Product of features with the species, (atoms, rows, channels)."""
        parts = []
        for out, rows in enumerate(rows_out):
            if out in self.skip_inputs:
                rows_read = rows_in[self.skip_inputs[out]]
                parts.append(self._species_product(x[:, rows_read], f"skip_{out}", composition))
            else:  # the block has no input of its degree
                parts.append(x.new_zeros(x.shape[0], rows.stop - rows.start, self.channels))
        return torch.cat(parts, dim=1)

    def tables(self, pairs: tuple[int, ...], like: Tensor) -> Knots:
        """Radial tables of the given pairs of species, end to end.

        Raises:
            Unsupported: if the radial functions of a pair cannot be tabulated.
        """
        try:
            return self.radial.tables(pairs, like.dtype, like.device)
        except ValueError as error:
            raise Unsupported(str(error)) from error

    def _density(self, knots: Tensor, graph: convolution.Graph, vectors: Tensor, atoms: int) -> Tensor:
        """Edge density of each atom, (atoms,); a message is divided by the density plus one."""
        lengths = vectors.norm(dim=-1)
        if graph.tables is None:
            edge = radial.evaluate(knots, lengths, self.problem.r_max)
        else:
            edge = radial.evaluate_several(knots, lengths, self.problem.r_max, graph.tables, 1)
        return edge.new_zeros(atoms).index_add(0, graph.receiver, edge[:, 0, 0])

    def forward(
        self, features: Tensor, graph: convolution.Graph, vectors: Tensor, composition: Composition, tables: Knots
    ) -> Tensor:
        """Compute the node features of the next layer, (atoms, rows, channels).

        Args:
            features: of nodes, (atoms, rows, channels), atoms sorted by species.
            graph: senders and receivers, in that order of atoms.
            vectors: of edges, (edges, 3) in Å.
            composition: species of the atoms.
            tables: radial tables of the layer.
        """
        atoms = features.shape[0]
        sc = None
        if self.residual:
            x = self.round_skip(features)
            sc = self._skip(x, self.in_rows, self.skip_rows, composition)
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
            x = self._skip(x, self.target_rows, self.skip_rows, composition)
        species = torch.zeros_like(composition.ordered) if self.agnostic else composition.ordered
        x = contraction.contraction(self.polynomial, x, species, self.contraction_coefficients)
        x = self.round_final(x)
        x = torch.cat([self._mixed(x[:, r], f"final_{i}") for i, r in enumerate(self.out_rows)], dim=1)
        if self.use_sc and sc is not None:
            x = x + sc
        return self.round_out(x)
