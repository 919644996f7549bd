"""Linear layers with integer weights for GPUs, on features rounded to at most 24 bits or left in float.

**Rounded.** Every row of features has its own step, ``1.000001 max|x| / top``, as in
`gaq.quantizers.features.FeatureQuantizer` with per-atom ranges. A 16-bit code is ``256 hi + lo`` with both planes
signed int8 (`gaq.files.packing.split_planes`; 32639 is the largest code for which that holds), a code of 17 to 24 bits
``65536 hi + 256 middle + lo``. The layer is then two int8 matrix products with int32 sums, ``256 (hi W) + lo W``, or
three, which is exact. The sums of one plane stay below 2^31 for up to `MAX_INPUTS` inputs. The planes are combined in
64 bits, because from 512 inputs on ``256 (hi W)`` needs more than 32.

**Not rounded.** The features are float, and only the weights are integers (presets ``w8`` and ``w4``).

The gradient by the features is that of the layer without rounding (straight-through estimator): float times integer
weights, in the precision of the features. Weights and scales have no gradient.

`reference` is the same in plain torch with one float product, differentiable any number of times. It is the path for
layers that the Triton kernel does not serve, and on CPUs, where two planes take longer than the float product
(`benchmarks/int8_linear.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaq.files.packing import PLANES_MAX, planes_max, unpack_int4
from gaq.kernels import gpu

__all__ = ["MAX_INPUTS", "linear", "reference", "round_rows", "unpacked"]

MAX_INPUTS = (1 << 31) // (128 * 128) - 1
"""Largest number of inputs for which the int32 sums of a plane cannot overflow: a product is at most 128 x 128."""


def round_rows(x: Tensor, top: int = PLANES_MAX) -> tuple[Tensor, Tensor]:
    """Round features to codes with a step for each row.

    Args:
        x: (rows, inputs).
        top: largest code.

    Returns:
        Codes from -top to top in the dtype of `x`, and steps (rows, 1). The rounded features are their product.
    """
    step = x.abs().amax(1, keepdim=True).clamp_min(1e-30) * 1.000001 / top
    return torch.round(x / step), step


def unpacked(codes: Tensor, inputs: int, outputs: int) -> Tensor:
    """Integer weights (inputs, outputs), int8, from such weights or from the bytes of `gaq.files.packing.pack_int4`."""
    if codes.dtype == torch.uint8:
        return unpack_int4(codes, inputs * outputs).view(inputs, outputs)
    return codes


def _scales(scale: Tensor, inputs: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Scales that broadcast against (inputs, outputs)."""
    scale = scale.to(dtype)
    return scale.repeat_interleave(group_size, 0)[:inputs] if group_size else scale


def _check(x: Tensor, codes: Tensor, scale: Tensor, residual: Tensor | None, top: int, group_size: int) -> None:
    if x.dim() != 2 or scale.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"features (rows, inputs) and scales (groups, outputs), not {x.shape} and {scale.shape}")
    inputs, outputs = x.shape[1], scale.shape[1]
    groups = -(-inputs // group_size) if group_size else 1
    if codes.dtype == torch.uint8:
        fits = codes.shape == ((inputs * outputs + 1) // 2,)
    else:
        fits = codes.dtype == torch.int8 and codes.shape == (inputs, outputs)
    if not fits or scale.shape[0] != groups:
        raise ValueError(
            f"{inputs} inputs and {outputs} outputs take int8 codes of that shape, or a row of packed uint8, and "
            f"{groups} rows of scales, not {codes.dtype} of shape {tuple(codes.shape)} and {scale.shape[0]}"
        )
    if residual is not None and residual.shape != (x.shape[0], outputs):
        raise ValueError(f"a residual of shape {(x.shape[0], outputs)}, not {tuple(residual.shape)}")
    if not 0 <= top <= planes_max(3):
        raise ValueError(f"largest code {top}: three int8 planes hold {planes_max(3)}; 0 leaves the features in float")
    if top and inputs > MAX_INPUTS:
        raise ValueError(f"{inputs} inputs: the sums of a plane hold {MAX_INPUTS} at most")
    if not x.dtype.is_floating_point or (residual is not None and residual.dtype != x.dtype):
        raise TypeError(f"features and residual in one floating dtype, not {x.dtype}")


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    residual: Tensor | None = None,
    top: int = PLANES_MAX,
    group_size: int = 0,
) -> Tensor:
    """Compute a linear layer by the Triton kernel where that serves it, else by `reference`; differentiable once.

    Args:
        x: features (rows, inputs), float32 or float64.
        codes: weights (inputs, outputs), int8; or 4-bit weights packed by `gaq.files.packing.pack_int4`, uint8.
        scale: of the weights, (groups, outputs); one row where there is no group size.
        residual: (rows, outputs), added to the result.
        top: largest code of the rounded features, as `gaq.quantizers.weights.largest_code` gives it for up to 24 bits;
            0 leaves them in float.
        group_size: inputs that share a row of scales; the last group may be smaller. 0 means all inputs.

    Returns:
        (rows, outputs), in the dtype of the features.

    Raises:
        ValueError, TypeError: for shapes and dtypes that do not fit.
    """
    _check(x, codes, scale, residual, top, group_size)
    if gpu.chosen(x.device):
        from gaq.kernels.gpu import linear as gpu_linear

        if gpu_linear.serves(x, codes, group_size):
            return gpu_linear.linear(x, codes, scale, residual, top, group_size)
    return reference(x, codes, scale, residual, top, group_size)


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    residual: Tensor | None = None,
    top: int = PLANES_MAX,
    group_size: int = 0,
) -> Tensor:
    """Compute `linear` in plain torch with one float product, differentiable any number of times."""
    _check(x, codes, scale, residual, top, group_size)
    weights = unpacked(codes, x.shape[1], scale.shape[1]).to(x.dtype)
    weights = weights * _scales(scale, x.shape[1], group_size, x.dtype)
    if top:
        with torch.no_grad():
            rows, step = round_rows(x, top)
            change = rows * step - x
        x = x + change
    out = x @ weights
    return out if residual is None else out + residual
