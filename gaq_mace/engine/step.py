"""The engine of a model: its layers one after the other, and MACE's own code around them."""

from __future__ import annotations

import dataclasses
import logging

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from mace.modules.utils import get_outputs, prepare_graph
from mace.tools.scatter import scatter_sum
from torch import Tensor

from gaq.kernels import convolution, gpu, harmonics
from gaq.kernels.cpu import native
from gaq.kernels.gpu.graphs import Graphs, Outputs
from gaq.kernels.recording import Layer
from gaq.model.state import state_of
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition, Compositions
from gaq_mace.engine.edges import EdgeFeatures, Edges, Tables
from gaq_mace.engine.ghosts import Exchanged, OfSpecies, Part
from gaq_mace.engine.integers import integer_linears, through_integers
from gaq_mace.engine.interactions import layer_of
from gaq_mace.engine.layouts import to_mul_ir
from gaq_mace.engine.programs import Compiled, Sorted
from gaq_mace.engine.reading import Unsupported, matrices_of
from gaq_mace.engine.replays import beyond, held_by, inputs_of, replayed
from gaq_mace.engine.soundness import checked
from gaq_mace.engine.starts import Starts, embedded

__all__ = ["Engine"]

StepTables = tuple[list[Tables | None], Tensor | None]
"""Radial tables of each layer, and the number of each edge's table; see `Compositions.tables`."""

logger = logging.getLogger(__name__)


def _plain(options: dict[str, bool]) -> bool:
    """Whether a call asks for nothing but energies, forces, virials and stress."""
    return options.get("compute_force", True) and not options.get("compute_displacement", False)


class Engine(torch.nn.Module):
    """A MACE model as a sequence of fused kernels.

    Args:
        model: a float or converted `ScaleShiftMACE` on the CPU or a GPU, in float32 or float64. The engine serves it
            on the device on which it lies now.

    Raises:
        Unsupported: for parts that the kernels do not serve, and on a GPU without Triton.
        gaq.kernels.cpu.native.CompilerError: where the kernels cannot be built.
    """

    embedding: Tensor

    def __init__(self, model: AnyModule) -> None:
        super().__init__()
        device = next(model.parameters()).device
        if not gpu.chosen(device):
            native.library()
        elif (reason := gpu.why_not()) is not None:
            raise Unsupported(reason)
        state = state_of(model)
        if state is not None and state.status != "converted":
            raise Unsupported("the model is in training: its weights are rounded anew in each call")
        dtype = next(model.parameters()).dtype
        attributes = model.spherical_harmonics
        sh = harmonics.fit(
            lambda d: o3.spherical_harmonics(
                attributes.irreps_out, d, normalize=attributes.normalize, normalization=attributes.normalization
            ),
            attributes.irreps_out.lmax,
        )
        self.layers = torch.nn.ModuleList(layer_of(model, i, sh, dtype) for i in range(len(model.interactions)))
        specs = getattr(model, "embedding_specs", None) or {}
        self.embeds_structures = all(spec["per"] == "graph" for spec in specs.values())
        self.reads_edges = any(layer.reads_edges for layer in self.layers)
        self.embeds = bool(specs)
        # Layers whose radial tables are over the transformed distance; the others read the distance itself.
        layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
        self.transformed = [layer.radial is not None and layer.radial.transformed for layer in layers]
        if integer_linears() and state is not None and dtype == torch.float32 and gpu.chosen(device):
            through_integers(self.layers, model)
        embedding = matrices_of(model.node_embedding.linear)[0]
        self.register_buffer("embedding", embedding.to(dtype))
        self.r_max = float(model.r_max)
        # Not registered as submodules: they belong to the model.
        self.__dict__["model"] = model
        self.__dict__["quantizers"] = [m for m in model.modules() if isinstance(m, FeatureQuantizer)]
        self.inputs, self.rest = inputs_of(model), held_by(model)
        self.graphs = Graphs()
        self.why_no_program: str | None = None
        self.compiled = None if gpu.chosen(device) else self._compiled(model)
        if self.compiled is None:
            for layer in layers:
                if not layer.READS_TABLES:
                    layer.radial = None  # would be made, and read by nothing
        self.compositions = Compositions(self.layers, device)
        self.starts = Starts(model, layers[0], self.embedding, self.embeds_structures) if self.embeds else None
        self.compiled_parts: Compiled | None = None

    def _compiled(self, model: AnyModule) -> Compiled | None:
        """The engine as one program; None where it has parts for which there is none."""
        layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
        try:
            return Compiled(model, layers, None if self.embeds else self.embedding)
        except Unsupported as error:
            self.why_no_program = str(error)
            logger.debug("gaq: each kernel is called by itself, because %s", error)
            return None

    def rounds_as_deployed(self) -> bool:
        """Whether all quantizers of the model are switched on, as they were when the engine was made."""
        return all(
            q.scalars_enabled and q.vectors_enabled and q.vector_range_factor == 1.0 and not q.observing
            for q in self.__dict__["quantizers"]
        )

    def forward(self, data: dict[str, Tensor], **options: bool) -> dict[str, Tensor | None]:
        """Compute what `ScaleShiftMACE.forward` returns for the same arguments.

        The results of a step that was replayed as a CUDA graph have no autograd graph: their forces are already taken.
        """
        composition = self.compositions(data["node_attrs"])
        outputs = replayed(self.graphs, self._step, self.inputs, self.rest, data, composition, options)
        if outputs is not None:
            return outputs
        if self.compiled is None or not _plain(options) or "displacement" in data:
            return self._step(data, composition, options)
        step_tables = self.compositions.tables(composition, data["edge_index"])
        edges = self._sorted(data["edge_index"], composition, step_tables)
        if edges is None:
            return self._step(data, composition, options, step_tables)
        virials = options.get("compute_virials", False) or options.get("compute_stress", False)
        start = None if self.starts is None else self.starts(data, composition)
        return self.compiled.step(self.__dict__["model"], data, composition, edges, virials, start)

    def _step(
        self,
        data: dict[str, Tensor],
        composition: Composition,
        options: dict[str, bool],
        step_tables: StepTables | None = None,
    ) -> Outputs:
        """Compute one step. Where the data have a number of `edges`, edges beyond it contribute nothing.

        Args:
            data: MACE's.
            composition: species of the atoms.
            options: of the call.
            step_tables: radial tables of the step; None to look them up.
        """
        model: AnyModule = self.__dict__["model"]
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
            vectors = beyond(vectors, data["edges"], self.r_max)
            lengths = vectors.norm(dim=-1, keepdim=True)
        batch, graphs = data["batch"], context.num_graphs
        node_e0 = model.atomic_energies_fn(data["node_attrs"])[atoms, heads]
        e0 = scatter_sum(src=node_e0, index=batch, dim=0, dim_size=graphs).to(vectors.dtype)

        pairs = torch.zeros_like(node_e0)
        if hasattr(model, "pair_repulsion"):
            pairs = model.pair_repulsion_fn(lengths, data["node_attrs"], data["edge_index"], model.atomic_numbers)
        start = self._start(data, composition, graphs)
        if start is not None and hasattr(model, "embedding_readout"):
            # Not a part of the interaction energy: it does not depend on positions.
            global_energy = model.embedding_readout(start, heads)[atoms, heads]
            e0 = e0 + scatter_sum(src=global_energy, index=batch, dim=0, dim_size=graphs)
        alike = start is None or (graphs == 1 and self.embeds_structures)
        attributes = data["node_attrs"]
        edges = self._edges(
            data["edge_index"], vectors, lengths, attributes, composition, alike, step_tables=step_tables
        )
        node_feats = self._node_feats(start, edges, composition)
        interaction = self._interaction_energies(pairs, node_feats, heads)
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
        outputs = {
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
            "node_feats": torch.cat(node_feats, dim=-1),
        }
        return checked(outputs, context.positions, lengths, batch, data["edge_index"][0])

    def _compiled_for_parts(self) -> Compiled | None:
        """The program for parts of space, made at the first call; None where there is none."""
        if self.compiled is not None and self.compiled_parts is None:
            layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
            self.compiled_parts = Compiled(self.__dict__["model"], layers, self.embedding, parts=True)
        return self.compiled_parts

    def _sorted(
        self, edge_index: Tensor, composition: Composition, step_tables: StepTables, part: Part | None = None
    ) -> Sorted | None:
        """Edges of a step for the program; None where some radial network has to be evaluated for each edge."""
        of_layers, numbers = step_tables
        layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
        if any(tables is None for tables in of_layers):
            return None
        tabulated = [Layer(layer.problem, *tables) for layer, tables in zip(layers, of_layers, strict=True) if tables]
        receiver = composition.place[edge_index[1]]
        sender = composition.place[edge_index[0]] if part is None else edge_index[0].contiguous()
        return Sorted(sender, receiver, numbers, tabulated)

    def why_not_parts(self) -> str | None:
        """Why `of_part` cannot compute the model; None where it can."""
        layers: AnyModule = self.layers  # of `Layer`s; a ModuleList knows modules only
        if self.embeds:
            return "it embeds charge, spin or other properties of structures, which LAMMPS does not hand over"
        if not all(layer.exchanges for layer in layers):
            return "edges read more of their senders than LAMMPS exchanges"
        return None

    def of_part(self, data: dict[str, AnyModule]) -> Outputs:
        """Compute what `ScaleShiftMACE.forward` returns for the data of MACE's class for LAMMPS's ML-IAP.

        These are ``vectors`` of edges from receiver to sender, (edges, 3) in Å, ``natoms``, the numbers of local atoms
        and of ghosts, and LAMMPS's object ``lammps_class``, beside MACE's own keys. Receivers are local atoms.

        Returns:
            ``edge_forces``, the derivative of the energy by the vectors, (edges, 3) in eV/Å, and energies in eV; of
            local atoms.

        Raises:
            Unsupported: if edges read more of their senders than what `gaq_mace.engine.ghosts` exchanges.
        """
        reason = self.why_not_parts()
        if reason is not None:
            raise Unsupported(reason)
        model: AnyModule = self.__dict__["model"]
        local, attributes, edge_index = int(data["natoms"][0]), data["node_attrs"], data["edge_index"]
        part = Part(local, attributes.argmax(dim=1), data["lammps_class"])
        composition = self.compositions(attributes[:local].contiguous())
        vectors = data["vectors"]
        heads = data["head"][data["batch"]].to(torch.int64) if "head" in data else torch.zeros_like(data["batch"])
        step_tables = self.compositions.tables(composition, edge_index, part.species)
        compiled, edges_of_part = self._compiled_for_parts(), self._sorted(edge_index, composition, step_tables, part)
        if compiled is not None and edges_of_part is not None:
            return compiled.step_of_part(model, data, part, composition, edges_of_part, heads)
        vectors = vectors.requires_grad_(True)
        lengths = vectors.norm(dim=-1, keepdim=True)
        node_e0 = model.atomic_energies_fn(attributes[:local])[torch.arange(local, device=heads.device), heads]
        pairs = torch.zeros_like(node_e0)
        if hasattr(model, "pair_repulsion"):
            pairs = model.pair_repulsion_fn(lengths, attributes, edge_index, model.atomic_numbers)[:local]
        edges = self._edges(edge_index, vectors, lengths, attributes, composition, False, part, step_tables)
        node_feats = self._node_feats(None, edges, composition)
        interaction = self._interaction_energies(pairs, node_feats, heads)
        interaction_energy = interaction.sum().view(1)
        (gradient,) = torch.autograd.grad([interaction_energy], [vectors], allow_unused=True)
        absent = dict.fromkeys(("forces", "virials", "stress", "atomic_virials", "atomic_stresses", "hessian"))
        return {
            "energy": node_e0.sum().to(vectors.dtype).view(1) + interaction_energy,
            "node_energy": node_e0.clone().double() + interaction.clone().double(),
            "interaction_energy": interaction_energy,
            "edge_forces": torch.zeros_like(vectors) if gradient is None else gradient,
            "displacement": None,
            "node_feats": torch.cat(node_feats, dim=-1),
            **absent,
        }

    def _interaction_energies(self, pairs: Tensor, node_feats: list[Tensor], heads: Tensor) -> Tensor:
        """Energy of each atom beyond that of an isolated one, (atoms,) in eV.

        Args:
            pairs: repulsion of pairs, (atoms,).
            node_feats: after each layer.
            heads: number of each atom's head, (atoms,).
        """
        model: AnyModule = self.__dict__["model"]
        atoms, energies = torch.arange(heads.shape[0], device=heads.device), [pairs]
        for i, readout in enumerate(model.readouts):
            layer_feats = node_feats[-1 if len(model.readouts) == 1 else i]
            energies.append(readout(layer_feats, heads)[atoms, heads])
        scaled: Tensor = model.scale_shift(torch.stack(energies, dim=0).sum(dim=0), heads)
        return scaled

    def _edges(
        self,
        edge_index: Tensor,
        vectors: Tensor,
        lengths: Tensor,
        attributes: Tensor,
        composition: Composition,
        alike: bool,
        part: Part | None = None,
        step_tables: StepTables | None = None,
    ) -> list[Edges]:
        """Edges of a step for each layer, atoms in the order of the composition; for `alike` see `EdgeFeatures`.

        On a part of space senders are in the order of the data. Radial tables are looked up where they are not
        given already.
        """
        model: AnyModule = self.__dict__["model"]
        species = composition.species if part is None else part.species
        if step_tables is None:
            step_tables = self.compositions.tables(composition, edge_index, None if part is None else species)
        tables, numbers = step_tables
        evaluated = self.reads_edges or any(of_layer is None for of_layer in tables)
        if (evaluated or any(self.transformed)) and not gpu.chosen(vectors.device):
            # A neighbour list with a skin has edges beyond the cutoff. On a GPU the host would have to wait for their
            # number.
            kept = ((lengths[:, 0] > 0) & (lengths[:, 0] < self.r_max)).nonzero()[:, 0]
            edge_index, vectors, lengths = edge_index[:, kept], vectors[kept], lengths[kept]
            numbers = None if numbers is None else numbers[kept]
        receiver = composition.place[edge_index[1]]
        sender = composition.place[edge_index[0]] if part is None else edge_index[0]
        graph = convolution.Graph(sender, receiver, numbers, None if part is None else part.local)
        features = None
        if evaluated:
            basis, cutoff = model.radial_embedding(lengths, attributes, edge_index, model.atomic_numbers)
            first, second = species[edge_index]
            inside = (lengths < self.r_max).to(basis.dtype)
            features = EdgeFeatures(basis, cutoff, inside, first, second, alike)
        edges = [Edges(graph, vectors, of_layer, features) for of_layer in tables]
        if part is not None:
            exchanged = Exchanged(part, composition.place)
            start = OfSpecies(self.embedding[:, None], part.species)
            edges = [dataclasses.replace(one, senders=exchanged if i else start) for i, one in enumerate(edges)]
        if not any(self.transformed):
            return edges
        embedding = model.radial_embedding
        distances = embedding.distance_transform(lengths, attributes, edge_index, model.atomic_numbers)
        scaled, cutoff = vectors * (distances / lengths), embedding.cutoff_fn(lengths)
        return [
            dataclasses.replace(of_layer, vectors=scaled, cutoff=cutoff) if transformed else of_layer
            for of_layer, transformed in zip(edges, self.transformed, strict=True)
        ]

    def _start(self, data: dict[str, Tensor], composition: Composition, graphs: int) -> Tensor | None:
        """Node features before the first layer, (atoms, channels), where they depend on more than the species.

        Such a model embeds charge, spin or other properties of a structure or of its atoms.
        """
        model: AnyModule = self.__dict__["model"]
        if not hasattr(model, "joint_embedding"):
            return None
        features = {name: data[name] for name in model.embedding_specs}
        added = embedded(model, features, data["batch"], graphs if self.embeds_structures else None)
        return self.embedding[composition.species] + added

    def _node_feats(self, start: Tensor | None, edges: list[Edges], composition: Composition) -> list[Tensor]:
        """Run the layers.

        Args:
            start: node features before the first layer, (atoms, channels) in the order of the data; None for those of
                the species.
            edges: of each layer.
            composition: species of the atoms.

        Returns:
            Node features after each layer, (atoms, irreps.dim) in e3nn's layout and the order of the data.
        """
        rows = self.embedding[composition.ordered] if start is None else start[composition.by_species]
        features = rows[:, None]
        node_feats = []
        layer: AnyModule  # a `Layer`; a ModuleList knows modules only
        for layer, layer_edges in zip(self.layers, edges, strict=True):
            features = layer(features, layer_edges, composition)
            node_feats.append(to_mul_ir(features, layer.out_rows)[composition.place])
        return node_feats
