"""A weight as integer codes and scales, dequantized where it is used. Embedded in packages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gaq.files.packing import pack
from gaq.model.state import is_kind
from gaq.quantizers.weights import QuantizedTensor

__all__ = ["PackedWeight", "widen_codes"]


class PackedWeight(torch.nn.Module):
    """Takes the place of a `gaq.quantizers.weights.WeightQuantizer` and holds the codes of the weight it rounded.

    The codes are buffers, never parameters: int8 or int16 if they have 8 or 16 bits, otherwise packed
    (`gaq.files.packing`) in uint8. The scales are bfloat16. ``codes * scale`` is exact in float32 and float64, so both
    give the weights that were trained. `widen` trades bytes for time.

    Attributes:
        whole: whether `codes` holds one code per element, and not a packed stream.

    Args:
        tensor: codes and scales.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.bits = tensor.bits
        self.numel = tensor.codes.numel()
        self.weight_shape = list(tensor.codes.shape)
        self.granularity = tensor.granularity
        self.group_size = tensor.group_size
        self.layout = tensor.layout
        segments = tensor.layout.segments(tensor.granularity, tensor.group_size)
        self.segments = [(s.offset, list(s.shape), s.scale_offset, list(s.scale_shape)) for s in segments]
        flat = tensor.codes.reshape(-1).cpu()
        if tensor.bits in (8, 16):
            codes = flat.to(torch.int8 if tensor.bits == 8 else torch.int16)
        else:
            codes = pack(flat, tensor.bits)
        self.whole = tensor.bits in (8, 16)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", tensor.scale.reshape(-1).to(torch.bfloat16).cpu())

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale))

    def widen(self) -> None:
        """Keep codes of more than 8 bits as int16, so that steps need not unpack them; fewer bits stay packed."""
        if self.bits > 8 and not self.whole:
            self.codes = self.integers().to(torch.int16)
            self.whole = True

    def integers(self) -> Tensor:
        """The codes, flat, in an integer dtype that holds them."""
        if self.whole:
            return self.codes
        if self.bits == 4:
            nibbles = torch.stack((self.codes & 15, self.codes >> 4), dim=1).reshape(-1)[: self.numel]
            # Two's complement in four bits: 8 ... 15 stand for -8 ... -1.
            return (nibbles ^ 8).to(torch.int8) - 8
        # A stream of bits: a code starts anywhere in a byte, and ends at most two bytes later.
        start = torch.arange(self.numel, device=self.codes.device, dtype=torch.int32) * self.bits
        first = start >> 3
        stream = torch.nn.functional.pad(self.codes, (0, 2)).to(torch.int32)
        word = stream[first] | (stream[first + 1] << 8) | (stream[first + 2] << 16)
        wide = (word >> (start & 7)) & ((1 << self.bits) - 1)
        sign = 1 << (self.bits - 1)
        return (wide ^ sign) - sign

    def tensor(self) -> QuantizedTensor:
        """The codes and scales that the module was made from, on the CPU."""
        codes = self.integers().to(torch.int32).cpu().view(self.weight_shape)
        scale = self.scale.float().cpu()
        return QuantizedTensor(codes, scale, self.bits, self.layout, self.granularity, self.group_size)

    def forward(self, placeholder: Tensor) -> Tensor:
        """The dequantized weight, in the dtype of the placeholder that has taken the place of the parameter."""
        codes = self.integers().to(placeholder.dtype)
        scale = self.scale.to(placeholder.dtype)
        parts = []
        for offset, shape, scale_offset, scale_shape in self.segments:
            piece = codes[offset : offset + math.prod(shape)].view(shape)
            step = scale[scale_offset : scale_offset + math.prod(scale_shape)].view(scale_shape)
            parts.append((piece * step).reshape(-1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.weight_shape)


def widen_codes(model: torch.nn.Module) -> None:
    """`PackedWeight.widen` for all packed weights of a model, in place: a compiled model reads codes in every step."""
    for module in model.modules():
        if is_kind(module, PackedWeight):
            module.widen()
