"""The command ``gaq doctor``."""

from __future__ import annotations

import argparse

from gaq import settings

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    from gaq.adapter import adapters
    from gaq.reporting.environment import hardware, versions

    print("versions")
    for name, version in versions().items():
        print(f"  {name:16s} {version}")
    print("hardware")
    for name, value in hardware().items():
        print(f"  {name:16s} {value}")
    print("adapters")
    for name in adapters():
        print(f"  {name:16s} ready")
    for name in {"mace", "nequip"} - set(adapters()):
        print(f"  {name:16s} not here: pip install 'gaq[{name}]' (MACE and NequIP need separate environments)")
    print("hooks")
    for adapter in adapters().values():
        for line in getattr(adapter, "doctor", lambda: [])():
            print(f"  {line}")
    print("settings")
    for setting in settings.rows():
        problem = "" if setting.problem is None else f": {setting.problem}"
        print(f"  {setting.variable:16s} {setting.value:8s} {setting.source}{problem}")
    settings.current()  # raises for values that are not allowed, after all have been shown
    from gaq.kernels import gpu
    from gaq.kernels.cpu import native

    print("kernels")
    print("  reference        plain torch, any device, any dtype: training, Hessians, compiled files")
    reason = native.why_not()
    compiled = f"ready, {native.library()._name}" if reason is None else f"not here: {reason}"
    print(f"  cpu              {compiled}")
    print(f"  cuda             {'ready, by Triton' if gpu.why_not() is None else 'not here: ' + str(gpu.why_not())}")
    print("                   converted MACE models at inference, float32 and float64; GAQ_ENGINE=0 turns it off")
    return 0
