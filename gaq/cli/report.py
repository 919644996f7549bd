"""The command ``gaq report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gaq.cli.inputs import InputError, read_structures
from gaq.cli.lines import gate_lines, metric_lines

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.checks.errors import spaced
    from gaq.reporting import failed_gates, write_report

    if not arguments.nve_ps >= 0:
        raise InputError(f"--nve-ps {arguments.nve_ps:g}: give a length in ps, or 0 to leave the runs out.")
    if arguments.frames < 1:
        raise InputError(f"--frames {arguments.frames}: at least one structure is needed.")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise InputError(f"--output {arguments.output}: is a file; give the name of a folder.")
    report = api.report(
        arguments.model,
        spaced(read_structures(arguments.data), arguments.frames),
        arguments.reference,
        nve_ps=arguments.nve_ps,
        device=arguments.device,
        trained=arguments.trained,
        species=arguments.species,
    )
    write_report(report, arguments.output)
    if report["gates"]:
        print(gate_lines(report["gates"]))
    else:
        print(f"{metric_lines(report)}\n{arguments.model}: a float model: no gates apply")
    print(f"written: {Path(arguments.output) / 'report.html'}")
    return 1 if failed_gates(report["gates"]) else 0
