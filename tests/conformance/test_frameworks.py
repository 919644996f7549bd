"""Reports every framework that is not installed, so that its conformance is not tested."""

from __future__ import annotations

import pytest
from case import MODULES, installed


@pytest.mark.parametrize("framework", MODULES)
def test_is_installed(framework: str) -> None:
    if framework not in installed():
        pytest.skip(f"{framework} is not installed here: its conformance is not tested (pip install '.[{framework}]')")
