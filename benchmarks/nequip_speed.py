"""Time of a step of compiled NequIP or Allegro models: stock FP32 against quantized ones, paired in one run.

    python benchmarks/nequip_speed.py --work DIR [--model MODEL.ckpt | --architecture nequip|unequal|attention|allegro]
                                      [--kinds gaq_fused ...] [--threads 1 2] [--processor-time] [--name NAME]

Each file is compiled once and kept in the working directory: FP32 by the stock command, the others by the function that
`nequip-deploy` uses. Kinds that end in `_fused` have the CPU kernels inside, as `nequip-deploy` makes them by default.
`fp32_fused` is the float model with the kernels, which shows what the kernels bring by themselves. It exists for this
comparison only, since `nequip-deploy` takes no float model. Its energies and forces are compared with those of the
stock file before anything is timed. Kinds that end in `_deployed` are files of `gaq deploy`, which Allegro has none of;
that command compares them with the model. The self-connection of NequIP's quantized files is also folded by atom type,
which is exact and no quantization; that of `w8_fused_unfolded` is not.

Times are wall times of the model alone, without neighbour list, on azobenzene and a dense periodic box of it. Nothing
else may run on the machine, unless `--processor-time` counts the processor's time instead, on one thread.
`--architecture` makes a checkpoint of the size of a general model with the stock command, by a few steps of training,
because values do not matter for time. NequIP has l_max 2, 4 layers, 64 features; `unequal` l_max 2, 3 layers, 64
scalars, 32 vectors and 16 features of l = 2 of each parity; `attention` l_max 1, 2 layers, 64 scalars and 32 vectors of
each parity and robust attention over messages, which stock NequIP compiles from our block in float; Allegro l_max 2, 2
layers, 64 scalar and 32 tensor features.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from ase.io import read
from common import SHARED, write_result
from nequip_presets import training_input

import gaq
from gaq.config.parse import parse_config
from gaq.deployed.check import default_tolerance
from gaq.deployed.neighbours import NeighbourList
from gaq.deployed.potential import Potential
from gaq.deployment import deploy
from gaq.kernels import program
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_nequip import files, freeze
from gaq_nequip.deploy import artefact
from gaq_nequip.deploy import compile as deploy_compile
from gaq_nequip.example import example_data, with_cell

FP32, FP32_FUSED = "fp32", "fp32_fused"
KINDS = (FP32_FUSED, "w8", "gaq", "w8_fused", "w8_fused_unfolded", "gaq_fused")
DEPLOYED = "_deployed"
"""End of the kinds that `gaq deploy` writes."""
WARM_UP = 3
"""First steps of each file, which are not counted."""

ARCHITECTURES: dict[str, Document] = {
    "nequip": {"_target_": "nequip.model.NequIPGNNModel", "num_layers": 4, "num_features": 64},
    "unequal": {"_target_": "nequip.model.NequIPGNNModel", "num_layers": 3, "num_features": [64, 32, 16]},
    "attention": {"_target_": "nequip.model.NequIPGNNModel", "num_layers": 2, "l_max": 1, "num_features": [64, 32]},
    "allegro": {
        "_target_": "allegro.model.AllegroModel",
        "num_layers": 2,
        "num_scalar_features": 64,
        "num_tensor_features": 32,
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8},
    },
}


def trained_briefly(args: argparse.Namespace) -> Path:
    """A checkpoint of `args.architecture`, trained by the stock command on the data and types of `args.model`."""
    folder: Path = args.work / args.architecture
    checkpoint = folder / "out" / "best.ckpt"
    if checkpoint.exists():
        return checkpoint
    folder.mkdir(exist_ok=True)
    training = argparse.Namespace(model=args.model, train=args.data, test=args.data, epochs=1)
    config = training_input(training, None, 1)
    module = config["training_module"]
    module.pop("ema_decay")
    module["_target_"] = "nequip.train.NequIPLightningModule"
    data = config["data"]
    module["model"] = {
        "seed": 1,
        "model_dtype": "float32",
        "type_names": next(t["model_type_names"] for t in data["transforms"] if "model_type_names" in t),
        "r_max": 5.0,
        "l_max": 2,
        "parity": True,
        "avg_num_neighbors": 20.0,
        **ARCHITECTURES[args.architecture],
    }
    if args.architecture == "attention":
        nothing = {"weights": None, "scalars": None, "vectors": None}
        config["quantization"] = {**nothing, "attention": {"messages": True, "bits": None, "gate_limit": 1e6}}
    config["trainer"] |= {"limit_train_batches": 10, "limit_val_batches": 2, "logger": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [str(Path(sys.executable).with_name("nequip-train")), "-cp", str(folder.resolve()), "-cn", "config"]
    with open(folder / "log.txt", "w") as log:
        subprocess.run([*command, "hydra.run.dir=hydra"], cwd=folder, stdout=log, stderr=log, check=True)
    return checkpoint


def compiled(args: argparse.Namespace, name: str) -> Path:
    """The compiled file of the float model or of a preset, rounded to nearest, since values do not matter for time."""
    from nequip.scripts import compile as nequip_compile

    path: Path = args.work / (f"{name}.gaq" if name.endswith(DEPLOYED) else f"{name}.nequip.pt2")
    if path.exists():
        return path
    if name == FP32 + DEPLOYED:
        deploy(args.model, path)
        return path
    data = with_cell(example_data(args.model))
    if name == FP32_FUSED:
        deploy_compile.compile_file(args.model, path, "ase", "cpu", fused=True, frozen=False)
        return path
    if name == FP32:
        arguments = [str(args.model), str(path), "--mode", "aotinductor", "--device", "cpu", "--target", "ase"]
        deploy_compile.save_data(data, args.work / "example.pt")
        arguments += ["--data-path", str(args.work / "example.pt")]
        nequip_compile.main(arguments)
        return path
    structures = read(args.data, ":16")
    preset = name.split("_")[0]
    spec = {"preset": preset, "weights": {"rounding": "nearest"}, "distillation": {"steps": 0}}
    model = gaq.quantize(gaq.load(args.model), structures, spec, progress=False)
    gaq.save(model, args.work / f"{name}.ckpt")
    if name.endswith(DEPLOYED):
        deploy(args.work / f"{name}.ckpt", path)
        return path
    tolerance = default_tolerance(parse_config(preset)) if parse_config(preset).rounds_activations else 0.0
    no_fold = mock.patch.object(freeze, "_foldable", return_value=None)
    with no_fold if name.endswith("_unfolded") else nullcontext():
        deploy_compile.compile_file(args.work / f"{name}.ckpt", path, "ase", "cpu", name != preset, tolerance)
    return path


class Deployed:
    """A file of `gaq deploy` with the methods of NequIP's calculator that are timed; edges belong to the data."""

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        self.symbols = sorted(set(symbols))
        self.potential = Potential(path, self.symbols)

    def atoms_to_data(self, atoms: Any) -> dict[str, torch.Tensor]:
        edges = NeighbourList(self.potential.r_max, 0.0)
        edges.update(atoms)
        return {
            "edge_index": torch.stack([edges.sender, edges.receiver]),
            "shifts": edges.shifts,
            "positions": torch.from_numpy(atoms.positions),
            "types": torch.tensor([self.symbols.index(symbol) for symbol in atoms.get_chemical_symbols()]),
        }

    def call_model(self, data: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forces, (atoms, 3)."""
        sender, receiver = data["edge_index"]
        vectors = program.edge_vectors(data["positions"], sender, receiver, data["shifts"])
        _, gradient = self.potential(data["types"], sender, receiver, vectors)
        structures = torch.zeros_like(data["types"])
        return program.forces_and_strain(vectors, gradient, sender, receiver, structures, 1, True)[0]


def calculator_of(path: Path, atoms: Any) -> Any:
    """What evaluates a file."""
    if path.suffix == ".gaq":
        return Deployed(path, atoms.get_chemical_symbols())
    return files.CompiledModel(path, "cpu").calculator()


def box_of(molecule: Any, per_side: int = 2, spacing: float = 6.8) -> Any:
    """A periodic box of rotated copies of a molecule, about as dense as the liquid."""
    centred = molecule.copy()
    centred.positions -= centred.positions.mean(0)
    box = None
    for i in range(per_side**3):
        other = centred.copy()
        other.rotate(37 * i, "x")
        other.rotate(61 * i, "z")
        other.positions += spacing * np.array([i % per_side, i // per_side % per_side, i // per_side**2])
        box = other if box is None else box + other
    assert box is not None
    box.set_cell([per_side * spacing] * 3)
    box.pbc = True
    box.wrap()
    return box


def same_function(fused: Path, calculators: Document, atoms: Any) -> dict[str, float]:
    """Difference of the fused float model to the stock one, in eV/atom and eV/Å.

    Raises:
        RuntimeError: if float32 sums and the interpolated radial network do not explain the difference, or if the file
            contains none of our kernels, so that it would be a stock file with another name.
    """
    with zipfile.ZipFile(fused) as archive:
        library = next(name for name in archive.namelist() if name.endswith(".so"))
        if b"torch.ops.gaq." not in archive.read(library):
            raise RuntimeError(f"{fused}: no fused kernels in it")
    results = []
    for name in (FP32, FP32_FUSED):
        copy = atoms.copy()
        copy.calc = calculators[name]
        results.append((copy.get_potential_energy(), copy.get_forces()))
    (energy, forces), (other_energy, other_forces) = results
    scale = float(np.abs(forces).max())
    difference = {
        "energy_per_atom_ev": float(abs(energy - other_energy)) / len(atoms),
        "forces_ev_per_angstrom": float(np.abs(forces - other_forces).max()),
        "largest_force_ev_per_angstrom": scale,
    }
    # NequIP's own bound between a compiled float32 model and the plain one.
    bound = 5e-5 * max(1.0, scale)
    if difference["energy_per_atom_ev"] > bound or difference["forces_ev_per_angstrom"] > bound:
        raise RuntimeError(f"{FP32_FUSED} is not the function of {FP32}: {difference}")
    return difference


def step_times(
    calculators: Document, atoms: Any, rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Seconds of each step by kind of file, the kinds in turn, and the number of edges that each kind sees."""
    data = {name: calculator.atoms_to_data(atoms) for name, calculator in calculators.items()}
    times: dict[str, list[float]] = {name: [] for name in calculators}
    calls = 3 if len(atoms) < 100 else 1
    for _ in range(rounds + WARM_UP):
        for name, calculator in calculators.items():
            start = clock()
            for _ in range(calls):
                calculator.call_model(data[name])
            times[name].append((clock() - start) / calls)
    edges = {name: int(graph["edge_index"].shape[1]) for name, graph in data.items()}
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}, edges


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHARED / "models/nequip_azobenzene.ckpt")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), help="in place of MODEL's")
    parser.add_argument("--data", type=Path, default=SHARED / "data/rmd17/azobenzene_test_01.xyz")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--processor-time", action="store_true", help="on one thread, where other programs run")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--name", default="nequip_speed", help="of the result file")
    args = parser.parse_args()
    if args.processor_time and args.threads != [1]:
        parser.error("--processor-time adds up the times of all threads: it needs --threads 1.")
    return args


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(max(args.threads))
    if args.architecture:
        args.model = trained_briefly(args)
    paths = {name: compiled(args, name) for name in (FP32, *args.kinds)}
    slimmed = args.work / "fp32_slimmed.nequip.pt2"
    artefact.slim(paths[FP32], slimmed)
    molecule = read(args.data, 0)
    calculators: Document = {name: calculator_of(path, molecule) for name, path in paths.items()}
    structures = (("molecule", molecule), ("periodic box", box_of(molecule)))
    extra: Document = {}
    if FP32_FUSED in paths:
        differences = {label: same_function(paths[FP32_FUSED], calculators, atoms) for label, atoms in structures}
        print(f"{FP32_FUSED} against {FP32}: {differences}", flush=True)
        extra["fp32_fused_against_fp32"] = differences
    rows = []
    clock = time.process_time if args.processor_time else time.perf_counter
    for threads, (label, atoms) in itertools.product(args.threads, structures):
        torch.set_num_threads(threads)
        times, edges = step_times(calculators, atoms, args.rounds, clock)
        for name, seconds in times.items():
            rows.append(
                {
                    "scheme": name,
                    "structure": label,
                    "atoms": len(atoms),
                    "edges": edges[name],
                    "threads": threads,
                    "median_ms": float(1e3 * np.median(seconds)),
                    "times_faster": float(np.median(times[FP32] / seconds)),
                    "file_bytes": paths[name].stat().st_size,
                    "file_bytes_equally_slimmed": slimmed.stat().st_size if name == FP32 else None,
                }
            )
    write_result(args.name, rows, work=args.work, model=args.architecture or args.model.name, **extra)
    shown = [
        {
            "scheme": row["scheme"],
            "atoms": row["atoms"],
            "threads": row["threads"],
            "ms": f"{row['median_ms']:.2f}",
            "times faster": f"{row['times_faster']:.2f}",
            "KiB": f"{row['file_bytes'] / 1024:.0f}",
        }
        for row in rows
    ]
    print(markdown_table(shown, list(shown[0])))


if __name__ == "__main__":
    main()
