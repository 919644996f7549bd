"""Archives of torch's, compressed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from gaq.archive import deflate


def test_what_is_in_an_archive_stays(tmp_path: Path) -> None:
    path, target = tmp_path / "plain.pt", tmp_path / "small.pt"
    state = {f"layer.{i}": [torch.arange(4) + i, {"name": str(i)}] for i in range(200)}
    torch.save(state, path)
    deflate(path, target)
    found = torch.load(target)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k][0], v[0]) and found[k][1] == v[1] for k, v in state.items())
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(target) as after:
        assert before.namelist() == after.namelist()
        pickled = next(name for name in after.namelist() if name.endswith(".pkl"))
        # Not only compressed: memo entries that nothing refers to are gone.
        assert after.getinfo(pickled).file_size < 0.9 * before.getinfo(pickled).file_size
    assert target.stat().st_size < 0.6 * path.stat().st_size
    deflate(path, path)
    assert torch.load(path).keys() == state.keys()
