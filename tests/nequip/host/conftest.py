"""NequIP's own fixtures, for its own tests."""

from importlib.util import find_spec
from pathlib import Path

if find_spec("nequip") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from nequip.utils.unittests import CONFTEST_PATH

    exec(compile(Path(CONFTEST_PATH).read_text(), str(CONFTEST_PATH), "exec"))
