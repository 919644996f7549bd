"""Parts of a MACE model: some of its elements, one of its heads. What is computed for them stays the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from e3nn import o3
from mace.tools.scripts_utils import remove_pt_head
from torch import Tensor

from gaq.model.elements import checked_elements
from gaq.process import default_dtype
from gaq.third_party_warnings import known_hidden
from gaq.untyped import AnyModule
from gaq_mace.engine import decelerate
from gaq_mace.model import check_supported
from gaq_mace.packed import build, model_config
from gaq_mace.root import is_quantized

__all__ = ["element_names", "head_names", "select", "select_elements", "select_head"]


def element_names(model: torch.nn.Module) -> list[str]:
    """Chemical symbols of a model's elements, in the model's order."""
    from ase.data import chemical_symbols

    return [chemical_symbols[int(number)] for number in model.atomic_numbers]  # type: ignore[union-attr]  # a tensor


def head_names(model: torch.nn.Module) -> list[str]:
    """Names of a model's heads, in the model's order; one where the model does not name any."""
    return [str(name) for name in getattr(model, "heads", None) or ["Default"]]


def _cut(source: Tensor, shape: Sequence[int], rows: Tensor) -> Tensor:
    """A tensor with only these rows along the axis of elements, which is the one where the two shapes differ.

    Raises:
        ValueError: if the shapes differ in another way, which no model that MACE builds does.
    """
    axes = [axis for axis, (old, new) in enumerate(zip(source.shape, shape, strict=True)) if old != new]
    if any(shape[axis] != len(rows) or source.shape[axis] <= int(rows.max()) for axis in axes):
        raise ValueError(f"a tensor of shape {tuple(source.shape)} cannot be cut to {tuple(shape)}.")
    for axis in axes:
        source = source.index_select(axis, rows)
    return source


def _cut_paths(source: AnyModule, target: AnyModule, rows: Tensor) -> Tensor:
    """The flat weight of an equivariant layer, with only these rows where a path has one for each element.

    e3nn divides a path by the root of its fan-in, which counts the elements: the weights take up the difference.

    Args:
        source: an e3nn `Linear` or `TensorProduct` over all elements.
        target: the same over those that are kept.
        rows: places of the kept elements, (kept,).
    """
    pieces, offset = [], 0
    for old, new in zip(source.instructions, target.instructions, strict=True):
        if not getattr(old, "has_weight", True) or old.i_out is None:
            continue
        size = int(np.prod(old.path_shape))
        piece = source.weight.detach()[offset : offset + size].reshape(old.path_shape)
        pieces.append(_cut(piece, new.path_shape, rows).reshape(-1) * (old.path_weight / new.path_weight))
        offset += size
    return torch.cat(pieces)


def _check(model: torch.nn.Module) -> None:
    """Refuse models that have no parts to choose.

    Raises:
        ValueError: for quantized models and those that cannot be quantized.
    """
    if is_quantized(model):
        raise ValueError("this model is quantized: choose its elements and its head before that, in the float model.")
    check_supported(decelerate(copy.copy(model)))  # the model may run through the kernels, and stays as it is


def select(
    model: torch.nn.Module, elements: str | Iterable[str] | None = None, head: str | None = None
) -> torch.nn.Module:
    """A copy with some of the elements, with one head, or both; see `select_elements` and `select_head`."""
    if head is not None:
        model = select_head(model, head)
    return model if elements is None else select_elements(model, elements)


def select_head(model: torch.nn.Module, head: str) -> torch.nn.Module:
    """A copy of a float MACE model with one of its heads, made by MACE's own `remove_pt_head`.

    Raises:
        ValueError: if the model has no such head, is quantized, or cannot be quantized.
    """
    _check(model)
    heads = head_names(model)
    if head not in heads:
        raise ValueError(f"head: the model has no head {head!r}; it has {', '.join(heads)}.")
    if len(heads) == 1:
        return copy.deepcopy(model)
    first = next(model.parameters())
    with default_dtype(first.dtype), torch.random.fork_rng(devices=[]), known_hidden():
        single: torch.nn.Module = remove_pt_head(model, head).to(first.device)
    return single.train(model.training)


def select_elements(model: torch.nn.Module, elements: str | Iterable[str]) -> torch.nn.Module:
    """A copy of a float MACE model that knows only some of its elements.

    Energies and forces of structures of these elements are those of the model, up to rounding of sums. MACE's own
    `load_foundations_elements` serves models of one head whose layers have certain irreps; this follows the shapes.

    Args:
        model: a float `ScaleShiftMACE`; it is not changed.
        elements: chemical symbols, or one text with commas between them.

    Raises:
        ValueError: for a quantized model, models that cannot be quantized, and elements that cannot be kept.
    """
    _check(model)
    names = element_names(model)
    kept = checked_elements(elements, names)
    rows = torch.tensor([names.index(symbol) for symbol in kept])
    config = model_config(model)
    config["num_elements"] = len(kept)
    config["atomic_numbers"] = np.array(config["atomic_numbers"])[rows].tolist()
    config["atomic_energies"] = np.array(config["atomic_energies"])[..., rows].tolist()
    parameter = next(model.parameters())
    smaller = build(config, parameter.dtype).to(parameter.device)
    rows = rows.to(parameter.device)
    sources = dict(model.named_modules())
    with torch.no_grad():
        for name, target in smaller.named_modules():
            source = sources[name]
            layered = isinstance(target, o3.Linear | o3.TensorProduct)
            for key, tensor in [*target.named_parameters(recurse=False), *target.named_buffers(recurse=False)]:
                value = getattr(source, key)
                by_path = layered and key == "weight" and value.shape != tensor.shape
                tensor.copy_(_cut_paths(source, target, rows) if by_path else _cut(value, tensor.shape, rows))
    return smaller.train(model.training)
