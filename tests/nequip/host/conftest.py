"""NequIP's own fixtures, for its own tests."""

from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("nequip") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from nequip.utils.unittests import CONFTEST_PATH

    exec(compile(Path(CONFTEST_PATH).read_text(), str(CONFTEST_PATH), "exec"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):  # type: ignore[no-untyped-def]  # as pytest calls it
    """Compilation takes minutes a model."""
    for item in items:
        if "test_ase_compile" in item.name:
            item.add_marker(pytest.mark.slow)
