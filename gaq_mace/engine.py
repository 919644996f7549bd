"""MACE through the fused kernels: what a converted model runs by default at inference, on the CPU and on NVIDIA cards.

An `Engine` is built from a model (quantized and converted, or float) and computes the same function: the same weights,
the same rounding of features, float32 or float64 arithmetic as the model has it. Per-edge features are never written
to memory (`gaq.kernels.convolution`), the symmetric contraction is a folded polynomial (`gaq.kernels.contraction`), and
the radial network is a table (`gaq_mace.radial_tables`). What surrounds the interactions is MACE's own code.

Atoms are sorted by species within a call, so that weights of a species act on a slice.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from mace.modules.utils import get_outputs, prepare_graph
from mace.tools.scatter import scatter_sum
from torch import Tensor

from gaq.kernels import contraction, convolution, gpu, harmonics, native, radial, rounding
from gaq.quantized import state_of
from gaq.quantizers.features import FeatureQuantizer
from gaq_mace.modules import original_class
from gaq_mace.radial_tables import RadialTables

__all__ = ["Engine", "Unsupported", "disabled", "engine_for", "engine_of", "give_up", "serves"]

INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)


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


def _matrices(linear: o3.Linear) -> dict[int, Tensor]:
    """For each output block the matrix (sum of input multiplicities, output multiplicity) and, in order, its inputs."""
    if linear.bias.numel():
        raise Unsupported("a linear layer has a bias")
    found: dict[int, list[Tensor]] = {}
    offset = 0
    weight = linear.weight.detach().double()
    for ins in linear.instructions:
        rows, columns = ins.path_shape
        block = weight[offset : offset + rows * columns].view(rows, columns) * ins.path_weight
        offset += rows * columns
        found.setdefault(ins.i_out, []).append(block)
    return {out: torch.cat(blocks) for out, blocks in found.items()}


def _inputs(linear: o3.Linear) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for ins in linear.instructions:
        found.setdefault(ins.i_out, []).append(ins.i_in)
    return found


def _species_matrices(product: o3.FullyConnectedTensorProduct) -> dict[int, tuple[int, Tensor]]:
    """For each output block its input block and the matrices (species, in, out) of a product with one-hot species."""
    found: dict[int, tuple[int, Tensor]] = {}
    offset = 0
    weight = product.weight.detach().double()
    for ins in product.instructions:
        shape = tuple(ins.path_shape)
        l = product.irreps_out[ins.i_out].ir.l  # noqa: E741
        size = shape[0] * shape[1] * shape[2]
        block = weight[offset : offset + size].view(shape) * ins.path_weight / (2 * l + 1) ** 0.5
        offset += size
        if ins.i_out in found:
            raise Unsupported("several input blocks of a species product share an output block")
        found[ins.i_out] = (ins.i_in1, block.permute(1, 0, 2).contiguous())
    return found


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


@dataclass
class _SpeciesOrder:
    """Atoms by species: which lie where, and which pairs of them the edges join."""

    species: Tensor
    bounds: list[tuple[int, int, int]]  # species, first atom, end
    pairs: tuple[int, ...]  # as `RadialTables.code` numbers them, in the order of `Graph.tables`


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """(atoms, rows, in) by a matrix (in, out).

    As one product of all rows: torch makes one an atom of rows that are part of a longer layout, at half the speed.
    """
    return (x.reshape(-1, x.shape[2]) @ matrix).view(x.shape[0], x.shape[1], -1)


def _species_product(x: Tensor, matrices: Tensor, order: _SpeciesOrder) -> Tensor:
    """(atoms, rows, in) by the matrix of each atom's species."""
    if len(order.bounds) == 1:
        return _mixed(x, matrices[order.bounds[0][0]])
    return torch.cat([_mixed(x[a:b], matrices[z]) for z, a, b in order.bounds])


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

    # -- evaluation --

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

    def _skip(self, x: Tensor, rows_in: list[slice], rows_out: list[slice], order: _SpeciesOrder) -> Tensor:
        """The product with the species, (atoms, rows, channels)."""
        parts = []
        for out, rows in enumerate(rows_out):
            if out in self.skip_inputs:
                matrices = getattr(self, f"skip_{out}")
                parts.append(_species_product(x[:, rows_in[self.skip_inputs[out]]], matrices, order))
            else:  # nothing of this degree goes in
                parts.append(x.new_zeros(x.shape[0], rows.stop - rows.start, self.channels))
        return torch.cat(parts, dim=1)

    def _tables(self, pairs: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor | None]:
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

    def forward(self, features: Tensor, graph: convolution.Graph, vectors: Tensor, order: _SpeciesOrder) -> Tensor:
        """Node features of the next layer, (atoms, rows, channels)."""
        atoms = features.shape[0]
        sc = None
        if self.residual:
            x = self.round_skip(features)
            sc = self._skip(x, self.in_rows, self.skip_rows, order)
        x = self.round_up(features)
        x = torch.cat([_mixed(x[:, r], getattr(self, f"up_{i}")) for i, r in enumerate(self.in_rows)], dim=1)
        knots, density_knots = self._tables(order.pairs, x)
        message = convolution.convolution(self.problem, graph, x, vectors, knots)
        if self.message_plan is not None:
            message = rounding.round_features(message, self.message_plan, atoms)
        groups = self.problem.split(message, atoms)
        if self.message_plan is None:
            groups = self._round_messages(groups, atoms)
        mixed = [
            (g @ getattr(self, f"linear_{i}")).view(atoms, 2 * l + 1, -1)
            for i, (g, l) in enumerate(zip(groups, self.problem.groups, strict=True))  # noqa: E741
        ]
        x = torch.cat(mixed, dim=1)
        if density_knots is not None:
            x = x / (self._density(density_knots, graph, vectors, atoms) + 1)[:, None, None]
        if not self.residual:
            x = self.round_skip(x)
            x = self._skip(x, self.target_rows, self.skip_rows, order)
        species = torch.zeros_like(order.species) if self.agnostic else order.species
        x = contraction.contraction(self.polynomial, x, species, self.contraction_coefficients)
        x = self.round_final(x)
        x = torch.cat([_mixed(x[:, r], getattr(self, f"final_{i}")) for i, r in enumerate(self.out_rows)], dim=1)
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
        embedding = _matrices(model.node_embedding.linear)[0]
        self.register_buffer("embedding", embedding.to(dtype))
        # MACE's own modules, not registered here: they belong to the model.
        self.__dict__["model"] = model
        self.__dict__["quantizers"] = [m for m in model.modules() if isinstance(m, FeatureQuantizer)]

    def rounds_as_deployed(self) -> bool:
        """Whether the model's quantizers are all switched on, as they were when the engine was made."""
        return all(
            q.scalars_enabled and q.vectors_enabled and q.vector_range_factor == 1.0 and not q.observing
            for q in self.__dict__["quantizers"]
        )

    def _pairs(self, species: Tensor, edges: Tensor) -> tuple[tuple[int, ...], Tensor | None]:
        """The pairs of species that edges join, and the number of each edge's; of no interest to most models."""
        tables: Any = self.layers[0].radial
        if not tables.by_species:
            return (0,), None
        first, second = species[edges[0]], species[edges[1]]
        codes = torch.minimum(first, second) * tables.elements + torch.maximum(first, second)
        found, numbers = torch.unique(codes, return_inverse=True)
        # Without edges any table will do.
        return tuple(found.tolist()) or (0,), numbers

    def forward(self, data: dict[str, Tensor], **options: bool) -> dict[str, Tensor | None]:
        """What `ScaleShiftMACE.forward` returns, for the same arguments."""
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
        vectors = context.vectors
        batch, graphs = data["batch"], context.num_graphs
        node_e0 = model.atomic_energies_fn(data["node_attrs"])[atoms, heads]
        e0 = scatter_sum(src=node_e0, index=batch, dim=0, dim_size=graphs).to(vectors.dtype)

        species = data["node_attrs"].argmax(dim=1)
        by_species = torch.argsort(species, stable=True)
        place = torch.empty_like(by_species)
        place[by_species] = torch.arange(by_species.numel(), device=place.device)
        counts = torch.bincount(species, minlength=self.embedding.shape[0]).tolist()
        bounds, start = [], 0
        for z, count in enumerate(counts):
            if count:
                bounds.append((z, start, start + count))
            start += count
        edges = place[data["edge_index"]]
        pairs, tables = self._pairs(species, data["edge_index"])
        order = _SpeciesOrder(species[by_species], bounds, pairs)
        graph = convolution.Graph(edges[0], edges[1], tables)

        features = self.embedding[order.species][:, None]
        energies, kept = [torch.zeros_like(node_e0)], []
        if hasattr(model, "pair_repulsion"):
            numbers = model.atomic_numbers
            energies = [model.pair_repulsion_fn(context.lengths, data["node_attrs"], data["edge_index"], numbers)]
        layer: Any
        for layer in self.layers:
            features = layer(features, graph, vectors, order)
            kept.append(_to_mul_ir(features, layer.out_rows)[place])
        for i, readout in enumerate(model.readouts):
            own = kept[-1 if len(model.readouts) == 1 else i]
            energies.append(readout(own, heads)[atoms, heads])
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


def engine_of(model: Any) -> Engine | None:
    """The engine of a model, built anew when its weights have changed; None where the kernels do not serve it."""
    key = tuple((p.device, p.data_ptr(), p._version, p.dtype) for p in model.parameters())
    kept = model.__dict__.get("gaq_engine")
    if kept is None or kept[0] != key:
        engine: Engine | None = None
        try:
            engine = Engine(model)
        except (Unsupported, native.CompilerError) as error:
            _warn(error)
        kept = (key, engine)
        model.__dict__["gaq_engine"] = kept
    return kept[1]  # type: ignore[no-any-return]


def give_up(model: Any, error: Unsupported) -> None:
    """A structure has shown what the engine cannot compute: say so, and keep to the reference path."""
    _warn(error)
    model.__dict__["gaq_engine"] = (model.__dict__["gaq_engine"][0], None)


def _warn(error: Exception) -> None:
    warnings.warn(f"gaq: this model runs through the reference path: {error}", stacklevel=4)
