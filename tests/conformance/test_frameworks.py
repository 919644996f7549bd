"""One line for every framework that the suite has not seen here."""

from __future__ import annotations

import pytest
from case import MODULES, installed


@pytest.mark.parametrize("framework", MODULES)
def test_is_installed(framework: str) -> None:
    if framework not in installed():
        pytest.skip(f"{framework} is not installed here: its conformance is not tested (pip install '.[{framework}]')")
