"""What a deployed file holds, and how it is written and described.

It is a safetensors file. `gaq/kernels/cpu/potential.cpp` reads these tensors, L standing for the number of a layer:

====================  ==================================================================================
``form``              version, bytes of a feature, species, heads, layers, most numbers that are exchanged
``elements``          chemical symbols of the species, one in a line, as bytes
``heads``             names of the heads, likewise
``r_max``             cutoff in Å
``isolated_atoms``    energies of isolated atoms, (heads, species) in eV
``pairs``             number of the radial table of each pair of species, (species, species)
``code`` ...          the program: `gaq.kernels.recording.Recorded`
``L.plan_ints`` ...   the convolution, as `ConvolutionProblem.plan` writes it
``L.tables``          features before the last layer of the radial network, (tables, intervals, COEFFICIENTS, features)
``L.last``            that layer, (paths, features, channels): tables times it are made when a file is opened
``L.density``         tables of the edge density, (tables, intervals * COEFFICIENTS), where there is one
``L.density_size``    numbers of one of them
====================  ==================================================================================

The metadata say in JSON where the model came from, how it is quantized, and which gates it failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gaq.files.whole import let_others_read, written_whole
from gaq.kernels import signatures
from gaq.kernels.convolution import ConvolutionProblem
from gaq.kernels.recording import Recorded
from gaq.untyped import Document

__all__ = ["METADATA", "SUFFIX", "Deployable", "DeployedLayer", "check_tables", "metadata_of", "sizes_of", "write"]

SUFFIX = ".gaq"
MOST_TABLES = 2**28
"""Most bytes of the radial tables of a file."""
METADATA = "gaq_deployed"
"""Key of the metadata of a deployed file."""


@dataclass(frozen=True)
class DeployedLayer:
    """Convolution of a layer, with its radial functions.

    Attributes:
        problem: of the convolution.
        tables: features before the last layer of the radial network as polynomials of `gaq.kernels.radial`, (tables,
            intervals, COEFFICIENTS, features), float64.
        last: last layer of the radial network, (paths, features, channels), float64.
        density: edge density as polynomials, (tables, intervals, COEFFICIENTS), float64; None where there is none.
    """

    problem: ConvolutionProblem
    tables: Tensor
    last: Tensor
    density: Tensor | None = None


@dataclass(frozen=True)
class Deployable:
    """A model as a program for parts of space, with all that a step needs.

    Attributes:
        recorded: the program.
        layers: its convolutions.
        pairs: number of the radial table of each pair of species, (species, species), int64.
        elements: chemical symbol of each species.
        heads: names of the heads; one of any name for a model without heads.
        r_max: cutoff in Å.
        isolated_atoms: energies of isolated atoms, (heads, species) in eV, float64.
    """

    recorded: Recorded
    layers: list[DeployedLayer]
    pairs: Tensor
    elements: list[str]
    heads: list[str]
    r_max: float
    isolated_atoms: Tensor


def check_tables(bytes_of_pair: int, pairs: int) -> None:
    """Refuse radial tables that would make a file of an unreasonable size.

    Args:
        bytes_of_pair: of the tables of one pair of species.
        pairs: number of pairs.

    Raises:
        ValueError: saying what to choose.
    """
    if bytes_of_pair * pairs > MOST_TABLES:
        raise ValueError(
            f"radial tables of {pairs} pairs of elements would take {bytes_of_pair * pairs / 2**20:.0f} MiB, more than "
            f"{MOST_TABLES >> 20}: choose the elements of your simulation, such as --elements Li,P,S."
        )


def write(path: Path, model: Deployable, metadata: Document) -> None:
    """Write a deployed file.

    Args:
        path: of the file, whole or absent.
        model: what it holds.
        metadata: plain data about the model.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors.torch import save_file

    recorded = model.recorded
    form = [signatures.DEPLOYED_VERSION, recorded.dtype.itemsize, len(model.elements), len(model.heads)]
    tensors = {
        "form": torch.tensor([*form, len(model.layers), recorded.width]),
        "elements": _text(model.elements),
        "heads": _text(model.heads),
        "r_max": torch.tensor([model.r_max], dtype=torch.float64),
        "isolated_atoms": model.isolated_atoms.double(),
        "pairs": model.pairs,
        "code": recorded.words,
        "ints": recorded.ints,
        "reals": recorded.reals,
        "constants": recorded.constants,
        "weights": recorded.weights,
    }
    for number, layer in enumerate(model.layers):
        ints, reals = layer.problem.plan(layer.tables.shape[1])
        tensors |= {f"{number}.plan_ints": ints, f"{number}.plan_reals": reals}
        tensors |= {f"{number}.tables": layer.tables, f"{number}.last": layer.last}
        if layer.density is not None:
            density = layer.density.flatten(1)
            tensors |= {f"{number}.density": density, f"{number}.density_size": torch.tensor([density.shape[1]])}
    with written_whole(path) as part:
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, {METADATA: json.dumps(metadata)})
        let_others_read(part)


def _text(names: list[str]) -> Tensor:
    """Names as bytes, one in a line."""
    return torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8)


def metadata_of(path: Path) -> Document:
    """Metadata of a deployed file.

    Raises:
        ValueError: if it is none, or damaged.
    """
    described: Mapping[str, str] = _header(path).get("__metadata__", {})
    if METADATA not in described:
        raise ValueError(f"{path}: is not a file that `gaq deploy` writes.")
    document: Document = json.loads(described[METADATA])
    return document


def sizes_of(path: Path) -> dict[str, int]:
    """Bytes of a deployed file by what they are: weights, radial tables, and the rest."""
    sizes = {"weights": 0, "radial tables": 0, "rest": 0}
    for name, entry in _header(path).items():
        if name == "__metadata__":
            continue
        kind = "weights" if name in ("weights", "constants") else "rest"
        if name.endswith((".tables", ".last", ".density")):
            kind = "radial tables"
        begin, end = entry["data_offsets"]
        sizes[kind] += end - begin
    sizes["rest"] = path.stat().st_size - sizes["weights"] - sizes["radial tables"]
    return sizes


def _header(path: Path) -> Document:
    """Header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: is not a file that `gaq deploy` writes.")
        try:
            header: Document = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: is not a file that `gaq deploy` writes.") from error
    return header
