"""The `.safetensors` form of a packed MACE model, which runs no code on load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import torch
from e3nn import o3
from mace.modules import gate_dict, interaction_classes, readout_classes
from torch import Tensor

import gaq
from gaq.files.packing import pack, packed_bytes, unpack
from gaq.files.whole import let_others_read
from gaq.model.state import FixedWeight, ModelFileError, StoredState, check_format
from gaq.quantizers.weights import WeightLayout, dequantize
from gaq.untyped import Document
from gaq_mace.packed import Packed, build, check_parameters, check_sites, verify
from gaq_mace.root import restore
from gaq_mace.weights import layouts

__all__ = ["config_from_json", "config_to_json", "load_safetensors", "save_safetensors"]

CHECKSUM = "gaq_sha256"
"""Where a file's metadata holds its checksum."""

HEADER = frozenset({"meta", "config", "dtype", "weights"})
POOLS = frozenset({"codes", "scales"})
PREFIXES = frozenset({"plain", "range"})

_NAMES: dict[str, Document] = {
    "interaction_cls": interaction_classes,
    "interaction_cls_first": interaction_classes,
    "readout_cls": readout_classes,
    "gate": gate_dict,
}


def config_to_json(config: Document) -> Document:
    """Constructor arguments of a MACE model as plain data: classes by MACE's names for them, irreps as text.

    Raises:
        ModelFileError: for a class that MACE does not know by name.
    """
    plain: Document = {}
    for key, value in config.items():
        if key in _NAMES and value is not None:
            names = [name for name, known in _NAMES[key].items() if known is value]
            if not names:
                raise ModelFileError(f"{key} {value!r} is not one of MACE's own, so it cannot be stored by name.")
            value = names[0]
        elif isinstance(value, o3.Irreps):
            value = {"irreps": str(value)}
        plain[key] = value
    return plain


def config_from_json(plain: Document) -> Document:
    """The constructor arguments that `config_to_json` made plain.

    Raises:
        ModelFileError: for a name that this MACE does not know.
    """
    config: Document = {}
    for key, value in plain.items():
        if key in _NAMES and value is not None:
            if value not in _NAMES[key]:
                raise ModelFileError(
                    f"{key}: this MACE does not know {value!r}; install the version that wrote the file."
                )
            value = _NAMES[key][value]
        elif isinstance(value, dict) and set(value) == {"irreps"}:
            value = o3.Irreps(value["irreps"])
        config[key] = value
    return config


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file's contents: its header, and each tensor's name, dtype, shape and bytes.

    A safetensors file has no checksum of its own, and much of what makes a model's energies is in the header: isolated
    atoms' energies, cutoff, scale, widths of activations.
    """
    summary = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        summary.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        summary.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def save_safetensors(packed: Packed, path: Path) -> None:
    """Write a model that was taken apart: codes of all weights in one tensor, scales in another, the rest by name."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {f"plain:{name}": t.contiguous() for name, t in packed.plain.items()}
    table = {}
    # Two tensors, in the order of the table: with one for each weight the header would be as large as some models.
    for name, q in packed.quantized.items():
        table[name] = [q.bits, q.granularity, q.group_size, list(q.codes.shape)]
    tensors["codes"] = torch.cat([pack(q.codes, q.bits) for q in packed.quantized.values()])
    tensors["scales"] = torch.cat([q.scale.to(torch.bfloat16) for q in packed.quantized.values()])
    # Per-atom ranges are not observed, so there is nothing to store for them.
    tensors.update({f"range:{name}": t for name, t in packed.ranges.items() if bool(t.any())})
    header = {
        "meta": {key: value for key, value in packed.meta.items() if key != "checked"},
        "config": config_to_json(packed.config),
        "dtype": str(packed.dtype).removeprefix("torch."),
        "weights": table,
    }
    text = json.dumps(header)
    save_file(tensors, path, metadata={"gaq": text, CHECKSUM: checksum(text, tensors)})
    let_others_read(Path(path))


def check_known(header: Document, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a header or tensors with names that this version does not know, which a reader would leave out silently.

    Raises:
        ModelFileError: naming them.
    """
    unknown = sorted(set(header) - HEADER)
    unknown += sorted(name for name in tensors if name not in POOLS and name.partition(":")[0] not in PREFIXES)
    if unknown:
        raise ModelFileError(
            f"{', '.join(unknown)}: not known to gaq {gaq.__version__}; read it with the gaq that wrote it."
        )


def load_safetensors(path: Path) -> torch.nn.Module:
    """Build the quantized model that `save_safetensors` wrote.

    Raises:
        ModelFileError: for a file that is truncated, altered, of another kind, written before format 3 or by a later
            version, or written with a MACE that builds other parameters.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"truncated, or not a safetensors file ({error}).") from error
    if "gaq" not in metadata:
        raise ModelFileError("a safetensors file, but not one written by gaq.")
    header = json.loads(metadata["gaq"])
    check_format(header["meta"])
    if int(header["meta"].get("format", 0)) < 3:
        raise ModelFileError(
            "a form of before format 3, without a checksum of the header; quantize the float model again."
        )
    if metadata.get(CHECKSUM) != checksum(metadata["gaq"], tensors):
        raise ModelFileError(
            "the contents of this file do not match the checksum stored with them: it was altered or damaged. "
            "Quantize the float model again."
        )
    check_known(header, tensors)
    model = build(config_from_json(header["config"]), getattr(torch, header["dtype"]))
    state = {key.removeprefix("plain:"): t for key, t in tensors.items() if key.startswith("plain:")}
    shapes = {name: torch.empty(shape, device="meta") for name, (*_, shape) in header["weights"].items()}
    check_parameters(model, {**state, **shapes}, header["meta"])
    layout_of = layouts(model)
    parameters = {name for name, _ in model.named_parameters()}
    header["meta"]["checked"] = sorted({*parameters, *header["meta"].get("trained_buffers", ())})
    weights = {}
    first_byte = first_scale = 0
    for name, (bits, granularity, group_size, shape) in header["weights"].items():
        layout: WeightLayout = layout_of[name]
        end_byte = first_byte + packed_bytes(layout.numel, bits)
        end_scale = first_scale + layout.scales(granularity, group_size)
        codes = unpack(tensors["codes"][first_byte:end_byte], bits, shape)
        scale = tensors["scales"][first_scale:end_scale].float()
        first_byte, first_scale = end_byte, end_scale
        state[name] = dequantize(codes, scale, layout.scale_index(granularity, group_size))
        weights[name] = FixedWeight(bits, granularity, group_size, scale)
    # The buffers that the constructor makes stay.
    model.load_state_dict({**model.state_dict(), **state})
    verify(model, header["meta"])
    ranges = {key.removeprefix("range:"): t for key, t in tensors.items() if key.startswith("range:")}
    restore(model, StoredState(header["meta"], ranges, weights))
    check_sites(model, header["meta"], ranges, complete=False)
    return model
