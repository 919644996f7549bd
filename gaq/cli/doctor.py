"""The command ``gaq doctor``."""

from __future__ import annotations

import argparse

from gaq import settings
from gaq.cli.frame import DONE
from gaq.cli.lines import Say, speaker
from gaq.untyped import Document

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> tuple[int, Document]:
    """Show what runs here; returns the exit code and the same as plain data.

    Raises:
        SettingsError: for settings whose values are not allowed, after all lines but those of the kernels.
    """
    from gaq.adapter import FRAMEWORKS, adapters, missing_framework
    from gaq.reporting.environment import hardware, versions

    say = speaker(arguments.json)
    say("versions")
    for name, version in versions().items():
        say(f"  {name:16s} {version}")
    say("hardware")
    for name, value in hardware().items():
        say(f"  {name:16s} {value}")
    say("adapters")
    missing = {name: missing_framework(name) for name in FRAMEWORKS if name not in adapters()}
    for name in adapters():
        say(f"  {name:16s} ready")
    for name, remedy in missing.items():
        say(f"  {name:16s} {remedy}")
    hooks = [line for adapter in adapters().values() for line in getattr(adapter, "doctor", lambda: [])()]
    say("hooks")
    for line in hooks:
        say(f"  {line}")
    rows = settings.rows()
    say("settings")
    for setting in rows:
        problem = "" if setting.problem is None else f": {setting.problem}"
        say(f"  {setting.variable:16s} {setting.value:8s} {setting.source}{problem}")
    settings.current()  # raises for values that are not allowed, after all have been shown
    return DONE, {
        "versions": versions(),
        "hardware": hardware(),
        "adapters": {**dict.fromkeys(adapters(), None), **missing},
        "hooks": hooks,
        "settings": {row.variable: {"value": row.value, "source": row.source} for row in rows},
        "kernels": _kernels(say),
    }


def _kernels(say: Say) -> Document:
    """Say which kernels run here; returns by their name why not, None where they do."""
    from gaq.kernels import gpu
    from gaq.kernels.cpu import native

    say("kernels")
    say("  reference        plain torch, any device, any dtype: training, Hessians, all that the others do not serve")
    on_cpu, on_gpu = native.why_not(), gpu.why_not()
    say(f"  cpu              {'not here: ' + on_cpu if on_cpu else 'ready, ' + native.origin()}")
    say(f"  cuda             {'not here: ' + on_gpu if on_gpu else 'ready, by Triton'}")
    say("  cpu and cuda serve converted MACE models at inference (GAQ_ENGINE=0 turns that off) and nequip-deploy")
    return {"reference": None, "cpu": on_cpu, "cuda": on_gpu}
