"""Libraries of the kernels that are built when the package is installed: which is taken, and when none is."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gaq.kernels import signatures
from gaq.kernels.cpu import native, variants

AVX512, AVX2 = variants.VARIANTS
ROOT = Path(__file__).parents[2]


def put(variant: variants.Variant, folder: Path, content: bytes = b"library") -> Path:
    path = variants._path(variant, folder)
    path.write_bytes(content)
    path.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())
    return path


def test_the_first_variant_that_suits_is_taken(tmp_path: Path) -> None:
    wide, narrow = put(AVX512, tmp_path), put(AVX2, tmp_path)
    assert variants.installed(AVX512.needs | {"sse"}, tmp_path) == (AVX512, wide)
    assert variants.installed(AVX2.needs | {"avx512f"}, tmp_path) == (AVX2, narrow)
    assert variants.installed({"avx", "fma"}, tmp_path) is None
    assert variants.installed((), tmp_path) is None


def test_what_is_damaged_or_of_other_sources_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(AVX2, tmp_path)
    path.write_bytes(b"librar")
    assert variants.installed(AVX2.needs, tmp_path) is None
    path = put(AVX2, tmp_path)
    assert variants.installed(AVX2.needs, tmp_path) == (AVX2, path)
    path.with_suffix(".sha256").unlink()
    assert variants.installed(AVX2.needs, tmp_path) is None
    put(AVX2, tmp_path)
    monkeypatch.setattr(signatures, "COEFFICIENTS", 7)
    assert variants.installed(AVX2.needs, tmp_path) is None


def test_this_module_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import gaq.kernels.cpu.variants"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_where_nothing_can_be_built_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setattr(variants.platform, "machine", lambda: "x86_64")
    assert re.search("compiled on first use, because /bin/false could not", variants.build_all(tmp_path / "built"))
    assert not list((tmp_path / "built").glob("*.so"))
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(variants, "compilers", list)
    assert "needs a C++ compiler: there is none here" in variants.build_all(tmp_path)
    monkeypatch.setattr(variants.platform, "machine", lambda: "riscv64")
    assert "none are built for linux, riscv64" in variants.build_all(tmp_path)


def test_a_library_that_cannot_be_loaded_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not native.available():
        pytest.skip(f"no kernels: {native.why_not()}")
    path = put(AVX2, tmp_path)
    monkeypatch.setattr(variants, "installed", lambda _features: (AVX2, path))
    loaded = native.library.__wrapped__()
    assert isinstance(loaded, ctypes.CDLL)
    assert loaded._name != str(path)
    assert "the kernels that were installed cannot be loaded" in caplog.text


@pytest.mark.slow
def test_a_built_library_computes(tmp_path: Path) -> None:
    """In a process of its own: two libraries with the same names of functions."""
    said = variants.build_all(tmp_path)
    if "kernels were built" not in said:
        pytest.skip(said)
    found = variants.installed(variants.features(), tmp_path)
    if found is None:
        pytest.skip("this processor has no AVX2")
    code = f"""
import torch
from pathlib import Path
from gaq.kernels.cpu import native, variants
variants.FOLDER = Path({str(tmp_path)!r})
variants.installed.__defaults__ = (variants.FOLDER,)
assert native.origin().startswith("built for"), native.origin()
torch.set_num_threads(2)
vectors = torch.empty(1, 3)
arrays = [torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.0, 0, 0], [1, 2, 3]]), torch.zeros(1, 3), vectors]
native.kernel("edge_vectors", torch.float32)(1, *[a.data_ptr() for a in arrays])
assert vectors.tolist() == [[1.0, 2.0, 3.0]]
print(len({{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    if list(Path(torch.__file__).parent.glob("lib/libgomp*")):
        assert done.stdout.strip() == "1", "two OpenMP libraries in one process"
