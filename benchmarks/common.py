"""Shared by the benchmark scripts: paths of the data, means of NVE runs, result files."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gaq.reporting.environment import hardware, versions
from gaq.untyped import Document

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"


def recorded_command(work: Path | None = None) -> str:
    """The command of this process as result files have it.

    It has DIR in place of `work`, MODEL in place of the folder of a model elsewhere on this machine, and PYTHON in
    place of another interpreter.
    """
    command = shlex.join([Path(sys.executable).name, *sys.argv]).replace(str(ROOT) + "/", "")
    if work is not None:
        command = command.replace(str(work), "DIR")
    command = re.sub(r"--nequip-python \S+", "--nequip-python PYTHON", command)
    return re.sub(r"--model /\S*/", "--model MODEL/", command.replace(str(SHARED), "../shared"))


def write_result(name: str, rows: list[Document], work: Path | None = None, **extra: Any) -> Path:
    """Write ``results/<name>.json``: the rows, hardware, versions, command (`recorded_command`) and date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
        "command": recorded_command(work),
        "date": datetime.date.today().isoformat(),
        **extra,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def mean_of_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean drift of several NVE runs of one system that differ in their seed.

    The standard error is the larger of two: the standard errors of the runs in quadrature, and the scatter of their
    drifts. The scatter includes slow fluctuations, which a single run mistakes for drift.

    Args:
        rows: fields of `gaq.checks.nve.NVEResult`.
    """
    drifts = np.array([row["drift_mev_per_atom_per_ps"] for row in rows])
    errors = np.array([row["standard_error"] for row in rows])
    scatter = drifts.std(ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return {
        "drift_mev_per_atom_per_ps": float(drifts.mean()),
        "standard_error": float(max(scatter, np.sqrt((errors**2).sum()) / len(rows))),
        "drift_over_std_kinetic": float(np.mean([row["drift_over_std_kinetic"] for row in rows])),
    }


def load_json(path: Path) -> Document:
    """A JSON file, or an empty dictionary if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
