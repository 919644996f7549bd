"""Packed files: what is written is what is read, with this package and without it."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mace  # noqa: F401  (before e3nn)
import numpy as np
import pytest
import torch
from e3nn.util.jit import compile as jit_compile

import gaq
from gaq.model.state import feature_quantizers, state_of, unquantized
from gaq_mace import files, packed
from gaq_mace.files import ModelFileError
from gaq_mace.safetensors_file import CHECKSUM, checksum
from gaq_mace.weights import quantized_weights

PRESETS = ("gaq", "w4a16", "w8", "w4", "w8a8", "w4a8", "naive_w8a8")
VARIANTS = ("heads", "l2", "density", "correlation3", "residual_first")
SUFFIXES = (".model", ".safetensors")
QUICK_VARIANTS = (("heads", ".model"), ("l2", ".safetensors"), ("density", ".model"))


def same_quantization(first: Any, second: Any) -> None:
    """Weights, codes, scales and ranges of two models agree to the last bit."""
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    state = second.state_dict()
    for name, tensor in first.state_dict().items():
        if name != "_extra_state":
            assert torch.equal(tensor, state[name]), name
    codes, other_codes = quantized_weights(first), quantized_weights(second)
    assert codes.keys() == other_codes.keys()
    for name in codes:
        assert torch.equal(codes[name].codes, other_codes[name].codes), name
        assert torch.equal(codes[name].scale, other_codes[name].scale), name
        assert codes[name].bits == other_codes[name].bits
    quantizers, others = feature_quantizers(first), feature_quantizers(second)
    assert quantizers.keys() == others.keys()
    for name in quantizers:
        assert torch.equal(quantizers[name].ranges(), others[name].ranges()), name
        assert torch.equal(quantizers[name].limit, others[name].limit), name
    assert state_of(first).config == state_of(second).config
    assert state_of(first).notes == state_of(second).notes


def cases(*quick: tuple[str, str]) -> list[Any]:
    """Every preset in both forms of file, of which those not named are slow."""
    return [
        pytest.param(preset, suffix, marks=() if (preset, suffix) in quick else pytest.mark.slow)
        for preset in PRESETS
        for suffix in SUFFIXES
    ]


@pytest.mark.parametrize(
    ("variant", "suffix"),
    [
        pytest.param(variant, suffix, marks=() if (variant, suffix) in QUICK_VARIANTS else pytest.mark.slow)
        for variant in VARIANTS
        for suffix in SUFFIXES
    ],
)
def test_round_trip_of_variants(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    variant: str,
    suffix: str,
) -> None:
    model = quantized("w4a16", variant)
    path = tmp_path / f"model{suffix}"
    gaq.save(model, path)
    loaded = gaq.load(path)
    same_quantization(model, loaded)
    np.testing.assert_allclose(evaluate(loaded, structures)[0], evaluate(model, structures)[0], rtol=1e-6)


@pytest.mark.parametrize(("preset", "suffix"), [("gaq", ".model"), ("w4", ".safetensors")])
def test_float64_models(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    preset: str,
    suffix: str,
) -> None:
    model = quantized(preset, dtype=torch.float64)
    path = tmp_path / f"model{suffix}"
    gaq.save(model, path)
    loaded = gaq.load(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    same_quantization(model, loaded)
    np.testing.assert_allclose(evaluate(loaded, structures)[0], evaluate(model, structures)[0], rtol=1e-12)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_in_training_is_saved_converted(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    tmp_path: Path,
    suffix: str,
) -> None:
    model = quantized("w4a16", status="training")
    path = tmp_path / f"model{suffix}"
    gaq.save(model, path)
    assert state_of(model).status == "training", "saving leaves the model as it is"
    loaded = gaq.load(path)
    assert state_of(loaded).status == "converted"
    same_quantization(gaq.convert(model), loaded)


def test_torch_save_packs(quantized: Callable[..., Any], tmp_path: Path) -> None:
    """`mace_run_train` saves with torch.save, and that too is packed."""
    model = quantized("gaq")
    torch.save(model, tmp_path / "model.model")
    same_quantization(model, torch.load(tmp_path / "model.model", weights_only=False))


def test_changed_weights_are_kept_in_float(
    quantized: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], tmp_path: Path
) -> None:
    """A weight someone changed after conversion is stored as it is, not as its old code."""
    model = quantized("w8")
    with torch.no_grad():
        model.readouts[0].linear.weight.mul_(1.001)
    for suffix in SUFFIXES:
        gaq.save(model, tmp_path / f"model{suffix}")
        loaded = gaq.load(tmp_path / f"model{suffix}")
        assert torch.equal(loaded.readouts[0].linear.weight, model.readouts[0].linear.weight)
        assert "readouts.0.linear.weight" not in quantized_weights(loaded)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_loading_leaves_the_globals(quantized: Callable[..., Any], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    gaq.save(quantized("gaq", dtype=torch.float64), path)
    for dtype in (torch.float32, torch.float64) if suffix == ".model" else (torch.float32,):
        torch.set_default_dtype(dtype)
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002 (the global state is what is looked at)
        random.seed(3)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        gaq.load(path)
        assert torch.get_default_dtype() == dtype
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]


@pytest.mark.parametrize(("preset", "suffix"), cases(("gaq", ".model"), ("w4", ".safetensors")))
def test_size(
    quantized: Callable[..., Any], float_model: Callable[..., Any], tmp_path: Path, preset: str, suffix: str
) -> None:
    torch.save(float_model("large"), tmp_path / "float.model")
    gaq.save(quantized(preset, "large"), tmp_path / f"model{suffix}")
    ratio = (tmp_path / "float.model").stat().st_size / (tmp_path / f"model{suffix}").stat().st_size
    assert ratio >= (7.0 if preset.startswith("w4") else 4.0)


@pytest.mark.parametrize(("preset", "least"), [("gaq", 4.0), ("w4", 7.0)])
def test_size_with_many_elements(float_model: Callable[..., Any], tmp_path: Path, preset: str, least: float) -> None:
    """Bits give way where most weights belong to tensors that are sensitive."""
    torch.save(float_model("elements"), tmp_path / "float.model")

    def ratio(spec: Any) -> float:
        gaq.save(gaq.convert(gaq.prepare(float_model("elements"), spec)), tmp_path / "own.model")
        return (tmp_path / "float.model").stat().st_size / (tmp_path / "own.model").stat().st_size

    assert least <= ratio(preset) < 1.2 * least
    if preset == "gaq":
        assert ratio({"preset": preset, "weights": {"least_compression": None}}) < least


BLOCKED = """
import importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("gaq"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import ase.io, torch
from mace.calculators import MACECalculator
atoms = ase.io.read(sys.argv[1], ":")
result = {}
for path in sys.argv[2:]:
    torch.manual_seed(5)
    before = torch.get_default_dtype(), torch.get_rng_state()
    model = torch.load(path, map_location="cpu", weights_only=False)
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert type(model).__module__ == "mace.modules.models", type(model)
    by_path = path.endswith("gaq_32.model")
    calculator = MACECalculator(**({"model_paths": path} if by_path else {"models": model}), device="cpu")
    result[path] = [calculator.get_potential_energy(one) for one in atoms]
    result[path + " dtype"] = str(next(calculator.models[0].parameters()).dtype)
assert not [name for name in sys.modules if name.split(".")[0].startswith("gaq")]
print("RESULT" + json.dumps(result))
"""


@pytest.mark.parametrize("presets", [("gaq", "w4a16"), pytest.param(PRESETS, marks=pytest.mark.slow)])
@pytest.mark.smoke
def test_loads_where_this_package_is_not_installed(
    quantized: Callable[..., Any],
    evaluate: Callable[..., Any],
    structures: list[Any],
    python: Callable[..., Any],
    tmp_path: Path,
    presets: tuple[str, ...],
) -> None:
    import ase.io

    ase.io.write(tmp_path / "structures.xyz", structures, format="extxyz")
    expected = {}
    for preset in presets:
        for dtype in (torch.float32, torch.float64) if preset == "gaq" else (torch.float32,):
            path = tmp_path / f"{preset}_{str(dtype)[-2:]}.model"
            model = quantized(preset, dtype=dtype)
            gaq.save(model, path)
            with unquantized(model):
                expected[str(path)] = evaluate(model, ase.io.read(tmp_path / "structures.xyz", ":"))[0]
            expected[f"{path} dtype"] = str(dtype)
    paths = [path for path in expected if not path.endswith("dtype")]
    done = python(BLOCKED, str(tmp_path / "structures.xyz"), *paths, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    assert result.keys() == expected.keys()
    for path in paths:
        np.testing.assert_allclose(result[path], expected[path], rtol=1e-6, err_msg=path)
        assert result[f"{path} dtype"] == expected[f"{path} dtype"]


def repack(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Rewrite the archive of a `.model` file with changed entries, checksums of the archive included."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def refuse(path: Path, *words: str) -> str:
    with pytest.raises(ModelFileError) as caught:
        files.load(path)
    message = str(caught.value)
    assert str(path) in message, message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


DAMAGED = """
import sys, json, hashlib, resource, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.modules["gaq"] = None
import mace, torch
if Path("/proc/self/statm").exists():  # a damaged length may ask for any amount of memory
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), used + (4 << 30)))
def facts(path):
    model = torch.load(path, map_location="cpu", weights_only=False)
    summary = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        summary.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, list))}
        summary.update(repr((name, type(module).__name__, sorted(plain.items()))).encode())
    return summary.hexdigest()
result = {}
for path in sys.argv[1:]:
    try:
        result[path] = facts(path)
    except BaseException as error:
        result[path] = f"{type(error).__name__}: {error}"
print("RESULT" + json.dumps(result))
"""


@pytest.mark.slow
def test_damage_is_found_where_this_package_is_not_installed(
    quantized: Callable[..., Any], python: Callable[..., Any], tmp_path: Path
) -> None:
    """One bit of the pickle or of the numbers, at places spread over the file: an error, or the same model."""
    path = tmp_path / "model.model"
    gaq.save(quantized("gaq"), path)
    with zipfile.ZipFile(path) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if "/data" in i.filename}
    generator = random.Random(0)
    damaged = []
    for number in range(40):
        entries = [name for name in sizes if name.endswith("data.pkl") == (number % 2 == 0)]
        name = generator.choices(entries, [sizes[one] for one in entries])[0]
        place, bit = generator.randrange(sizes[name]), generator.randrange(8)
        damaged.append(str(tmp_path / f"{number}.model"))
        Path(damaged[-1]).write_bytes(path.read_bytes())

        def change(entry: str, data: bytes, name: str = name, place: int = place, bit: int = bit) -> bytes:
            return data if entry != name else data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

        repack(Path(damaged[-1]), change)
    done = python(DAMAGED, str(path), *damaged, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    intact = result.pop(str(path))
    assert len(intact) == 64, intact
    found = {name: text for name, text in result.items() if text != intact}
    assert not {name: text for name, text in found.items() if ": " not in text}
    assert sum("do not match the checksum" in text for text in found.values()) >= 18
    assert len(found) >= 32


def test_altered_codes(quantized: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.model"
    gaq.save(quantized("w8"), path)
    with zipfile.ZipFile(path) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist() if "/data/" in i.filename}
    largest = max(sizes, key=sizes.__getitem__)
    repack(path, lambda name, data: flip(data, len(data) // 2) if name == largest else data)
    refuse(path, "checksum", "altered or damaged")


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def write_safetensors(path: Path, header: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of our form with the checksum that belongs to it."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"gaq": header, CHECKSUM: checksum(header, tensors)})


NUMBERS = re.compile(r"(?<=[:\[, ])-?\d+(\.\d+)?(e-?\d+)?(?=[,\]} ])")


def test_a_changed_number_in_the_header(quantized: Callable[..., Any], tmp_path: Path) -> None:
    """Every number: isolated-atom energies, cutoff, numbers of neighbours, scale and shift, bits."""
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    gaq.save(quantized("gaq"), path)
    metadata, tensors = read_safetensors(path)
    header = metadata["gaq"]
    places = list(NUMBERS.finditer(header))
    assert len(places) > 100
    assert {"r_max", "avg_num_neighbors", "atomic_energies", "atomic_inter_scale"} < set(json.loads(header)["config"])
    for place in places:
        last = place.end() - 1
        changed = header[:last] + ("1" if header[last] != "1" else "2") + header[last + 1 :]
        assert checksum(changed, tensors) != metadata[CHECKSUM]
    save_file(tensors, path, metadata={**metadata, "gaq": changed})
    refuse(path, "checksum", "altered or damaged")


def test_unknown_fields(quantized: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    gaq.save(quantized("w8"), path)
    metadata, tensors = read_safetensors(path)
    write_safetensors(path, json.dumps({**json.loads(metadata["gaq"]), "elements": []}), tensors)
    refuse(path, "elements: not known")
    write_safetensors(path, metadata["gaq"], {**tensors, "offset": torch.zeros(1)})
    refuse(path, "offset: not known")


def test_altered_safetensors(quantized: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name in ("codes", "scales"):
        path = tmp_path / f"{name}.safetensors"
        gaq.save(quantized("w8"), path)
        metadata, tensors = read_safetensors(path)
        changed = tensors[name].clone()
        changed[0] = changed[0] + 1 if name == "codes" else changed[0] * 2
        tensors[name] = changed
        save_file(tensors, path, metadata=metadata)
        refuse(path, "checksum")


def test_incomplete_safetensors(quantized: Callable[..., Any], tmp_path: Path) -> None:
    """A header that promises what the file does not hold, whose checksum is right."""
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    gaq.save(quantized("gaq"), path)
    metadata, tensors = read_safetensors(path)
    header = json.loads(metadata["gaq"])

    missing = tmp_path / "missing.safetensors"
    name = "codes"
    write_safetensors(missing, metadata["gaq"], {k: v for k, v in tensors.items() if k != name})
    refuse(missing, "damaged")

    short = tmp_path / "short.safetensors"
    write_safetensors(short, metadata["gaq"], {**tensors, name: tensors[name][:-1].clone()})
    refuse(short)

    broken = tmp_path / "broken.safetensors"
    write_safetensors(broken, metadata["gaq"][:-20], tensors)
    refuse(broken, "damaged")

    unknown = tmp_path / "unknown.safetensors"
    config = {**header["config"], "interaction_cls": "FutureInteractionBlock"}
    write_safetensors(unknown, json.dumps({**header, "config": config}), tensors)
    refuse(unknown, "FutureInteractionBlock")

    foreign = tmp_path / "foreign.safetensors"
    save_file(tensors, foreign)
    refuse(foreign, "not one written by gaq")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_newer_format(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    with monkeypatch.context() as patch:
        patch.setattr(packed, "FORMAT", 99)
        gaq.save(quantized("w8"), path)
    refuse(path, "format 99", "pip install -U gaq")


def test_earlier_safetensors(quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(packed, "FORMAT", 2)
        gaq.save(quantized("w8"), path)
    refuse(path, "before format 3", "quantize the float model again")


class Elsewhere:
    """A class that a reader will not find."""


def test_other_kinds_of_files(float_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(tmp_path / "none.model", "no such file")
    refuse(tmp_path / "none.safetensors", "no such file")
    (tmp_path / "folder.model").mkdir()
    refuse(tmp_path / "folder.model")

    (tmp_path / "text.model").write_text("not a model at all\n" * 50)
    refuse(tmp_path / "text.model", "not a MACE model")
    (tmp_path / "text.safetensors").write_text("not a model at all\n" * 50)
    refuse(tmp_path / "text.safetensors", "not a safetensors file")
    (tmp_path / "noise.model").write_bytes(np.random.default_rng(0).bytes(5000))
    refuse(tmp_path / "noise.model", "not a MACE model")

    torch.save({"weights": 1}, tmp_path / "dict.model")
    refuse(tmp_path / "dict.model", "holds a dict")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.model")
    refuse(tmp_path / "linear.model", "holds a Linear")
    (tmp_path / "plain.model").write_bytes(pickle.dumps([1, 2]))
    refuse(tmp_path / "plain.model")
    torch.save(float_model().state_dict(), tmp_path / "state.model")
    refuse(tmp_path / "state.model", "holds a OrderedDict")

    torch.save(Elsewhere(), tmp_path / "class.model")
    with monkeypatch.context() as patch:
        patch.delattr(f"{__name__}.Elsewhere")
        refuse(tmp_path / "class.model", "not a MACE model")

    torch.jit.save(jit_compile(float_model()), tmp_path / "script.model")
    refuse(tmp_path / "script.model", "TorchScript", ".model file that mace_run_train writes")


def test_core_errors_are_value_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        gaq.load(tmp_path / "none.model")
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(ValueError, match="onnx"):
        gaq.load(tmp_path / "model.onnx")


def test_nothing_is_left_behind_when_writing_fails(
    quantized: Callable[..., Any],
    float_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        gaq.save(float_model(), tmp_path / "float.model")
    with pytest.raises(OSError):
        gaq.save(quantized("w8"), tmp_path / "folder" / "model.model")
    model = quantized("w8")
    model.interactions[0].avg_num_neighbors = 3.0
    for suffix in SUFFIXES:
        with pytest.raises(ModelFileError, match="avg_num_neighbors"):
            gaq.save(model, tmp_path / f"model{suffix}")

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    gaq.save(quantized("w8"), tmp_path / "kept.model")
    kept = (tmp_path / "kept.model").read_bytes()
    monkeypatch.setattr(files, "deflate", fail)
    with pytest.raises(OSError, match="disk full"):
        gaq.save(quantized("w4"), tmp_path / "kept.model")
    assert [file.name for file in tmp_path.iterdir()] == ["kept.model"]
    assert (tmp_path / "kept.model").read_bytes() == kept


@pytest.mark.smoke
def test_stock_models_load_and_save_as_stock(
    float_model: Callable[..., Any], evaluate: Callable[..., Any], structures: list[Any], tmp_path: Path
) -> None:
    model = float_model()
    torch.save(model, tmp_path / "float.model")
    loaded = gaq.load(tmp_path / "float.model")
    assert state_of(loaded) is None
    assert type(loaded).__module__ == "mace.modules.models"
    np.testing.assert_array_equal(evaluate(loaded, structures)[0], evaluate(model, structures)[0])


def test_pickle_holds_only_public_callables(quantized: Callable[..., Any], tmp_path: Path) -> None:
    """Every global a packed pickle asks for belongs to Python, torch, e3nn or MACE."""
    import pickletools

    gaq.save(quantized("gaq"), tmp_path / "model.model")
    with zipfile.ZipFile(tmp_path / "model.model") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(name)
    modules = {
        str(arg).split(" ")[0] for opcode, arg, _ in pickletools.genops(io.BytesIO(data)) if opcode.name == "GLOBAL"
    }
    assert modules
    python = {"operator", "_operator", "functools", "itertools", "importlib", "collections", "builtins", "__builtin__"}
    assert {module.split(".")[0] for module in modules} <= {"mace", "torch", "e3nn", "json", "zlib", *python}


def test_root_without_quantization_pickles_as_stock(float_model: Callable[..., Any]) -> None:
    """MACE rebuilds a model by its class, and may write it before it has taken over a quantization."""
    from mace.modules import models as mace_models

    from gaq_mace.root import ScaleShiftMACE

    model = float_model()
    model.__class__ = ScaleShiftMACE
    restored = pickle.loads(pickle.dumps(model))
    assert type(restored) is mace_models.ScaleShiftMACE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, restored.get_parameter(name)), name


def test_files_have_the_permissions_of_new_ones(quantized: Callable[..., Any], tmp_path: Path) -> None:
    """A library that writes for its owner alone would hide the file from a group."""
    (tmp_path / "plain").touch()
    for suffix in SUFFIXES:
        gaq.save(quantized("w8"), tmp_path / f"model{suffix}")
        assert (tmp_path / f"model{suffix}").stat().st_mode == (tmp_path / "plain").stat().st_mode
