"""What a file is, by its content."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gaq.adapter import adapter_for_file
from gaq.files.kinds import kind_of, new_name


def zipped(**entries: bytes) -> bytes:
    """An archive with one root folder."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"root/{name}", data)
    return content.getvalue()


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def safetensors(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def array() -> bytes:
    content = io.BytesIO()
    np.savez(content, x=np.zeros(3))
    return content.getvalue()


LIGHTNING = {"pytorch-lightning_version": "2.5", "state_dict": {}}
FILES: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "an empty file", None),
    "xyz": (b"2\n\nH 0 0 0\nH 0 0 1\n", "structures", None),
    "yaml": (b"quantization: gaq\n", "a text file", None),
    "program": (b"\x7fELF" + bytes(60), "a compiled library", None),
    "gzip": (b"\x1f\x8b" + bytes(60), "unpack it first", None),
    "noise": (bytes(range(200, 256)) * 9, "unknown binary format", None),
    "array": (array(), "NumPy archive", None),
    "zip": (zipped(a=b"1"), "a zip archive without a model", None),
    "tensors": (saved({"a": torch.zeros(2)}), "a pickle that holds no MACE or NequIP model", None),
    "pickle": (pickle.dumps([1, 2]), "a pickle that holds no", None),
    "old_torch": (b"\x80\x02" + b"cmace.modules.models\nScaleShiftMACE\n", "a MACE model", "mace"),
    "mace": (zipped(**{"data.pkl": b"\x80\x02cmace.modules.models\nScaleShiftMACE\nq"}), "a MACE model", "mace"),
    "packed": (zipped(**{"data.pkl": b"\x80\x02Xgaq_packedq"}), "a MACE model", "mace"),
    "mliap": (zipped(**{"data.pkl": b"\x80\x02LAMMPS_MLIAP_MACE mace.modules"}), "exported for LAMMPS", "mace"),
    "script": (
        zipped(**{"data.pkl": b"", "constants.pkl": b"", "code/__torch__/mace/modules/models.py": b""}),
        "compiled by TorchScript",
        "mace",
    ),
    "other_script": (zipped(**{"data.pkl": b"", "constants.pkl": b"", "code/x.py": b""}), "TorchScript", None),
    "mace_checkpoint": (
        saved({"model": {"interactions.0.linear.weight": torch.zeros(2)}, "lr_scheduler": {}}),
        "give the .model file",
        None,
    ),
    "safetensors": (safetensors({"__metadata__": {"gaq": "{}"}}), "a quantized MACE model", "mace"),
    # The length of the header begins as a pickle does.
    "like_a_pickle": (safetensors({"__metadata__": {"gaq": "x" * 99}}), "a quantized MACE model", "mace"),
    "other_safetensors": (safetensors({"a": {"dtype": "F32", "shape": [0]}}), "without a model", None),
    "ckpt": (saved({**LIGHTNING, "hyper_parameters": {"_target_": "nequip.x"}}), "a NequIP checkpoint", "nequip"),
    "other_ckpt": (saved(LIGHTNING), "a Lightning checkpoint of another program", None),
    "package": (zipped(**{"model/eager_model.pkl": b"", ".data/extern_modules": b""}), "a NequIP package", "nequip"),
    "other_package": (zipped(**{".data/extern_modules": b""}), "a torch package", None),
    "pt2": (
        zipped(
            **{"data/aotinductor/model/a.so": b"", "data/aotinductor/model/a_metadata.json": b'{"type_names": "H"}'}
        ),
        "a compiled NequIP model",
        "nequip",
    ),
    "other_pt2": (zipped(**{"data/aotinductor/model/a.so": b""}), "of another program", None),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds(name: str, tmp_path: Path) -> None:
    content, words, framework = FILES[name]
    for file in ("no_suffix", "wrong.csv"):
        path = tmp_path / file
        path.write_bytes(content)
        kind = kind_of(path)
        assert words in kind.words
        assert kind.framework == framework
        if framework is None:
            with pytest.raises(ValueError, match="Models are MACE's ") as raised:
                adapter_for_file(path)
            assert words in str(raised.value)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][0]])
def test_cut_files_do_not_raise(name: str, tmp_path: Path) -> None:
    content = FILES[name][0]
    path = tmp_path / "cut"
    for length in (1, 3, 8, 9, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert kind_of(path).words


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        kind_of(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a folder"):
        kind_of(tmp_path)


def test_names_of_new_files() -> None:
    assert new_name(Path("a/b.model"), (".model", ".safetensors")) == ".model"
    for name in ("out.pt", "out", "out.ckpt", ".model", "model"):
        with pytest.raises(ValueError, match=r"has to end in \.model or \.safetensors"):
            new_name(Path("a") / name, (".model", ".safetensors"))
