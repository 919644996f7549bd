"""The command ``gaq deploy``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from gaq.cli.frame import DONE, FAILED
from gaq.cli.inputs import check_structure_file, checked_output, find_adapter, number_of_at_least, read_structures
from gaq.cli.lines import speaker
from gaq.untyped import Document

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Write a model as one file without a framework; returns the exit code and the result."""
    from gaq.deployment import deploy, words
    from gaq.progress import explained
    from gaq.reporting import format_table

    say = speaker(arguments.json)
    find_adapter("", arguments.model)
    output = checked_output("OUT", arguments.output, arguments.model)
    if arguments.tolerance is not None:
        number_of_at_least("--tolerance", arguments.tolerance, 0.0, "a force difference in meV/Å")
    structures = []
    if arguments.structures is not None:
        check_structure_file("--structures", arguments.structures)
        structures = read_structures(arguments.structures)
    with explained("deploying: tables are made, and the file is compared with the model"):
        done = deploy(
            arguments.model,
            output,
            elements=arguments.elements,
            dtype=arguments.dtype,
            structures=structures,
            tolerance=arguments.tolerance,
            species=arguments.species,
            charge=arguments.charge,
            spin=arguments.spin,
        )
    if done.fixed:
        chosen = arguments.charge is not None or arguments.spin is not None
        say(f"fixed in the file: {words(done.fixed)}" + ("" if chosen else " (--charge and --spin set others)"))
    rows = [{"": Path(arguments.model).name, "value": _mib(Path(arguments.model).stat().st_size), "unit": "MiB"}]
    rows.append({"": output.name, "value": _mib(sum(done.sizes.values())), "unit": "MiB"})
    rows += [{"": f"  {name}", "value": _mib(size), "unit": "MiB"} for name, size in done.sizes.items()]
    for head, check in done.checks.items():
        of_head = f" ({head})" if len(done.checks) > 1 else ""
        note = f"largest force {check.force_scale:.0f}"
        for name, value, unit in (
            ("energy", check.energy, "meV/atom"),
            ("force", check.forces, f"meV/Å ({note})"),
            ("stress", check.stress, "meV/Å³"),
        ):
            rows.append({"": f"largest {name} difference{of_head}", "value": f"{value:.2g}", "unit": unit})
    say(format_table(rows, ["", "value", "unit"]))
    result: Document = {
        "model": str(arguments.model),
        "output": str(output) if done.written else None,
        "elements": done.elements,
        "dtype": arguments.dtype,
        "fixed": done.fixed,
        "bytes": done.sizes,
        "checks": {head: asdict(check) for head, check in done.checks.items()},
        "allowed_force_difference": done.allowed,
    }
    if not done.written:
        print(
            f"gaq: not written, because forces differ from the model by more than {done.allowed:g} meV/Å. --tolerance "
            "sets another bound.",
            file=sys.stderr,
        )
        return FAILED, result
    say(f"written: {output}, which knows {', '.join(done.elements)}")
    return DONE, result


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
