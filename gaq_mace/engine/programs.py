"""An engine as a program, which one call of C++ runs forward and backward, and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gaq.kernels import program
from gaq.kernels.gpu.graphs import Outputs
from gaq.kernels.program import Program
from gaq.kernels.recording import Layer
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.ghosts import Part
from gaq_mace.engine.recorder import Recorder
from gaq_mace.engine.soundness import checked
from gaq_mace.engine.starts import Start

__all__ = ["Compiled", "Sorted"]


@dataclass(frozen=True)
class Sorted:
    """Edges of a step, atoms in the order of its composition, with their radial tables.

    Attributes:
        sender: of each edge, (edges,).
        receiver: of each edge, (edges,).
        tables: number of each edge's radial table, (edges,); None where there is one only.
        layers: convolutions with these tables.
    """

    sender: Tensor
    receiver: Tensor
    tables: Tensor | None
    layers: list[Layer]


class Compiled:
    """A program of an engine, and the steps that it computes; the arguments are those of `Recorder`.

    Raises:
        Unsupported: for layers and read-outs of which there are no operations.
    """

    def __init__(
        self, model: AnyModule, layers: Sequence[AnyModule], embedding: Tensor | None, parts: bool = False
    ) -> None:
        recorder = Recorder(model, layers, embedding, parts)
        self.widths, self.program = recorder.widths, Program(recorder.recorded)

    # -- steps --

    def step(
        self,
        model: AnyModule,
        data: dict[str, Tensor],
        composition: Composition,
        sorted_edges: Sorted,
        virials: bool,
        start: Start | None = None,
    ) -> Outputs:
        """Compute energies, forces and, where asked for, virials of a batch, as `ScaleShiftMACE.forward` does.

        Args:
            model: of the engine.
            data: MACE's, on the CPU.
            composition: species of the atoms.
            sorted_edges: edges and radial tables of the step.
            virials: whether virials and stress are wanted.
            start: what the program reads of each kind of atoms; None where kinds are species.
        """
        positions, batch = data["positions"].detach().contiguous(), data["batch"]
        sender, receiver = data["edge_index"].contiguous()
        structures = data["ptr"].numel() - 1
        vectors = program.edge_vectors(positions, sender, receiver, data["shifts"].detach().contiguous())
        heads = data["head"][batch].to(torch.int64) if "head" in data else torch.zeros_like(batch)
        order = composition.by_species
        exports = [vectors.new_empty(batch.numel(), width) for width in self.widths]
        of_heads = heads[order] if "head" in data else None
        energies, grad = self._run(sorted_edges, vectors, composition, of_heads, exports, start=start)
        forces, strain = program.forces_and_strain(vectors, grad, sender, receiver, batch, structures, virials)
        interaction = energies[composition.place]
        node_e0 = model.atomic_energies_fn(data["node_attrs"])[torch.arange(batch.numel()), heads].detach()
        dtype = vectors.dtype
        of_structures = interaction.new_zeros(structures).index_add(0, batch, interaction).to(dtype)
        e0 = node_e0.new_zeros(structures).index_add(0, batch, node_e0).to(dtype)
        if start is not None and start.energies is not None:
            # Not a part of the interaction energy: it does not depend on positions.
            of_kinds = start.energies[start.kinds[composition.place], heads]
            e0 = e0 + e0.new_zeros(structures).index_add(0, batch, of_kinds)
        outputs: Outputs = dict.fromkeys(("edge_forces", "atomic_virials", "atomic_stresses", "hessian"))
        outputs |= {
            "energy": e0 + of_structures,
            "node_energy": node_e0.double() + interaction,
            "interaction_energy": of_structures,
            "forces": forces,
            "virials": None,
            "stress": None,
            "displacement": vectors.new_zeros(structures, 3, 3),
            "node_feats": torch.cat(exports, dim=-1),
        }
        if strain is not None:
            volume = torch.linalg.det(data["cell"].detach().view(-1, 3, 3)).abs().view(-1, 1, 1)
            strain = strain.to(dtype)
            stress = strain / volume
            outputs["virials"] = -strain
            outputs["stress"] = torch.where(stress.abs() < 1e10, stress, torch.zeros_like(stress))
        return checked(outputs, positions, vectors.norm(dim=-1, keepdim=True), batch, sender)

    def _run(
        self,
        sorted_edges: Sorted,
        vectors: Tensor,
        composition: Composition,
        heads: Tensor | None,
        exports: list[Tensor],
        senders: Tensor | None = None,
        exchange: program.Exchange | None = None,
        start: Start | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Call the program; heads, (atoms,), and the energies that it returns are in the order of the composition."""
        return self.program(
            sorted_edges.layers,
            sorted_edges.sender,
            sorted_edges.receiver,
            vectors,
            composition.ordered,
            composition.slices,
            composition.by_species,
            senders=senders,
            tables=sorted_edges.tables,
            heads=heads,
            exports=exports,
            exchange=exchange,
            given=() if start is None else start.rows,
            kinds=None if start is None else start.kinds,
        )

    def step_of_part(
        self,
        model: AnyModule,
        data: dict[str, AnyModule],
        part: Part,
        composition: Composition,
        sorted_edges: Sorted,
        heads: Tensor,
    ) -> Outputs:
        """Compute energies and their gradient on a part of space; see `gaq_mace.engine.step.Engine.of_part`.

        Args:
            model: of the engine.
            data: of MACE's class for LAMMPS's ML-IAP.
            part: local atoms and ghosts.
            composition: species of the local atoms.
            sorted_edges: receivers in the order of the composition, senders in that of the data.
            heads: number of each local atom's head, (local,), int64.
        """
        vectors, order = data["vectors"].detach().contiguous(), composition.by_species

        def exchange(back: bool, rows: Tensor) -> None:
            source = rows.clone()
            (part.lammps.reverse_exchange if back else part.lammps.forward_exchange)(source, rows, rows.shape[1])

        exports = [vectors.new_empty(part.local, width) for width in self.widths]
        senders = part.species.contiguous()
        energies, grad = self._run(sorted_edges, vectors, composition, heads[order], exports, senders, exchange)
        interaction = energies[composition.place]
        atoms = torch.arange(part.local)
        node_e0 = model.atomic_energies_fn(data["node_attrs"][: part.local])[atoms, heads].detach()
        interaction_energy = interaction.sum().to(vectors.dtype).view(1)
        absent = ("forces", "virials", "stress", "atomic_virials", "atomic_stresses", "hessian", "displacement")
        return {
            "energy": node_e0.sum().to(vectors.dtype).view(1) + interaction_energy,
            "node_energy": node_e0.double() + interaction,
            "interaction_energy": interaction_energy,
            "edge_forces": grad,
            "node_feats": torch.cat(exports, dim=-1),
            **dict.fromkeys(absent),
        }
