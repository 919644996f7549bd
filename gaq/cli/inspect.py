"""The command ``gaq inspect``."""

from __future__ import annotations

import argparse
import json

from gaq.cli.inputs import InputError, read_structures
from gaq.cli.lines import print_unfused

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    from gaq import api
    from gaq.adapter import adapter_for_file
    from gaq.checks.errors import spaced

    adapter = adapter_for_file(arguments.model)
    model = adapter.load(arguments.model, arguments.device, arguments.species)
    config = adapter.config(model)
    if config is None:
        print(f"{arguments.model}: a float model")
    else:
        print(f"{arguments.model}: preset {config.preset}, {adapter.status(model)}")
    print(api.summary(model))
    if config is not None:
        print_unfused(adapter, model)
    notes = adapter.notes(model)
    if notes.get("failed_gates"):
        print(f"MARKED: written with --force although these gates failed: {', '.join(notes['failed_gates'])}")
    elif notes.get("gates") == {}:
        print("MARKED: written with --force and without structures: no gate was measured")
    if notes:
        print("notes: " + json.dumps(notes, indent=2))
    if arguments.sensitivity:
        if config is not None:
            raise InputError("--sensitivity needs the float model: this one is rounded already.")
        print("one tensor at 8 bits at a time: mean force difference, meV/Å")
        for entry in api.sensitivity(model, spaced(read_structures(arguments.sensitivity), 20)):
            mark = "  <- deserves 16 bits" if entry.deserves_16_bits else ""
            print(f"  {entry.parameter:60s} {entry.force_difference:8.3f} {entry.numel:9d} weights{mark}")
    return 0
