"""Commands run by a user whom the system does not know, without a home: as in many containers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gaq.kernels.cpu.store import cache_folder

__all__ = ["as_nobody"]

CODE = """
import pwd, sys
from importlib import import_module

def unknown(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")

pwd.getpwuid = unknown
module, function = sys.argv[1].split(":")
sys.argv[1:2] = []
sys.exit(getattr(import_module(module), function)())
"""


def as_nobody(temporary: Path, entry: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the entry point ``module:function`` of a command, with a folder for temporary files; output as text."""
    named = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    keep = {name: value for name, value in os.environ.items() if name not in named}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, entry, *map(str, arguments)],
        env={**keep, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "GAQ_CACHE": str(cache_folder())},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # compiling on a machine that is busy
    )
