"""How many bits scalar features need: energy noise, central differences, bond scan, forces and time of a step.

    python benchmarks/scalar_bits.py DIR [--cases molecule alloy water salt many "MP-0 small" "MP-0 medium"]

Run it in MACE's environment, then in NequIP's. DIR holds trained models of periodic cells, ``KIND.model`` with
``KIND_test.xyz``; `benchmarks/dense_models.py` makes them. A case whose files are not there is left out, and named.
Finished rows are kept in DIR/scalar_bits: the command goes on where it was stopped, and a row is measured again only if
the model or what is measured on it has changed. Rows of cases that DIR does not hold stay in the result file. Models of
`foundation_shapes` have random weights, scaled to forces of 1 eV/Å.

All numbers but times are taken in float64 through the fused kernels, on `STRUCTURES` structures; of periodic ones the
last is doubled along its first axis. Weights are rounded to nearest; they do not move with the atoms and add no noise.
"Noise" is what the rounding of features adds to the energy between positions 0.01 Å apart: standard deviation of
rounded minus exact features, of the same weights, where central differences are taken. Times are processor time of
energy and forces of one structure in float32, neighbour lists included, the widths in turn, as ratios to 16 bits.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from common import RESULTS, SHARED, load_json, write_result

import gaq
from gaq.adapter import Adapter, adapter_for, adapters
from gaq.checks.conservation import central_difference_error
from gaq.checks.errors import spaced
from gaq.checks.potential import Potential, energies_of
from gaq.checks.smoothness import bond_stretch_scan
from gaq.quantizers.weights import largest_code
from gaq.reporting.environment import versions
from gaq.reporting.tables import markdown_table

NAME = "scalar_bits"
WIDTHS = (16, 18, 20, 22, 24)
EXACT = (None, None)
SETTINGS = [*((scalars, 16) for scalars in WIDTHS), (20, 18), (None, 16), EXACT]
"""Bits of scalars and of vectors (magnitude, and each angle); None: exact."""
DEFAULT_BITS = gaq.parse_config("gaq").scalars.bits or 16
FIRST = [(16, 16), (DEFAULT_BITS, 16), EXACT]
"""Measured before the others, so that an interrupted run says most."""
STEP = 0.01  # Å
STRUCTURES, COMPONENTS = 3, 8
SPAN, POINTS = (-0.2, -0.05), 31
"""The part of the scan of `gaq report` where a bond is stiffest, with its spacing of 5 mÅ."""
PERIODIC = ("alloy", "water", "salt", "many")
SHAPES = ("MP-0 small", "MP-0 medium")


@dataclass
class Case:
    """A float model with the structures it is measured on.

    Attributes:
        kind: name in the tables.
        path: file of the model.
        structures: away from equilibrium; with labels if the model is trained.
    """

    kind: str
    path: Path
    structures: list[Atoms]

    @property
    def trained(self) -> bool:
        return "REF_forces" in self.structures[0].arrays


def periodic(frames: Sequence[Atoms]) -> list[Atoms]:
    """Cells of 50 to 200 atoms; the last of them is doubled."""
    cells = spaced([atoms for atoms in frames if 50 <= len(atoms) <= 200], STRUCTURES)
    return [*cells[:-1], cells[-1].repeat((2, 1, 1))]


def cases(work: Path) -> dict[str, Callable[[], Case]]:
    """Makers of the cases that this environment can measure and whose files exist, by name."""
    nequip = "nequip" in adapters()
    model = SHARED / "models" / ("nequip_azobenzene.ckpt" if nequip else "mace_azobenzene.model")
    test = SHARED / "data/rmd17/azobenzene_test_01.xyz"

    def molecule() -> Case:
        return Case("nequip molecule" if nequip else "molecule", model, spaced(read(test, ":"), STRUCTURES))

    def dense(kind: str) -> Case:
        return Case(kind, work / f"{kind}.model", periodic(read(work / f"{kind}_test.xyz", ":")))

    def shape(name: str) -> Case:
        import foundation

        folder = work / NAME / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "steps.xyz").exists():
            foundation.make(name, folder, STRUCTURES)
        return Case(f"{name}, random weights", folder / "float.model", periodic(read(folder / "cells.xyz", ":")))

    makers: dict[str, Callable[[], Case]] = {"molecule": molecule} if model.is_file() and test.is_file() else {}
    if nequip:
        return makers
    there = [kind for kind in PERIODIC if all((work / f"{kind}{end}").is_file() for end in (".model", "_test.xyz"))]
    makers |= {kind: functools.partial(dense, kind) for kind in there}
    return makers | {name: functools.partial(shape, name) for name in SHAPES}


def quantized(model: torch.nn.Module, structures: list[Atoms]) -> torch.nn.Module:
    """The model converted by the default preset, with weights rounded to nearest."""
    options = {"weights": {"rounding": "nearest"}, "distillation": {"steps": 0}}
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


class Recorded:
    """A potential that keeps the forces, and the energies of displaced structures, that it returned last."""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.displaced, self.forces = np.zeros(0), [np.zeros(0)]

    def __call__(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies, self.forces = self.potential(structures)
        return energies, self.forces

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        self.displaced = energies_of(self.potential, structures)
        return self.displaced


class Measurement:
    """What all settings of a case share: the rounded weights, exact features and the float model."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.float_model = gaq.load(case.path)
        self.adapter = adapter_for(self.float_model)

    @functools.cached_property
    def rounded(self) -> torch.nn.Module:
        """The converted model in the dtype of the float one."""
        with self.adapter.process_state():
            return quantized(self.float_model, self.case.structures)

    @functools.cached_property
    def converted(self) -> torch.nn.Module:
        with self.adapter.process_state():
            return self.adapter.in_float64(self.rounded)

    @functools.cached_property
    def float_potential(self) -> Potential:
        return self.adapter.potential(self.adapter.accelerate(self.adapter.in_float64(self.float_model)))

    @functools.cached_property
    def exact(self) -> tuple[float, Recorded]:
        """Central differences with exact features."""
        return self.central_difference(*EXACT)

    @functools.cached_property
    def float_forces(self) -> np.ndarray:
        return np.concatenate(self.float_potential(self.case.structures)[1])

    def reference(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The float model along the scan, which is the same for every setting."""
        if not hasattr(self, "scanned"):
            self.scanned = self.float_potential(structures)
        return self.scanned

    def central_difference(self, scalars: int | None, vectors: int | None) -> tuple[float, Recorded]:
        """The relative error, with the forces of the structures and the energies of the pairs of displaced ones."""
        recorded = Recorded(with_bits(self.adapter, self.converted, scalars, vectors))
        errors = central_difference_error(recorded, self.case.structures, (STEP,), COMPONENTS)
        return errors[STEP].relative_error, recorded

    def row(self, scalars: int | None, vectors: int | None) -> dict[str, Any]:
        structures = self.case.structures
        count, atoms = len(structures), np.array([len(one) for one in structures])
        error, recorded = self.exact if (scalars, vectors) == EXACT else self.central_difference(scalars, vectors)
        noise = recorded.displaced - self.exact[1].displaced
        difference = noise[::2] - noise[1::2]
        forces, exact = (np.concatenate(one.forces[:count]) for one in (recorded, self.exact[1]))
        size = float(np.sqrt((self.float_forces**2).mean()))
        scan = bond_stretch_scan(recorded.potential, structures[0], self.reference, span=SPAN, points=POINTS)
        row = {
            "kind": self.case.kind,
            "atoms": atoms.tolist(),
            "scalar_bits": scalars,
            "vector_bits": vectors,
            "noise_mev": 1e3 * float(difference.std() / np.sqrt(2)),
            "noise_mev_per_atom": 1e3 * float((difference / np.repeat(atoms, COMPONENTS)).std() / np.sqrt(2)),
            "noise_of_central_differences": float(np.sqrt((difference**2).mean()) / (2 * STEP) / size),
            "central_difference_error": error,
            "scan_jump_mev": scan.largest_jump_mev,
            "scan_allowed_mev": scan.allowed_mev,
            "force_rms_mev_per_angstrom": 1e3 * size,
            "force_change_by_features_mev_per_angstrom": 1e3 * float(np.abs(forces - exact).mean()),
            "force_change_mev_per_angstrom": 1e3 * float(np.abs(forces - self.float_forces).mean()),
        }
        if self.case.trained:
            labels = np.concatenate([one.arrays["REF_forces"] for one in structures])
            row["force_mae_mev_per_angstrom"] = 1e3 * float(np.abs(forces - labels).mean())
            row["float_force_mae_mev_per_angstrom"] = 1e3 * float(np.abs(self.float_forces - labels).mean())
        return row

    def rounded_at(self, site: str | None, bits: int | None) -> tuple[float, np.ndarray]:
        """Central differences on the first structure, and energies of its pairs, with the scalars of a site rounded."""
        model = copy.deepcopy(self.converted)
        for name, quantizer in self.adapter.feature_quantizers(model).items():
            quantizer.scalars_enabled = bits is not None and site in (None, name)
            quantizer.vectors_enabled = False
            quantizer.scalar_top = float(largest_code(bits or DEFAULT_BITS))
        recorded = Recorded(self.adapter.potential(model))
        errors = central_difference_error(recorded, self.case.structures[:1], (STEP,), COMPONENTS)
        return errors[STEP].relative_error, recorded.displaced

    @functools.cached_property
    def exact_pairs(self) -> np.ndarray:
        return self.rounded_at(None, None)[1]

    def site_row(self, site: str | None) -> dict[str, Any]:
        """Noise of rounding the scalars of one site alone to the default's bits; None: those of all sites."""
        error, energies = self.rounded_at(site, DEFAULT_BITS)
        noise = energies - self.exact_pairs
        return {
            "kind": self.case.kind,
            "site": site or "all",
            "atoms": len(self.case.structures[0]),
            "scalar_bits": DEFAULT_BITS,
            "noise_mev": 1e3 * float((noise[::2] - noise[1::2]).std() / np.sqrt(2)),
            "central_difference_error": error,
        }

    def step_times(self, repeats: int) -> dict[str, dict[str, float]]:
        """Processor time of a step for each width of scalars, and its ratio to 16 bits in the same round."""
        with self.adapter.process_state():
            potentials = {bits: with_bits(self.adapter, self.rounded, bits, 16) for bits in WIDTHS}
            atoms = self.case.structures[0].copy()
            rng = np.random.default_rng(0)
            times: dict[int, list[float]] = {bits: [] for bits in WIDTHS}
            start_positions = atoms.positions.copy()
            for repeat in range(repeats + 2):
                atoms.positions = start_positions + rng.normal(scale=0.005, size=start_positions.shape)
                # The order turns, so that no width always follows the same one.
                first = repeat % len(WIDTHS)
                for bits in (*WIDTHS[first:], *WIDTHS[:first]):
                    start = time.process_time()
                    potentials[bits]([atoms])
                    if repeat >= 2:
                        times[bits].append(time.process_time() - start)
        base = np.array(times[16])
        return {
            str(bits): {
                "seconds_per_step": float(np.median(values)),
                "ratio_to_16_bits": float(np.median(np.array(values) / base)),
                "timed_steps": repeats,
            }
            for bits, values in times.items()
        }


def measure(case: Case, folder: Path, repeats: int, by_site: bool) -> None:
    """Measure what ``folder`` does not hold yet of a case; ``by_site``: also one site after the other."""
    path = folder / f"{case.kind.replace(' ', '_')}.json"
    digest = hashlib.sha256(case.path.read_bytes()).hexdigest()[:12]
    of = f"{digest}, {STRUCTURES} x {COMPONENTS}, scan {SPAN} {POINTS}"
    held = load_json(path)
    if held.get("of") != of:
        held = {"of": of, "kind": case.kind, "rows": {}, "times": {}, "sites": {}}
    held.setdefault("sites", {})
    measurement = Measurement(case)
    for scalars, vectors in sorted(SETTINGS, key=lambda setting: setting not in FIRST):
        key = f"{scalars},{vectors}"
        if key not in held["rows"]:
            held["rows"][key] = {**measurement.row(scalars, vectors), "versions": versions()}
            path.write_text(json.dumps(held, indent=1))
            print(case.kind, key, json.dumps(held["rows"][key]), flush=True)
    if not held["times"] and repeats:
        held["times"] = measurement.step_times(repeats)
        path.write_text(json.dumps(held, indent=1))
    sites = [None, *measurement.adapter.feature_quantizers(measurement.converted)] if by_site else []
    for site in (site for site in sites if (site or "all") not in held["sites"]):
        held["sites"][site or "all"] = measurement.site_row(site)
        path.write_text(json.dumps(held, indent=1))
        print(held["sites"][site or "all"], flush=True)


def gathered(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all cases, each with its time, and those of single sites.

    Rows of cases that the folder does not hold stay as they are in the result file.
    """
    order = [*(f"{prefix}molecule" for prefix in ("", "nequip ")), *PERIODIC, *(f"{s}, random weights" for s in SHAPES)]
    held = {one["kind"]: one for one in map(load_json, folder.glob("*.json"))}
    before = load_json(RESULTS / f"{NAME}.json").get("rows", [])
    rows = []
    for kind in order:
        if kind not in held:
            rows += [row for row in before if row["kind"] == kind]
            continue
        for setting in (f"{scalars},{vectors}" for scalars, vectors in SETTINGS):
            if row := held[kind]["rows"].get(setting):
                timed = held[kind]["times"].get(str(row["scalar_bits"]), {}) if row["vector_bits"] == 16 else {}
                rows.append({**row, **timed})
    return rows, [row for kind in order if kind in held for row in held[kind].get("sites", {}).values()]


def table(rows: list[dict[str, Any]]) -> str:
    """Tables by kind of model, in the units of the text."""
    text = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shown = []
        for row in rows:
            if row["kind"] != kind:
                continue
            bits = ["exact" if row[key] is None else str(row[key]) for key in ("scalar_bits", "vector_bits")]
            ratio, label = row.get("ratio_to_16_bits"), row.get("force_mae_mev_per_angstrom")
            float_label = row.get("float_force_mae_mev_per_angstrom")
            shown.append(
                {
                    "scalars": bits[0],
                    "vectors": bits[1],
                    "noise, µeV/atom": f"{1e3 * row['noise_mev_per_atom']:.4f}",
                    "central differences, %": f"{100 * row['central_difference_error']:.3f}",
                    "bond scan, meV": f"{row['scan_jump_mev']:.3f} of {row['scan_allowed_mev']:.3f}",
                    "forces by features, meV/Å": f"{row['force_change_by_features_mev_per_angstrom']:.4f}",
                    "force error (float), meV/Å": "" if label is None else f"{label:.2f} ({float_label:.2f})",
                    "step / 16 bits": "" if ratio is None else f"{ratio:.3f}",
                }
            )
        sizes = ", ".join(map(str, sorted({n for row in rows if row["kind"] == kind for n in row["atoms"]})))
        text.append(f"{kind} ({sizes} atoms)\n\n{markdown_table(shown, list(shown[0]))}")
    return "\n\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="DIR", help="folder of the models of periodic cells, and of rows")
    parser.add_argument("--cases", nargs="*", default=["molecule", *PERIODIC, *SHAPES])
    parser.add_argument("--sites", action="store_true", help="round the scalars of one site after the other, too")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = arguments.work.resolve()
    (work / NAME).mkdir(parents=True, exist_ok=True)
    makers = cases(work)
    for name in arguments.cases:
        if name in makers:
            measure(makers[name](), work / NAME, arguments.repeats, arguments.sites)
        else:
            print(f"left out: {name}", flush=True)
    rows, sites = gathered(work / NAME)
    write_result(NAME, rows, work=arguments.work, sites=sites)
    print(table(rows))
    if sites:
        print(markdown_table(sites, list(sites[0])))


if __name__ == "__main__":
    main()
