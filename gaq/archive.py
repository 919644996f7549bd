"""Smaller archives of torch's."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

__all__ = ["deflate"]


def deflate(source: Path, target: Path) -> None:
    """Compress the entries of an archive of torch's, which reads them either way.

    Pickles lose what they note down and never refer to, half of what a module of many small parts comes to.

    Args:
        source: archive, of `torch.save` or a package.
        target: file to write, which may be `source`.
    """
    with zipfile.ZipFile(source) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries:
            archive.writestr(name, pickletools.optimize(content) if name.endswith(".pkl") else content)
