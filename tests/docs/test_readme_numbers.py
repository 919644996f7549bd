"""The tables of README and docs hold what the committed results say, digit for digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ABSENT = "\N{EN DASH}"
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
STRUCTURES = {"azobenzene": 24, "water box": 192, "larger water box": 1536}
SPEED: dict[tuple[str, str], tuple[str, Any]] = {
    **{("MACE A", f"{name}, {atoms} atoms"): ("cpu_engine", ("A", atoms)) for name, atoms in STRUCTURES.items()},
    **{("MACE B", f"{name}, {atoms} atoms"): ("cpu_engine", ("B", atoms)) for name, atoms in STRUCTURES.items()},
    **{("MACE C", f"{name}, {atoms} atoms"): ("cpu_engine", ("C", atoms)) for name, atoms in STRUCTURES.items()},
    ("NequIP", "azobenzene, 24 atoms"): ("nequip_engine", "molecule"),
    ("NequIP", "periodic box, 192 atoms"): ("nequip_engine", "periodic box"),
    ("NequIP, `gaq deploy`", "azobenzene, 24 atoms"): ("nequip_engine", "molecule"),
    ("NequIP, `gaq deploy`", "periodic box, 192 atoms"): ("nequip_engine", "periodic box"),
    ("Allegro", "azobenzene, 24 atoms"): ("allegro_engine", "molecule"),
    ("Allegro", "periodic box, 192 atoms"): ("allegro_engine", "periodic box"),
}


def rows_of(result: str) -> list[dict[str, Any]]:
    content = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def tables(*header: str, text: str = RESULTS) -> list[list[list[str]]]:
    """The cells of every table whose header begins with these cells, without it."""
    found, lines = [], text.splitlines()
    for n, line in enumerate(lines):
        if line.startswith(f"| {' | '.join(header)} |"):
            rows = []
            for row in lines[n + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip() for cell in row.strip("|").split("|")])
            found.append(rows)
    return found


PRESET_TABLES = [(0, "mace_presets"), (1, "nequip_presets")]


@pytest.mark.parametrize(("number", "result"), PRESET_TABLES)
def test_presets(number: int, result: str) -> None:
    measured = {(row["scheme"], row["training"]): row for row in rows_of(result)}
    table = tables("preset", "training", "F MAE meV/Å")[number]
    for preset, training, *cells in table:
        scheme = "w8a16" if preset.startswith("`gaq`") else preset.strip("`").lower()
        kind = {ABSENT: "float", "PTQ": "ptq"}.get(training, "qat")
        row = measured[scheme, kind]
        assert cells == [
            f"{row['force_mae_mev_per_angstrom']:.2f}",
            f"{row['energy_mae_mev_per_atom']:.2f}",
            f"{row['lee_mev_per_angstrom']:.3f}",
            f"{100 * row['central_difference_relative_error']['0.01']:.2f} %",
            f"{row['file_bytes'] / 1024:.0f}",
            f"{row['size_ratio']:.1f}x",
        ], (preset, training)
    assert len(table) == len(measured)


def test_what_presets_are_good_for() -> None:
    """The words and numbers of docs/presets.md are those of quantization after training, in both frameworks."""
    measured = [{(row["scheme"], row["training"]): row for row in rows_of(result)} for _, result in PRESET_TABLES]
    (table,) = tables("preset", "file, MACE and NequIP", text=(ROOT / "docs/presets.md").read_text(encoding="utf-8"))
    assert {row[0] for row in table} == {
        "`gaq` (`w8a16`)" if scheme == "w8a16" else f"`{scheme}`" for scheme, kind in measured[0] if kind == "ptq"
    }
    for preset, size, accuracy, symmetry, energy, _ in table:
        scheme = "w8a16" if preset.startswith("`gaq`") else preset.strip("`")
        pairs = [(rows[scheme, "ptq"], rows["fp32", "float"]) for rows in measured]
        assert size == ", ".join(f"{row['size_ratio']:.1f}x" for row, _ in pairs) + " smaller"
        key = "force_mae_mev_per_angstrom"
        growth = [row[key] / fp32[key] for row, fp32 in pairs]
        assert (accuracy == "kept") == (max(growth) <= 1.02)
        lee = [row["lee_mev_per_angstrom"] for row, _ in pairs]
        assert symmetry.startswith("kept") == (max(lee) <= 0.15)
        slopes = [100 * row["central_difference_relative_error"]["0.01"] for row, _ in pairs]
        assert energy.startswith("kept") == (max(slopes) <= 1.0)
        if accuracy != "kept":
            digits = 1 if max(growth) > 1.1 else 2
            assert accuracy == " and ".join(f"{value:.{digits}f}" for value in growth) + " times"
        if not symmetry.startswith("kept"):
            assert symmetry == "no: " + " and ".join(f"{value:.0f}" for value in lee) + " meV/Å"
        if not energy.startswith("kept"):
            assert " and ".join(f"{value:.0f}" for value in slopes) in energy.replace(" %", "")


def test_other_programs() -> None:
    measured = rows_of("hosts")
    (table,) = tables("program", "atoms", "stock", text=(ROOT / "docs/hosts.md").read_text(encoding="utf-8"))
    assert len(table) == len(measured)
    for (program, atoms, stock, ours, deployed, difference, difference_of_stock, difference_of_deployed), row in zip(
        table, measured, strict=True
    ):
        assert (program.lower(), atoms) == (row["host"], str(row["atoms"]))
        assert row["kernel_calls_of_10_steps"] >= 10
        assert stock == f"{row['stock_ms']:.1f} ms"
        assert ours == f"{row['gaq_ms']:.1f} ms, {row['gaq_times_faster']:.1f}x"
        key = "{}_force_difference_mev_per_angstrom"
        assert difference == f"{row[key.format('gaq')]:.3f}"
        assert difference_of_stock == f"{row[key.format('stock')]:.3f}"
        if "deployed_ms" in row:
            assert deployed == f"{row['deployed_ms']:.1f} ms, {row['deployed_times_faster']:.1f}x"
            assert difference_of_deployed == f"{row[key.format('deployed')]:.3f}"
        else:
            assert (deployed, difference_of_deployed) == (ABSENT, ABSENT)


def test_trained_models_of_dense_matter() -> None:
    (table,) = tables("name", "epochs", "hours of training", text=(ROOT / "docs/foundation.md").read_text("utf-8"))
    assert table == [
        [
            row["model"],
            str(row["epochs"]),
            f"{row['hours_of_training']:.2f}",
            f"{row['force_mae_mev_per_angstrom']:.0f}",
            f"{100 * row['force_rmse_over_force_rms']:.1f} %",
            f"{row['quantized']['processor_s']:.0f} s",
            ", ".join(row["quantized"]["failed_gates"]) or "none",
            f"{100 * row['quantized']['gates']['central_difference']:.2f} %",
        ]
        for row in rows_of("dense_models")
    ]


def test_foundation_shapes() -> None:
    measured = {row["shape"]: row for row in rows_of("foundation")}
    (table,) = tables("shape", "elements", "file")
    assert {row[0] for row in table} == set(measured)
    for shape, _, size, time, step, speed in table:
        row = measured[shape]
        assert size == f"{row['float_bytes'] / row['bytes']:.1f}x smaller"
        assert time == f"{row['quantize']['s'] / 60:.1f} min"
        assert step == f"{1e3 * row['ours_step']['s']:.0f} ms ({1e3 * row['stock_step']['s']:.0f})"
        assert speed == f"{row['speed_up']:.1f}x"
    failing = sum(bool(row["failed_gates"]) for row in measured.values())
    words = ("no", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven")
    assert f"{words[failing]} of these {words[len(measured)].lower()} random models" in RESULTS


def test_the_table_of_readme_is_a_part_of_the_one_of_speed() -> None:
    (short,) = tables("model", "structure", "stock", "symmetrix-xl", "`w8`", "`gaq`", text=README)
    (table,) = tables("model", "structure", "stock", "compiled", "symmetrix-xl")
    complete = {(row[0], row[1]): [row[2], row[4], row[6], row[7]] for row in table}
    for model, structure, *cells in short:
        assert cells == complete[model, structure]


def test_sizes_and_errors_of_readme() -> None:
    """The default after training: how many times smaller, and its force error."""
    numbers = []
    for _, result in PRESET_TABLES:
        rows = {(row["scheme"], row["training"]): row for row in rows_of(result)}
        row, fp32 = rows["w8a16", "ptq"], rows["fp32", "float"]
        growth = row["force_mae_mev_per_angstrom"] / fp32["force_mae_mev_per_angstrom"]
        numbers.append((f"{row['size_ratio']:.1f}", f"{growth:.4f}"))
    (mace, mace_error), (nequip, nequip_error) = numbers
    text = " ".join(README.split())
    assert f"{mace} times smaller (MACE 32x0e+32x1o) and {nequip} times (NequIP's package)" in text
    assert f"force errors {mace_error} and {nequip_error} times FP32's" in text
    report = json.loads((ROOT / "benchmarks" / "results" / "quickstart_report.json").read_text())
    size, growth = (report["gates"][name]["value"] for name in ("file_size_ratio", "force_mae_ratio"))
    assert f"MACE file is {size:.1f} times smaller, with a force error {growth:.3f} times FP32's" in text


def test_speed_on_the_cpu() -> None:
    (table,) = tables("model", "structure", "stock", "compiled", "symmetrix-xl")
    assert len(table) == len(SPEED)
    for model, structure, stock, compiled, symmetrix, *ours in table:
        result, name = SPEED[model, structure]
        rows = [row for row in rows_of(result) if row["threads"] == 1]
        if result == "cpu_engine":
            rows = [row for row in rows if (row["model"], row["atoms"]) == name]
            ratio = {row["kind"]: row["median_speedup_over_stock_eager"] for row in rows}
            seconds = next(row["median_seconds_per_step"] for row in rows if row["kind"] == "stock eager")
            # The better of its two profiles.
            ratio["symmetrix-xl"] = max(value for kind, value in ratio.items() if kind.startswith("symmetrix-xl"))
            kinds = ("stock compiled", "symmetrix-xl", "engine fp32", "engine w8", "engine gaq")
            expected = [f"{ratio[kind]:.1f}x" if kind in ratio else ABSENT for kind in kinds]
            assert [compiled, symmetrix, *ours] == expected
            assert stock == f"{1e3 * seconds:,.0f} ms"
        else:
            rows = [row for row in rows if row["structure"] == name]
            ratio = {row["scheme"]: row["times_faster"] for row in rows}
            form = "deployed" if "gaq deploy" in model else "fused"
            assert ours == [f"{ratio[f'{kind}_{form}']:.1f}x" for kind in ("fp32", "w8", "gaq")]
            assert stock == f"{next(row['median_ms'] for row in rows if row['scheme'] == 'fp32'):,.0f} ms"


def test_steps_of_the_quickstart() -> None:
    (table,) = tables("quickstart's model", "atoms")
    rows = {name: rows_of(f"quickstart_step_{name.lower()}") for name in ("MACE", "NequIP")}
    assert table == [
        [
            name,
            str(row["atoms"]),
            f"{row['stock_ms']:.1f} ms",
            f"{row['gaq_ms']:.1f} ms",
            f"{row['times_faster']:.1f}x",
            f"{row['deployed_ms']:.1f} ms",
            f"{row['deployed_times_faster']:.1f}x",
        ]
        for name, measured in rows.items()
        for row in measured
    ]
    assert {measured[0]["atoms"] for measured in rows.values()} == {24}
    mace, nequip = (f"{measured[0]['times_faster']:.1f}" for measured in rows.values())
    text = " ".join(README.split())
    assert f"on 24 atoms they gain {mace} (MACE) and {nequip} times (NequIP), because" in text
    mace, nequip = (f"{measured[0]['deployed_times_faster']:.1f}" for measured in rows.values())
    assert f"(`gaq deploy`) they gain {mace} and {nequip} times" in text


def test_speed_in_lammps() -> None:
    names = {"`gaq`": ("A_gaq", "gaq"), "FP32": ("A_fp32", "gaq"), "FP32, stock ML-IAP": ("A_fp32_stock", "mliap")}
    rows = {
        (row["name"], row["style"], row["atoms"], row["ranks"], row["threads"]): row for row in rows_of("lammps_speed")
    }
    (table,) = tables("atoms", "file", "ranks", text=(ROOT / "docs/lammps.md").read_text(encoding="utf-8"))
    for atoms, file, ranks, threads, speed, in_ase, memory in table:
        (name, style), size = names[file], int(atoms.replace(",", ""))
        row = rows[name, style, size, int(ranks), int(threads)]
        assert speed == f"{row['steps_per_second']:.3g}"
        assert memory == f"{row['mib_per_rank']:.0f}"
        ase = rows.get((name, "ase", size, 1, int(threads))) if ranks == "1" else None
        assert in_ase == (ABSENT if ase is None else f"{ase['steps_per_second']:.3g}")
    assert len(table) == sum(row["style"] != "ase" for row in rows.values())
