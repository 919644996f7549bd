"""Sizes of a model's weights, in float and packed, and the table that `nequip-deploy build` prints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from gaq.deployed.check import Check
from gaq.files.packing import packed_bytes as code_bytes
from gaq.model.state import is_kind
from gaq.untyped import AnyModule
from gaq_nequip import weights
from gaq_nequip.deploy import artefact
from gaq_nequip.forms import COMPILED
from gaq_nequip.freeze import freeze
from gaq_nequip.packed import PackedWeight

__all__ = ["WeightSizes", "float_weight_bytes", "frozen_bytes", "packed_bytes", "table", "unfolded_bytes"]


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights in three forms.

    Attributes:
        floats: all weights in float32.
        plain: codes and scales, and the weights that stay float.
        frozen: the deployed form: `plain` with the self-connection folded by type where that is smaller.
        numbers: how many numbers are packed in the deployed form.
    """

    floats: int
    plain: int
    frozen: int
    numbers: int

    @classmethod
    def of(cls, model: AnyModule, frozen: AnyModule) -> WeightSizes:
        """Measure a quantized model and its frozen copy."""
        return cls(float_weight_bytes(model), unfolded_bytes(model), *frozen_bytes(frozen))


def float_weight_bytes(model: AnyModule) -> int:
    """Bytes of a model's parameters in float32."""
    return 4 * sum(p.numel() for p in model.parameters())


def unfolded_bytes(model: AnyModule) -> int:
    """Bytes of codes, scales and float weights of a quantized model that is not folded; the model is not changed."""
    quantizers = weights.weight_quantizers(model)
    packed = sum(code_bytes(q.layout.numel, q.bits) + 2 * q.groups for q in quantizers.values())
    packed += sum(p.bytes for p in weights.packed_weights(model).values())
    return packed + 4 * sum(p.numel() for name, p in model.named_parameters() if name not in quantizers)


def frozen_bytes(frozen: AnyModule) -> tuple[int, int]:
    """Bytes of codes, scales and float weights of a frozen model, and how many numbers are packed."""
    packed = [m for m in frozen.modules() if is_kind(m, PackedWeight)]
    return sum(m.bytes for m in packed) + float_weight_bytes(frozen), sum(m.numel for m in packed)


def packed_bytes(model: AnyModule, fold: bool) -> tuple[int, int]:
    """`frozen_bytes` of a copy of a quantized model.

    Args:
        model: quantized model; it is not changed.
        fold: whether the self-connection is folded by type, as in compiled files.
    """
    return frozen_bytes(freeze(copy.deepcopy(model), fold=fold))


def table(sizes: WeightSizes, source: Path, deployed: Path, check: Check | None, compare: str | None) -> str:
    """The table of `nequip-deploy build`: sizes of weights and files, and differences between file and model."""
    rows: list[tuple[str, str, str]] = []
    if sizes.floats:
        rows.append(("weights, float32", _kib(sizes.floats), ""))
        note = f"{sizes.floats / sizes.plain:.2f}x smaller"
        rows.append(("weights, codes and scales", _kib(sizes.plain), note))
        if sizes.frozen != sizes.plain:
            note = f"{sizes.floats / sizes.frozen:.2f}x smaller ({sizes.numbers} numbers)"
            rows.append(("  and self-connection folded by type", _kib(sizes.frozen), note))
    if deployed.name.endswith(COMPILED):
        rows.append(("constants in the file, not compressed", _kib(artefact.sections(deployed).weights), ""))
    rows.append((f"{source.name}", _kib(source.stat().st_size), "the model it was made of"))
    rows.append((deployed.name, _kib(deployed.stat().st_size), ""))
    if compare is not None:
        stock = Path(compare).stat().st_size
        slimmed = deployed.with_name("slimmed" + COMPILED)
        artefact.slim(Path(compare), slimmed)
        size, equal = deployed.stat().st_size, slimmed.stat().st_size
        rows.append((Path(compare).name, _kib(stock), f"{stock / size:.2f}x larger"))
        rows.append(("  equally slimmed", _kib(equal), f"{equal / size:.2f}x larger"))
    if check is not None:
        rows.append((f"largest energy difference, {check.structures} structures", f"{check.energy:.2g}", "meV/atom"))
        note = f"meV/Å (largest force {check.force_scale:.0f})"
        rows.append((f"largest force difference, {check.structures} structures", f"{check.forces:.2g}", note))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"
