"""The contents of a quantized model's file, whatever its form, and the checks of its reader."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mace
import numpy as np
import torch
from mace.modules import models as mace_models
from mace.tools import scripts_utils
from torch import Tensor

import gaq
from gaq.caches import cached
from gaq.model.state import FORMAT, ModelFileError, feature_quantizers, require_state
from gaq.process import default_dtype
from gaq.quantizers.weights import QuantizedTensor
from gaq.third_party_warnings import known_hidden
from gaq.untyped import AnyModule, Document, ReadOnlyDocument
from gaq_mace.deferred import construct
from gaq_mace.layers import original_type
from gaq_mace.weights import quantized_weights, weight_quantizers

__all__ = [
    "WRITTEN",
    "Packed",
    "build",
    "check_parameters",
    "check_sites",
    "constructed",
    "meta_of",
    "model_config",
    "other_mace",
    "take_apart",
    "verify",
]


def _interactions(model: AnyModule) -> Iterable[AnyModule]:
    interactions: Iterable[AnyModule] = model.interactions
    return interactions


def model_config(model: torch.nn.Module) -> Document:
    """Constructor arguments of a MACE model, with arrays as lists and irreps as text.

    Raises:
        ModelFileError: if the interactions differ in a number the constructor takes only once.
    """
    config = scripts_utils.extract_config_mace_model(model)
    if "error" in config:
        raise ModelFileError(str(config["error"]))
    neighbors = {float(block.avg_num_neighbors) for block in _interactions(model)}
    if len(neighbors) > 1:
        raise ModelFileError(f"the interactions differ in avg_num_neighbors ({sorted(neighbors)}); cannot be packed.")
    for key in ("cueq_config", "oeq_config"):
        config.pop(key, None)
    plain: Document = {}
    for key, value in config.items():
        if key in ("interaction_cls", "interaction_cls_first"):
            value = original_type(value)
        if isinstance(value, np.ndarray | Tensor):
            value = value.tolist()
        elif isinstance(value, np.generic):
            value = value.item()
        plain[key] = value
    plain["avg_num_neighbors"] = float(plain["avg_num_neighbors"])
    return plain


def build(config: Document, dtype: torch.dtype) -> torch.nn.Module:
    """Build a plain MACE model of a configuration; the default dtype and the random state stay as they are.

    Its generated code is compiled when something asks for it (`gaq_mace.deferred`).
    """
    with torch.random.fork_rng(devices=[]), default_dtype(dtype), known_hidden():
        return construct(mace_models.ScaleShiftMACE, **config)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


@dataclass
class Packed:
    """The contents of a quantized model's file.

    Attributes:
        meta: plain data: versions, configuration, checksum.
        config: constructor arguments.
        dtype: of the model.
        quantized: codes and scales by parameter name.
        plain: every other parameter, and the buffers that differ from those the constructor makes.
        ranges: observed sizes of activations by site name.
        ratios: range ratios of the weights of a model in training.
    """

    meta: Document
    config: Document
    dtype: torch.dtype
    quantized: dict[str, QuantizedTensor]
    plain: dict[str, Tensor]
    ranges: dict[str, Tensor]
    ratios: dict[str, Tensor]


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names and values of tensors, in the order of their names; float tensors in float32."""
    summary = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        data = tensor.float() if tensor.is_floating_point() else tensor
        summary.update(name.encode())
        summary.update(data.contiguous().numpy().tobytes())
    return summary.hexdigest()


@dataclass(frozen=True)
class Constructed:
    """The result of MACE's constructor for a configuration, without the values of parameters.

    Attributes:
        parameters: names and shapes, as `described` gives them.
        tensors: the same of parameters and buffers.
        buffers: checksums by name.
    """

    parameters: frozenset[str]
    tensors: frozenset[str]
    buffers: dict[str, str]


@cached(most=8)
def constructed(key: bytes) -> Constructed:
    """Build a plain model and describe it. It is slow, so it is done once for each configuration.

    Args:
        key: configuration and dtype, pickled.
    """
    config, dtype = pickle.loads(key)
    model = build(config, dtype)
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    buffers = {name: _checksum(tensor) for name, tensor in state.items() if name not in parameters}
    return Constructed(frozenset(described(parameters)), frozenset(described(state)), buffers)


def _checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor with its dtype and shape, to the last bit."""
    data = tensor.detach().cpu().contiguous()
    summary = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    summary.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def described(tensors: Mapping[str, Tensor]) -> set[str]:
    """Names with shapes, such as ``"readouts.0.linear.weight (128,)"``."""
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def take_apart(model: torch.nn.Module) -> Packed:
    """The contents of the file of a quantized model.

    A file leaves out the buffers that MACE's constructor makes, above all the Clebsch-Gordan tables. `constructed`
    builds a second model of the configuration to find out which those are.

    Raises:
        ModelFileError: if the constructor would not make a model with these parameters, so that the file could not be
            loaded again.
    """
    config = model_config(model)
    dtype = _dtype(model)
    quantized = quantized_weights(model)
    parameters = dict(model.named_parameters())
    made = constructed(pickle.dumps((config, dtype)))
    # Fine-tuning of a foundation model makes parameters of some buffers (the radial basis), under the same names.
    if differing := (made.parameters - described(parameters)) | (described(parameters) - made.tensors):
        raise ModelFileError(
            f"{', '.join(sorted(differing))}: not what MACE builds of this model's configuration, so a packed file of "
            "it could not be loaded again. Save a model whose modules are MACE's own."
        )
    plain = {}
    for name, tensor in model.state_dict().items():
        if name == "_extra_state" or name in quantized:
            continue
        value = tensor.detach().cpu()
        if name in parameters or made.buffers.get(name) != _checksum(value):
            plain[name] = value.clone()
    meta = meta_of(model)
    # Packing rounds the weights, so the reader of the file gets a converted model.
    meta["status"] = "converted"
    weights = {name: q.dequantize() for name, q in quantized.items()}
    stored = {**weights, **{k: v for k, v in plain.items() if k in parameters}}
    meta["digest"] = digest(stored)
    meta["checked"] = sorted(stored)
    if trained_buffers := [n for n, p in parameters.items() if not described({n: p}) <= made.parameters]:
        meta["trained_buffers"] = sorted(trained_buffers)
    ranges = {name: q.ranges() for name, q in feature_quantizers(model).items()}
    ratios = {name: q.range_ratio.detach().cpu() for name, q in weight_quantizers(model).items()}
    return Packed(meta, config, dtype, quantized, plain, ranges, ratios)


WRITTEN = "this file was written with"


def other_mace(meta: ReadOnlyDocument) -> str:
    """The error for a reader with another MACE.

    It has two pairs of braces to format: tensors that only the file has, and those that only the model has.
    """
    writer = str(meta.get("mace", "of an unknown version"))
    return (
        f"{WRITTEN} mace-torch {writer} (torch {meta.get('torch', '?')}, gaq {meta.get('gaq', '?')}), and the mace "
        "installed here builds this model with other tensors. In the file only: {}. In the model only: {}. "
        f"Install the version that wrote the file (pip install mace-torch=={writer}) and load it there."
    )


def check_parameters(model: torch.nn.Module, stored: Mapping[str, Tensor], meta: ReadOnlyDocument) -> None:
    """Refuse to load tensors into a model that has other parameters.

    Args:
        model: as MACE has built it.
        stored: every parameter and some buffers in the file, by name.
        meta: of the file.

    Raises:
        ModelFileError: naming the tensors that differ and the MACE that wrote the file.
    """
    missing = described(dict(model.named_parameters())) - described(stored)
    unknown = described(stored) - described(model.state_dict())
    if missing or unknown:
        raise ModelFileError(other_mace(meta).format(sorted(unknown), sorted(missing)))


def verify(model: torch.nn.Module, meta: Document) -> None:
    """Check the parameters of a model against the names and the checksum stored with it.

    Raises:
        ModelFileError: if they differ: another MACE built the model, or the file was altered or damaged.
    """
    state = model.state_dict()
    checked = set(meta["checked"])
    unknown, missing = checked - set(state), {name for name, _ in model.named_parameters()} - checked
    if unknown or missing:
        raise ModelFileError(other_mace(meta).format(sorted(unknown), sorted(missing)))
    if digest({name: state[name] for name in checked}) != meta["digest"]:
        raise ModelFileError(
            "the weights in this file do not match the checksum stored with them: it was altered or damaged. "
            "Quantize the float model again."
        )


def check_sites(model: torch.nn.Module, meta: ReadOnlyDocument, ranges: Mapping[str, Tensor], complete: bool) -> None:
    """Refuse ranges of activations without a site in a restored model, and sites without ranges.

    Args:
        model: restored.
        meta: of the file.
        ranges: by site name.
        complete: whether the file holds the ranges of all sites, or only those that were observed.

    Raises:
        ModelFileError: naming the sites that differ and the MACE that wrote the file.
    """
    sites = set(feature_quantizers(model))
    unknown, missing = set(ranges) - sites, sites - set(ranges) if complete else set()
    if unknown or missing:
        raise ModelFileError(other_mace(meta).format(sorted(unknown), sorted(missing)))


def meta_of(model: torch.nn.Module) -> Document:
    """The description of a quantization without its tensors, as plain data."""
    state = require_state(model)
    return {
        "format": FORMAT,
        "gaq": gaq.__version__,
        "mace": getattr(mace, "__version__", "unknown"),
        "torch": torch.__version__,
        "status": state.status,
        "config": state.config.to_dict(),
        "notes": state.notes,
    }
