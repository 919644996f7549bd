"""The command ``gaq report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gaq.cli.frame import DONE, FAILED, STOPPED
from gaq.cli.inputs import (
    InputError,
    check_output_folder,
    check_structure_file,
    find_adapter,
    number_of_at_least,
    read_structures,
)
from gaq.cli.lines import gate_lines, metric_lines, speaker, use_lines
from gaq.process import check_device
from gaq.untyped import Document

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Measure a model and write the report; returns the exit code and what ``report.json`` holds."""
    from gaq import api
    from gaq.checks.errors import spaced
    from gaq.checks.uses import fitness_line
    from gaq.reporting import failed_gates, write_report

    say = speaker(arguments.json)
    _check(arguments)
    report = api.report(
        arguments.model,
        spaced(read_structures(arguments.data), arguments.frames),
        arguments.reference,
        nve_ps=arguments.nve_ps,
        device=arguments.device,
        trained=arguments.trained,
        species=arguments.species,
        head=arguments.head,
        energy_key=arguments.energy_key,
        forces_key=arguments.forces_key,
        keep_partial=True,
    )
    if report["partial"]:
        say(f"partial report: {report['partial']}")
    say(fitness_line(report["uses"]))
    for line in report["left_out"]:
        say(line)
    files = write_report(report, arguments.output)
    if table := use_lines(report["uses"]):
        say(table)
    if report["gates"]:
        say(gate_lines(report["gates"]))
    else:
        say(f"{metric_lines(report)}\n{arguments.model}: a float model: no gates apply")
    say(f"written: {Path(arguments.output) / 'report.html'}")
    failed = failed_gates(report["gates"])
    content = {key: value for key, value in report.items() if key != "figures"}
    code = STOPPED if report["partial"] else FAILED if failed else DONE
    return code, {**content, "failed_gates": failed, "files": [str(file) for file in files]}


def _check(arguments: argparse.Namespace) -> None:
    """Check all values before the models are loaded.

    Raises:
        InputError: naming the option.
    """
    number_of_at_least("--nve-ps", arguments.nve_ps, 0.0, "a length in ps, or 0 to leave the runs out")
    if arguments.frames < 1:
        raise InputError(f"--frames {arguments.frames}: at least one structure is needed.")
    find_adapter("", arguments.model)
    if arguments.reference is not None:
        find_adapter("--reference", arguments.reference)
    check_structure_file("--data", arguments.data)
    check_output_folder("--output", arguments.output)
    check_device(arguments.device)
