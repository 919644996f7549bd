"""How many bits scalar features need: energy noise, central differences, bond scan, forces and time of a step.

    python benchmarks/scalar_bits.py [--dense DIR] [--cases molecule alloy water salt foundation]

Run it in MACE's environment, then in NequIP's: the rows of the cases measured replace those in the result file. DIR
holds trained models of periodic cells, ``KIND.model`` with ``KIND_test.xyz``; `benchmarks/dense_models.py` makes them.
Cases whose files are not there are left out, and named.

All numbers but times are taken in float64 through the fused kernels. Weights are rounded to nearest; they do not move
with the atoms and add no noise. "Noise" is what the rounding of features adds to the energy between positions 0.01 Å
apart: standard deviation of rounded minus exact features, of the same weights. Times are processor time of a step of
MACE's calculator in float32, alternating, as ratios to 16 bits.
"""

from __future__ import annotations

import argparse
import copy
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result

import gaq
from gaq.adapter import Adapter, adapter_for, adapters
from gaq.checks.conservation import central_difference_error
from gaq.checks.errors import spaced
from gaq.checks.potential import Potential
from gaq.checks.smoothness import bond_stretch_scan
from gaq.quantizers.weights import largest_code
from gaq.reporting.tables import markdown_table

NAME = "scalar_bits"
WIDTHS = (16, 18, 20, 22, 24)
SETTINGS = [*((scalars, 16) for scalars in WIDTHS), (20, 18), (24, 18), (None, 16)]
"""Bits of scalars and of vectors (magnitude, and each angle); None: exact."""
STEP = 0.01  # Å
STRUCTURES = 3
SPAN, POINTS = (-0.2, 0.1), 61
"""Part of the scan of `gaq report` where a bond is stiffest, with its spacing of 5 mÅ."""


@dataclass
class Case:
    """A model with the structures it is measured on.

    Attributes:
        kind: name in the tables.
        model: the float model.
        structures: of this model's kind, away from equilibrium.
        displacements: of random atoms, for the noise, in each structure.
        points: of the bond-stretch scan.
        settings: of `SETTINGS`, those that are measured.
        timed: widths of scalars whose step is timed, 16 among them.
        repeats: timed steps; 0: none.
    """

    kind: str
    model: torch.nn.Module
    structures: list[Atoms]
    displacements: int = 6
    points: int = POINTS
    settings: Sequence[tuple[int | None, int | None]] = tuple(SETTINGS)
    timed: Sequence[int] = WIDTHS
    repeats: int = 25


def random_alloy(elements: list[int], seed: int = 0) -> Atoms:
    """A rattled fcc cell of 16 atoms of these elements."""
    rng = np.random.default_rng(seed)
    cell = bulk("Cu", "fcc", a=4.0, cubic=True) * (2, 2, 1)
    cell.numbers = rng.choice(elements, size=len(cell))
    cell.positions += rng.normal(scale=0.1, size=cell.positions.shape)
    return cell


def cases(arguments: argparse.Namespace) -> dict[str, Callable[[], Case | None]]:
    """Makers of the cases that this environment can measure, by name."""
    name, path = "molecule", SHARED / "models/mace_azobenzene.model"
    if "nequip" in adapters():
        name, path = "nequip molecule", SHARED / "models/nequip_azobenzene.ckpt"

    def molecule() -> Case:
        frames = read(SHARED / "data/rmd17/azobenzene_test_01.xyz", ":")
        return Case(name, gaq.load(path), spaced(frames, STRUCTURES))

    if "nequip" in adapters():
        return {"molecule": molecule}

    def dense(kind: str) -> Case | None:
        path, test = arguments.dense / f"{kind}.model", arguments.dense / f"{kind}_test.xyz"
        if not path.is_file() or not test.is_file():
            return None
        frames = [atoms for atoms in read(test, ":") if 50 <= len(atoms) <= 200]
        return Case(kind, gaq.load(path), spaced(frames, arguments.structures))

    def foundation() -> Case:
        from mace_speed import big_model

        elements = [*range(1, 84), *range(89, 95)]
        structures = [random_alloy([13, 22, 26, 28, 29, 47, 79])]
        few = ((16, 16), (20, 16), (24, 16), (20, 18))
        return Case("foundation", big_model(elements).eval(), structures, 6, 31, few, (16, 20), 8)

    periodic = {kind: functools.partial(dense, kind) for kind in ("alloy", "water", "salt")}
    return {"molecule": molecule, **periodic, "foundation": foundation}


def quantized(model: torch.nn.Module, structures: list[Atoms], scalars: int = 16) -> torch.nn.Module:
    """The model converted by the default preset, with weights rounded to nearest."""
    options = {"weights": {"rounding": "nearest"}, "distillation": {"steps": 0}, "scalars": {"bits": scalars}}
    prepared = gaq.prepare(copy.deepcopy(model), {"preset": "gaq", **options})
    gaq.calibrate(prepared, structures[:1], progress=False)
    return gaq.convert(prepared)


def with_bits(adapter: Adapter, model: torch.nn.Module, scalars: int | None, vectors: int | None) -> Potential:
    """A copy of a converted model whose features have other bits."""
    model = copy.deepcopy(model)
    for quantizer in adapter.feature_quantizers(model).values():
        quantizer.scalars_enabled = scalars is not None
        quantizer.vectors_enabled = vectors is not None
        if scalars is not None:
            quantizer.scalar_top = float(largest_code(scalars))
        if vectors is not None:
            quantizer.magnitude_top = float(2**vectors - 1)
            quantizer.levels = 2 ** (vectors - 1) - 1  # as `gaq.codebooks.direction_levels`, beyond 16 bits
    return adapter.potential(model)


def displaced(structures: list[Atoms], count: int) -> list[Atoms]:
    """Pairs of structures with one atom moved by plus and minus `STEP` in a random direction."""
    rng = np.random.default_rng(0)
    pairs = []
    for atoms in structures:
        for _ in range(count):
            moved, direction = int(rng.integers(len(atoms))), rng.normal(size=3)
            for sign in (1.0, -1.0):
                pair = atoms.copy()
                pair.positions[moved] += sign * STEP * direction / np.linalg.norm(direction)
                pairs.append(pair)
    return pairs


def measure(case: Case) -> list[dict[str, Any]]:
    adapter = adapter_for(case.model)
    atoms = [len(s) for s in case.structures]
    with adapter.process_state():
        converted = adapter.in_float64(quantized(case.model, case.structures))
        floating = adapter.potential(adapter.in_float64(case.model))
        smooth = with_bits(adapter, converted, None, None)
        points = displaced(case.structures, case.displacements)
        energies = np.asarray(smooth(points)[0])
        forces = np.concatenate(smooth(case.structures)[1])
        float_forces = np.concatenate(floating(case.structures)[1])
        size = float(np.sqrt((float_forces**2).mean()))
        scanned: list[Any] = []
        span = (SPAN[0], SPAN[0] + (SPAN[1] - SPAN[0]) * (case.points - 1) / (POINTS - 1))

        def reference(structures: Any) -> Any:
            """The float model along the scan, which is the same for every width."""
            if not scanned:
                scanned.append(floating(structures))
            return scanned[0]

        rows = []
        for scalars, vectors in [*case.settings, (None, None)]:
            potential = with_bits(adapter, converted, scalars, vectors)
            noise = np.asarray(potential(points)[0]) - energies
            difference = noise[::2] - noise[1::2]
            rounded = np.concatenate(potential(case.structures)[1])
            errors = central_difference_error(potential, case.structures, steps=(STEP,))
            scan = bond_stretch_scan(potential, case.structures[0], reference, span=span, points=case.points)
            rows.append(
                {
                    "kind": case.kind,
                    "atoms": atoms,
                    "scalar_bits": scalars,
                    "vector_bits": vectors,
                    "noise_mev": 1e3 * float(difference.std() / np.sqrt(2)),
                    "noise_mev_per_atom": 1e3 * float(difference.std() / np.sqrt(2) / np.mean(atoms)),
                    "noise_of_central_differences": float(np.sqrt((difference**2).mean()) / (2 * STEP) / size),
                    "central_difference_error": errors[STEP].relative_error,
                    "scan_jump_mev": scan.largest_jump_mev,
                    "scan_allowed_mev": scan.allowed_mev,
                    "force_rms_mev_per_angstrom": 1e3 * size,
                    "force_change_by_features_mev_per_angstrom": 1e3 * float(np.abs(rounded - forces).mean()),
                    "force_change_mev_per_angstrom": 1e3 * float(np.abs(rounded - float_forces).mean()),
                }
            )
            print(rows[-1], flush=True)
    ratios = step_times(case) if case.repeats and adapter.name == "mace" else {}
    for row in rows:
        if row["vector_bits"] == 16 and row["scalar_bits"] in ratios:
            row |= ratios[row["scalar_bits"]]
    return rows


def step_times(case: Case) -> dict[int, dict[str, float]]:
    """Processor time of a step in float32 for each width of scalars, and its ratio to 16 bits in the same round."""
    from mace.calculators import MACECalculator

    calculators = {}
    atoms = max(case.structures, key=len).copy()
    with tempfile.TemporaryDirectory() as folder:
        for bits in case.timed:
            path = Path(folder) / f"{bits}.model"
            gaq.save(quantized(case.model, case.structures, bits), path)
            calculators[bits] = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float32")
    rng = np.random.default_rng(0)
    times: dict[int, list[float]] = {bits: [] for bits in case.timed}
    start_positions = atoms.positions.copy()
    for repeat in range(case.repeats + 2):
        atoms.positions = start_positions + rng.normal(scale=0.005, size=start_positions.shape)
        # The order turns, so that no width always follows the same one.
        first = repeat % len(case.timed)
        for bits in (*case.timed[first:], *case.timed[:first]):
            start = time.process_time()
            calculators[bits].calculate(atoms, ["energy", "forces"])
            if repeat >= 2:
                times[bits].append(time.process_time() - start)
    base = np.array(times[16])
    return {
        bits: {
            "seconds_per_step": float(np.median(values)),
            "ratio_to_16_bits": float(np.median(np.array(values) / base)),
        }
        for bits, values in times.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Tables by kind of model, in the units of the text."""
    text = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shown = []
        for row in rows:
            if row["kind"] != kind:
                continue
            bits = ["exact" if row[key] is None else str(row[key]) for key in ("scalar_bits", "vector_bits")]
            ratio = row.get("ratio_to_16_bits")
            shown.append(
                {
                    "scalars": bits[0],
                    "vectors": bits[1],
                    "noise, µeV/atom": f"{1e3 * row['noise_mev_per_atom']:.4f}",
                    "central differences, %": f"{100 * row['central_difference_error']:.3f}",
                    "bond scan, meV": f"{row['scan_jump_mev']:.3f} of {row['scan_allowed_mev']:.3f}",
                    "forces by features, meV/Å": f"{row['force_change_by_features_mev_per_angstrom']:.4f}",
                    "forces against float, meV/Å": f"{row['force_change_mev_per_angstrom']:.3f}",
                    "step / 16 bits": "" if ratio is None else f"{ratio:.3f}",
                }
            )
        sizes = ", ".join(map(str, sorted({n for row in rows if row["kind"] == kind for n in row["atoms"]})))
        text.append(f"{kind} ({sizes} atoms)\n\n{markdown_table(shown, list(shown[0]))}")
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, default=Path("dense"), help="folder of the models of periodic cells")
    parser.add_argument("--cases", nargs="*", default=["molecule", "alloy", "water", "salt", "foundation"])
    parser.add_argument("--structures", type=int, default=STRUCTURES, help="of a periodic kind")
    parser.add_argument("--points", type=int, default=POINTS, help="of the bond scan, 5 mÅ apart")
    parser.add_argument("--settings", nargs="*", default=[], help="bits of scalars and vectors to measure: 16,16 20,16")
    parser.add_argument("--repeats", type=int, default=None, help="timed steps; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    makers = cases(arguments)
    rows: list[dict[str, Any]] = load_json(RESULTS / f"{NAME}.json").get("rows", [])
    for name in arguments.cases:
        case = makers[name]() if name in makers else None
        if case is None:
            print(f"left out: {name}", flush=True)
            continue
        if arguments.settings:
            pairs = (setting.split(",") for setting in arguments.settings)
            case.settings = [(int(scalars), int(vectors)) for scalars, vectors in pairs]
        case.points = min(case.points, arguments.points)
        case.repeats = case.repeats if arguments.repeats is None else arguments.repeats
        command = shlex.join(sys.argv[1:]).replace(str(arguments.dense), "DIR")
        measured = [{**row, "arguments": command} for row in measure(case)]
        rows = [row for row in rows if row["kind"] != case.kind] + measured
        write_result(NAME, rows, work=arguments.dense)
    print(table(rows))


if __name__ == "__main__":
    main()
