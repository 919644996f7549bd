"""One interaction of MACE and the product basis after it, through the fused kernels."""

from __future__ import annotations

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from torch import Tensor

from gaq.kernels import contraction, convolution, rounding
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.edges import Edges
from gaq_mace.engine.integers import Integers
from gaq_mace.engine.layouts import Rounder, rows_of
from gaq_mace.engine.linears import LinearLayer, Mixing
from gaq_mace.engine.radial_tables import RadialTables
from gaq_mace.engine.reading import Unsupported, input_quantizer_of, inputs_of, matrices_of, multiplicity

__all__ = ["Layer"]


def refuse_unsupported(block: AnyModule, number: int, sh: list[Tensor]) -> None:
    """Refuse a convolution that the kernels cannot compute.

    Raises:
        Unsupported: naming the part.
    """
    if hasattr(block, "conv_fusion"):
        raise Unsupported(f"interactions.{number} brings a convolution kernel of its own")
    tp = block.conv_tp
    if any(ins.connection_mode != "uvu" or not ins.has_weight for ins in tp.instructions):
        raise Unsupported(f"interactions.{number}.conv_tp is not a channel-wise product")
    if [ir for _, ir in tp.irreps_in2] != [ir for _, ir in o3.Irreps.spherical_harmonics(len(sh) - 1)]:
        raise Unsupported(f"the edge attributes {tp.irreps_in2} are not plain spherical harmonics")


class Layer(torch.nn.Module):
    """One interaction block of MACE and the product basis after it, through the fused kernels.

    Its tensors are read from the model once and never changed; they lie on the model's device. Subclasses read and
    evaluate what differs between MACE's blocks: `_read_block` and `_interaction`.

    Args:
        model: a `ScaleShiftMACE`.
        number: of the interaction block.
        sh: coefficients of the spherical harmonics; see `gaq.kernels.harmonics.fit`.
        dtype: of the model.

    Attributes:
        radial: radial tables; None where the radial network is evaluated for each edge.
        reads_edges: whether the layer reads `Edges.features`.
        linears: linear layers whose matrices the layer holds.
        exchanges: whether the convolution alone reads features of senders, so that the layer serves parts of space.

    Raises:
        Unsupported: for a block that the kernels do not serve.
    """

    contraction_coefficients: Tensor
    radial: RadialTables | None
    # Module of the block that mixes the paths of a message, and whether edges have factors, the same for all paths.
    MESSAGE_LINEAR = "linear"
    SCALED = False
    exchanges = True
    # Whether the layer reads its radial tables in `forward`, or programs alone do.
    READS_TABLES = True

    def __init__(self, model: AnyModule, number: int, sh: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        block, product = model.interactions[number], model.products[number]
        refuse_unsupported(block, number, sh)
        self.linears: list[LinearLayer] = []
        self.by_integers: dict[str, Integers] = {}
        self.channels = multiplicity(block.conv_tp.irreps_in1, f"input features of interactions.{number}")
        multiplicity(block.conv_tp.irreps_out, f"messages of interactions.{number}")
        self._read_convolution(block, number, sh, float(model.r_max))
        self._read_message_linear(block, number, dtype)
        self._read_up(block, number, dtype)
        self.radial = None
        self.reads_edges = True
        self._read_block(model, block, number, dtype)
        self._fold(product, dtype)
        self._read_product(product, number, dtype)

    # -- reading the model --

    def _read_block(self, model: AnyModule, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read what is special to the kind of block: its radial functions and its linear layers."""
        raise NotImplementedError

    def _read_convolution(self, block: AnyModule, number: int, sh: list[Tensor], r_max: float) -> None:
        tp = block.conv_tp
        linear = getattr(block, self.MESSAGE_LINEAR)
        group_of = {i_in: out for out, ins in inputs_of(linear).items() for i_in in ins}
        mixed = linear.irreps_out
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
            tuple(ir.l for _, ir in mixed),
            tuple(paths),
            tuple(sh),
            r_max,
            (0,) * len(tp.irreps_in1) if self.SCALED else (),
        )
        self.path_blocks = [ins.i_out for ins in tp.instructions]  # of the e3nn layout of messages

    def _read_message_linear(self, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read the linear layer that mixes the paths of a message, and the rounding of what it reads."""
        path = f"interactions.{number}.{self.MESSAGE_LINEAR}"
        linear = getattr(block, self.MESSAGE_LINEAR)
        inputs = inputs_of(linear)
        for group in range(len(self.problem.groups)):
            blocks = [self.path_blocks[p] for p in self.problem.group_paths(group)]
            if not blocks or blocks != inputs.get(group):
                raise Unsupported(f"{path} reads its inputs in an order of its own")
        self._take_linear(LinearLayer("linear", path, linear, self._message_divisor(block)), dtype)
        self.message_quantizer = input_quantizer_of(linear)
        self.message_plan = self._plan_messages()

    def _message_divisor(self, block: AnyModule) -> float:
        """Number by which every message is divided."""
        return float(block.avg_num_neighbors)

    def _take_linear(self, linear: LinearLayer, dtype: torch.dtype) -> None:
        """Register the matrices of a linear layer."""
        for out, matrix in matrices_of(linear.module).items():
            self.register_buffer(f"{linear.name}_{out}", (matrix / linear.divisor).to(dtype))
        self.linears.append(linear)

    def _read_mixing(self, linear: LinearLayer, dtype: torch.dtype) -> Mixing:
        """Read a linear layer each of whose output blocks has at most one input block, and its rounding.

        Raises:
            Unsupported: if it mixes blocks.
        """
        inputs = inputs_of(linear.module)
        if any(len(blocks) != 1 for blocks in inputs.values()):
            raise Unsupported(f"{linear.path} mixes blocks")
        self._take_linear(linear, dtype)
        irreps_in, irreps_out = linear.module.irreps_in, linear.module.irreps_out
        channels = multiplicity(irreps_in, f"inputs of {linear.path}")
        return Mixing(
            linear.name,
            {out: blocks[0] for out, blocks in inputs.items()},
            rows_of(irreps_in),
            rows_of(irreps_out),
            [mul for mul, _ in irreps_out],
            Rounder(input_quantizer_of(linear.module), irreps_in, channels),
        )

    def _read_up(self, block: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read ``linear_up``, which makes of node features those that edges read."""
        path = f"interactions.{number}.linear_up"
        self.up = self._read_mixing(LinearLayer("up", path, block.linear_up, reads_features=True), dtype)

    def _read_product(self, product: AnyModule, number: int, dtype: torch.dtype) -> None:
        """Read the linear layer after the contraction, and the rounding around it."""
        self.use_sc = bool(product.use_sc)
        self.agnostic = bool(getattr(product, "use_agnostic_product", False))
        self.final = self._read_mixing(LinearLayer("final", f"products.{number}.linear", product.linear), dtype)
        self.out_irreps = product.linear.irreps_out
        self.out_rows = rows_of(self.out_irreps)
        channels = multiplicity(self.out_irreps, f"node features of products.{number}")
        self.round_out = Rounder(input_quantizer_of(product), self.out_irreps, channels)

    def _fold(self, product: AnyModule, dtype: torch.dtype) -> None:
        """Fold the weights of the symmetric contraction into its coupling tensors."""
        symmetric = product.symmetric_contractions
        rows_in = sum(ir.dim for _, ir in symmetric.irreps_in)
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

    def mix(self, mixing: Mixing, x: Tensor) -> Tensor:
        """Apply a linear layer with its rounding to features, (atoms, rows, channels)."""
        return torch.cat(self.mix_blocks(mixing, x), dim=1)

    def mix_blocks(self, mixing: Mixing, x: Tensor) -> list[Tensor]:
        """Apply a linear layer with its rounding to features; each output block is (atoms, components, channels)."""
        x = mixing.round(x)
        # The derivative of a split is one tensor; that of as many slices would be a sum of tensors, nearly all zero.
        parts = x.split([rows.stop - rows.start for rows in mixing.rows_in], dim=1)
        blocks = []
        for out, (rows, channels) in enumerate(zip(mixing.rows_out, mixing.channels, strict=True)):
            if out in mixing.inputs:
                blocks.append(self._mixed(parts[mixing.inputs[out]], f"{mixing.name}_{out}"))
            else:  # no input of its degree
                blocks.append(x.new_zeros(x.shape[0], rows.stop - rows.start, channels))
        return blocks

    def sent(self, x: Tensor, edges: Edges) -> Tensor:
        """What edges read of senders, from what ``linear_up`` makes of the atoms, both (atoms, rows, channels)."""
        return x if edges.senders is None else edges.senders(x, lambda features: self.mix(self.up, features))

    def before_messages(self, features: Tensor, composition: Composition) -> list[Tensor]:
        """What a first layer makes of the features of atoms before its messages, each (atoms, width).

        Args:
            features: (atoms, 1, channels), atoms sorted by species.
            composition: species of the atoms.

        Returns:
            What edges read of senders, then what the layer keeps of each atom.
        """
        raise NotImplementedError

    def mix_messages(self, message: Tensor, atoms: int) -> list[Tensor]:
        """Mix the paths of messages.

        Args:
            message: as `gaq.kernels.convolution.convolution` gives it.
            atoms: number of atoms.

        Returns:
            For each output block (atoms, components, channels).
        """
        if self.message_plan is not None:
            message = rounding.round_features(message, self.message_plan, atoms)
        groups = self.problem.split(message, atoms)
        if self.message_plan is None:
            groups = self._round_messages(groups, atoms)
        return [
            self._product(g, f"linear_{i}").view(atoms, 2 * l + 1, -1)
            for i, (g, l) in enumerate(zip(groups, self.problem.groups, strict=True))  # noqa: E741
        ]

    def _interaction(self, features: Tensor, edges: Edges, composition: Composition) -> tuple[Tensor, Tensor | None]:
        """Compute the interaction block.

        Returns:
            What the contraction reads, and what is added after it, both (atoms, rows, channels).
        """
        raise NotImplementedError

    def forward(self, features: Tensor, edges: Edges, composition: Composition) -> Tensor:
        """Compute the node features of the next layer, (atoms, rows, channels).

        Args:
            features: of nodes, (atoms, rows, channels), atoms sorted by species.
            edges: in that order of atoms, with the radial tables of the layer.
            composition: species of the atoms.
        """
        x, sc = self._interaction(features, edges, composition)
        species = torch.zeros_like(composition.ordered) if self.agnostic else composition.ordered
        x = contraction.contraction(self.polynomial, x, species, self.contraction_coefficients)
        x = self.mix(self.final, x)
        if self.use_sc and sc is not None:
            x = x + sc
        return self.round_out(x)
