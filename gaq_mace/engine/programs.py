"""An engine's layers and read-outs as a program, which one call of C++ runs forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.kernels import program
from gaq.kernels.gpu.graphs import Outputs
from gaq.kernels.program import Builder, Layer, Program, Value, View
from gaq.untyped import AnyModule
from gaq_mace.engine.compositions import Composition
from gaq_mace.engine.ghosts import Part
from gaq_mace.engine.interactions import AgnosticLayer
from gaq_mace.engine.layouts import Rounder
from gaq_mace.engine.linears import Mixing
from gaq_mace.engine.reading import Unsupported, class_name, input_quantizer_of, inputs_of, matrices_of, multiplicity
from gaq_mace.engine.soundness import checked

__all__ = ["Compiled", "Recorder", "Sorted"]

_FUNCTIONS: dict[object, str] = {torch.nn.functional.silu: "silu", torch.tanh: "tanh"}
_READOUTS = ("LinearReadoutBlock", "NonLinearReadoutBlock")


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


class Recorder:
    """Writes the operations of a model.

    Args:
        model: a `ScaleShiftMACE` in float32 or float64 on the CPU.
        layers: the engine's, of that model.
        embedding: features of each species before the first layer, (species, channels).
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
        embedding: Tensor,
        parts: bool,
        species: Tensor | None = None,
    ) -> None:
        scale = torch.atleast_1d(model.scale_shift.scale)
        self.builder = Builder(embedding.dtype, scale, torch.atleast_1d(model.scale_shift.shift), parts)
        self.species = torch.arange(len(embedding)) if species is None else species
        if hasattr(model, "pair_repulsion"):
            self.builder.repulsion(_repulsion(model, self.species))
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

    def _layer(self, layer: AnyModule, embedding: Tensor, features: Value | None) -> Value:
        """Operations of one layer; `features` is None for the first."""
        radial = layer.radial
        if type(layer) is not AgnosticLayer or radial is None or layer.reads_edges or radial.transformed:
            raise Unsupported("a layer reads more than radial tables over the distance")
        if layer.agnostic:
            raise Unsupported("a contraction knows no species")
        builder, channels = self.builder, layer.problem.channels
        sc: Value | None = None
        if features is None:
            # Everything before the first messages depends on the species alone.
            every = torch.arange(len(embedding))
            with torch.no_grad():
                sent = layer.mix(layer.up, embedding[:, None])
                kept = layer._skip(embedding[:, None], _each_its_own(every)) if layer.residual else None
            x = builder.gather(sent.flatten(1)[self.species], of_senders=True)
            if kept is not None:
                sc = builder.gather(kept.flatten(1)[self.species])
        else:
            if layer.residual:
                sc = self._skip(layer, features)
            x = builder.exchange(self._mix(layer, layer.up, features))
        x = builder.convolution(x, layer.problem.rows_out, channels)
        x = self._mixed_messages(layer, x)
        if radial.density is not None:
            x = builder.divide_by_density(x)
        if not layer.residual:
            x = self._skip(layer, x)
        x = builder.contraction(x, layer.polynomial, layer.contraction_coefficients[self.species])
        x = self._mix(layer, layer.final, x, sc if layer.use_sc and layer.residual else None)
        return self._round(x, layer.round_out)

    def _round(self, x: Value, rounder: Rounder) -> Value:
        if rounder.quantizer is None:
            return x
        if rounder.plan is None:
            raise Unsupported("the kernels do not round as a quantizer of the model does")
        return self.builder.round(x, rounder.plan)

    def _mix(self, layer: AnyModule, mixing: Mixing, x: Value, onto: Value | None = None) -> Value:
        x = self._round(x, mixing.round)
        channels = set(mixing.channels)
        if len(channels) != 1:
            raise Unsupported(f"outputs of {mixing.name} have different multiplicities")
        width_in, width = mixing.rows_in[-1].stop * mixing.round.channels, mixing.rows_out[-1].stop * mixing.channels[0]
        blocks = [
            (
                _rows(mixing.rows_in[i_in], mixing.round.channels, width_in),
                _rows(mixing.rows_out[out], mixing.channels[out], width),
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
        problem, rows, start = layer.problem, layer.problem.group_rows(), 0
        matrices = [getattr(layer, f"linear_{group}") for group in range(len(problem.groups))]
        channels = matrices[0].shape[1]
        width = sum(2 * l + 1 for l in problem.groups) * channels  # noqa: E741
        blocks = []
        for group, (l, matrix) in enumerate(zip(problem.groups, matrices, strict=True)):  # noqa: E741
            d, length = 2 * l + 1, matrix.shape[0]
            read = View(d, d * length, length, scaled_offset=sum(rows[:group]) * problem.channels)
            blocks.append((read, View(d, width, channels, start * channels), matrix))
            start += d
        return self.builder.linear(x, width, blocks)

    # -- read-outs --

    def _readout(self, readout: AnyModule, number: int, x: Value, width: int) -> None:
        path = f"readouts.{number}"
        if class_name(readout) not in _READOUTS:
            raise Unsupported(f"{path} is a {class_name(readout)}")
        if class_name(readout) == "LinearReadoutBlock":
            return self.builder.energy(self._scalars(readout.linear, path, x, width))
        (act,) = readout.non_linearity.acts
        kind = _FUNCTIONS.get(getattr(act, "f", None))
        if kind is None:
            raise Unsupported(f"{path} has an activation function of its own")
        x = self._scalars(readout.linear_1, path, x, width)
        x = self.builder.activation(x, kind, float(act.cst), int(getattr(readout, "num_heads", 1)))
        return self.builder.energy(self._scalars(readout.linear_2, path, x, x.memory.width))

    def _scalars(self, linear: AnyModule, path: str, x: Value, width: int) -> Value:
        """A linear layer from features to scalars."""
        (block,) = inputs_of(linear)[0]
        channels = multiplicity(linear.irreps_in, f"inputs of {path}")
        if block != 0 or linear.irreps_in[0].ir.l != 0 or linear.irreps_in.dim != width:
            raise Unsupported(f"{path} reads other features than the first scalars")
        x = self._round(x, Rounder(input_quantizer_of(linear), linear.irreps_in, channels))
        matrix = matrices_of(linear)[0]
        return self.builder.linear(x, matrix.shape[1], [(View(1, width, 0), View(1, matrix.shape[1], 0), matrix)])


class Compiled:
    """A program of an engine, and the steps that it computes; the arguments are those of `Recorder`.

    Raises:
        Unsupported: for layers and read-outs of which there are no operations.
    """

    def __init__(self, model: AnyModule, layers: Sequence[AnyModule], embedding: Tensor, parts: bool = False) -> None:
        recorder = Recorder(model, layers, embedding, parts)
        self.widths, self.program = recorder.widths, Program(recorder.recorded)

    # -- steps --

    def step(
        self, model: AnyModule, data: dict[str, Tensor], composition: Composition, sorted_edges: Sorted, virials: bool
    ) -> Outputs:
        """Compute energies, forces and, where asked for, virials of a batch, as `ScaleShiftMACE.forward` does.

        Args:
            model: of the engine.
            data: MACE's, on the CPU.
            composition: species of the atoms.
            sorted_edges: edges and radial tables of the step.
            virials: whether virials and stress are wanted.
        """
        positions, batch = data["positions"].detach().contiguous(), data["batch"]
        sender, receiver = data["edge_index"].contiguous()
        structures = data["ptr"].numel() - 1
        vectors = program.edge_vectors(positions, sender, receiver, data["shifts"].detach().contiguous())
        heads = data["head"][batch].to(torch.int64) if "head" in data else torch.zeros_like(batch)
        order = composition.by_species
        exports = [vectors.new_empty(batch.numel(), width) for width in self.widths]
        of_heads = heads[order] if "head" in data else None
        energies, grad = self._run(sorted_edges, vectors, composition, of_heads, exports)
        forces, strain = program.forces_and_strain(vectors, grad, sender, receiver, batch, structures, virials)
        interaction = energies[composition.place]
        node_e0 = model.atomic_energies_fn(data["node_attrs"])[torch.arange(batch.numel()), heads].detach()
        dtype = vectors.dtype
        of_structures = interaction.new_zeros(structures).index_add(0, batch, interaction).to(dtype)
        e0 = node_e0.new_zeros(structures).index_add(0, batch, node_e0).to(dtype)
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


def _each_its_own(species: Tensor) -> Composition:
    """Composition of one atom of each species."""
    bounds = [(z, z, z + 1) for z in species.tolist()]
    return Composition(b"", species, species, species, species, bounds, None, None)


def _rows(rows: slice, channels: int, width: int) -> View:
    """View of a block's rows in features of a width."""
    return View(rows.stop - rows.start, width, channels, rows.start * channels)


def _repulsion(model: AnyModule, species: Tensor) -> program.Repulsion:
    """The repulsion of nuclei of some species of a model; the numbers are those of MACE's `ZBLBasis`."""
    zbl, numbers = model.pair_repulsion_fn, model.atomic_numbers.cpu()[species]
    powers = numbers.double() ** float(zbl.a_exp)
    radii = zbl.covalent_radii.double().cpu()[numbers]
    return program.Repulsion(
        zbl.c.double(),
        14.3996 * numbers[:, None] * numbers[None],  # of integers: in torch's default dtype, as there
        (powers[:, None] + powers[None]) / (float(zbl.a_prefactor) * 0.529),
        radii[:, None] + radii[None],
        int(zbl.p),
    )
