"""The command ``gaq lammps``: build, check, sources."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

from gaq.cli.frame import DONE, FAILED
from gaq.cli.inputs import InputError, check_output_folder
from gaq.cli.lines import Say, speaker
from gaq.untyped import Document

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Build the plugin, check a file in LAMMPS, or write the sources; returns the exit code and the result."""
    work = {"build": _build, "check": _check, "sources": _sources}[arguments.lammps_command]
    return work(arguments, speaker(arguments.json))


def _build(arguments: argparse.Namespace, say: Say) -> tuple[int, Document]:
    from gaq.lammps import build
    from gaq.lammps.installation import find
    from gaq.progress import explained

    folder = check_output_folder("--output", arguments.output)
    lammps = find(arguments.lammps)
    with explained(f"compiling the plugin for LAMMPS {lammps.version}"):
        built = build.obtain(lammps, arguments.march)
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.resolve() / build.PLUGIN
    shutil.copyfile(built, output)
    say(f"LAMMPS {lammps.version}, {lammps.program}: loads the plugin")
    say("in its input script:")
    say(f"  plugin load {output}")
    return DONE, {"plugin": str(output), "lammps": str(lammps.program), "version": lammps.version}


def _check(arguments: argparse.Namespace, say: Say) -> tuple[int, Document]:
    from gaq.lammps import build
    from gaq.lammps.check import allowed, check
    from gaq.lammps.installation import find
    from gaq.progress import explained
    from gaq.reporting import format_table

    path = Path(arguments.file)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")
    bound, relative = allowed(path)
    lammps = find(arguments.lammps)
    if arguments.ranks is not None and arguments.ranks < 1:
        raise InputError(f"--ranks {arguments.ranks}: must be at least 1.")
    if arguments.ranks is None and lammps.launcher is None:
        say("on one rank only: there is no mpiexec for this LAMMPS")
    most = arguments.ranks or (1 if lammps.launcher is None else 2)
    with explained(f"compiling the plugin for LAMMPS {lammps.version}"):
        plugin = build.obtain(lammps)
    with explained("running LAMMPS"):
        rows = list(check(path, lammps, plugin, sorted({1, most})))
    several = len({row.head for row in rows}) > 1
    table = [
        {
            "structure": row.structure + f", head {row.head}" * several,
            "ranks": str(row.ranks),
            "energy meV/atom": f"{row.check.energy:.2g}",
            "force meV/Å": f"{row.check.forces:.2g}",
            "stress meV/Å³": f"{row.check.stress:.2g}" if row.check.stress else "",
            "verdict": "agrees" if row.agrees else "DIFFERS",
        }
        for row in rows
    ]
    say(f"differences between LAMMPS {lammps.version} and the ASE calculator of {path}")
    say(format_table(table, list(table[0])))
    say(
        "forces are rounded too coarsely to be judged"
        if bound == float("inf")
        else f"allowed: {bound:g} meV/Å, or {relative:g} of the largest force"
    )
    agrees = all(row.agrees for row in rows)
    result: Document = {
        "file": str(path),
        "lammps": str(lammps.program),
        "version": lammps.version,
        "allowed_force_difference": bound,
        "agrees": agrees,
        "rows": [asdict(row) for row in rows],
    }
    return DONE if agrees else FAILED, result


def _sources(arguments: argparse.Namespace, say: Say) -> tuple[int, Document]:
    from gaq.lammps import build

    folder = check_output_folder("FOLDER", arguments.folder)
    files = build.write_sources(folder, plugin=False)
    say(f"{folder}: pair style gaq and its kernels; gaq/lammps/pair_style/README.md says how to build LAMMPS with them")
    return DONE, {"folder": str(folder), "files": files}
