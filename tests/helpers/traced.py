"""Scripts that trace operations made of Triton kernels, as compilers see them where the interpreter is off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def printed(script: str, cache: Path) -> list[str]:
    """What a script prints without the interpreter, in a process of its own; on tensors without data nothing runs."""
    environment = {**os.environ, "GAQ_CACHE": str(cache), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
