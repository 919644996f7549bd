"""Exact conversion of signed integer codes to bytes and back.

===========  ======================================================  ===============
bits         bytes                                                   unpacked dtype
===========  ======================================================  ===============
4            two codes per byte, the first in the low four bits      int8
8            one code per byte                                       int8
16           all high planes, then all low planes, a byte each       int16
other        a stream of bits, the lowest of the first code first    int8 or int16
===========  ======================================================  ===============

**Planes.** A code of up to 16 bits is ``256 * hi + lo`` with *both* planes signed int8, so that either can
be an operand of an int8 matrix product. A signed low plane shifts the range by half a byte: the codes from
-32896 to 32639 can be split, those from 32640 to 32767 cannot. A symmetric 16-bit grid for matrix products
must therefore stop at `PLANES_MAX`. Codes of 17 to 24 bits, which features have and files do not, take three planes,
``65536 * hi + 256 * middle + lo``; a symmetric grid of 24 bits stops at 8355711 (`planes_max`).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IntegerArray = Tensor | np.ndarray


def planes_max(planes: int) -> int:
    """Largest integer that so many signed int8 planes can hold: 127, 32639, 8355711, ..."""
    return 127 * (256**planes - 1) // 255


PLANES_MIN = -128 * 256 - 128
"""Smallest integer that two signed int8 planes can hold, -32896."""

PLANES_MAX = planes_max(2)
"""Largest integer that two signed int8 planes can hold, 32639."""


def pack_int4(codes: IntegerArray) -> Tensor:
    """Pack two 4-bit codes per byte, the first in the low four bits; a zero completes an odd number of codes.

    Args:
        codes: integers in [-8, 7], any shape, taken in row-major order.

    Returns:
        uint8, shape (ceil(numel / 2),).

    Raises:
        ValueError: not integers, or a code out of range.
    """
    flat = _integers(codes, -8, 7, "4-bit packing").to(torch.int8).reshape(-1)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    low, high = (flat.view(torch.uint8) & 15).view(-1, 2).unbind(1)
    return low | (high << 4)


def unpack_int4(packed: IntegerArray, numel: int) -> Tensor:
    """Inverse of `pack_int4`.

    Args:
        packed: uint8, shape (ceil(numel / 2),).
        numel: number of codes.

    Returns:
        int8 codes in [-8, 7], shape (numel,).

    Raises:
        ValueError: wrong dtype, or a number of bytes that does not fit ``numel``.
    """
    data = _bytes(packed, (numel + 1) // 2, f"{numel} codes of 4 bits")
    nibbles = torch.stack((data & 15, data >> 4), dim=1).reshape(-1)[:numel].view(torch.int8)
    # Two's complement of four bits: 8 ... 15 stand for -8 ... -1.
    return (nibbles ^ 8) - 8


def split_planes(codes: IntegerArray, check: bool = True, planes: int = 2) -> tuple[Tensor, ...]:
    """Split codes into signed int8 planes with ``codes == 256 * hi + lo`` exactly, or the same with three planes.

    Args:
        codes: integers in [-32896, 32639] (`PLANES_MIN`, `PLANES_MAX`), any shape; in [-8421504, 8355711] for three
            planes.
        check: False skips the check of the range, for traced or timed code with codes that are clamped already;
            outside the range the high plane wraps around.
        planes: 2 or 3.

    Returns:
        The planes, the highest first, int8, in the shape of ``codes``.

    Raises:
        ValueError: not integers, another number of planes, or a code that the planes cannot hold.
    """
    if planes not in (2, 3):
        raise ValueError(f"codes are split into 2 or 3 planes, not {planes}")
    lowest = -128 * (256**planes - 1) // 255
    rest = _integers(codes, lowest, planes_max(planes), f"{planes} int8 planes", check).to(torch.int32)
    parts = []
    for _ in range(planes - 1):
        higher = (rest + 128) >> 8
        parts.append((rest - (higher << 8)).to(torch.int8))
        rest = higher
    return (rest.to(torch.int8), *reversed(parts))


def join_planes(high: Tensor, *lower: Tensor) -> Tensor:
    """Inverse of `split_planes`.

    Args:
        high: int8, any shape.
        lower: the other planes in falling order, int8, the same shape.

    Returns:
        int32 codes, ``256 * high + low`` for two planes.

    Raises:
        ValueError: a plane is not int8, or the shapes differ.
    """
    codes = torch.zeros(high.shape, dtype=torch.int32, device=high.device)
    for plane in (high, *lower):
        if plane.dtype != torch.int8:
            raise ValueError(f"planes must be int8, got {plane.dtype}; use .view(torch.int8) on bytes")
        if plane.shape != high.shape:
            raise ValueError(f"the planes differ in shape: {tuple(high.shape)} and {tuple(plane.shape)}")
        codes = codes * 256 + plane.to(torch.int32)
    return codes


def packed_bytes(numel: int, bits: int) -> int:
    """Return the number of bytes that `pack` makes of ``numel`` codes.

    Args:
        numel: number of codes.
        bits: bits per code, 2 to 16.

    Returns:
        Number of bytes.

    Raises:
        ValueError: unsupported ``bits``.
    """
    _check_bits(bits)
    return (numel * bits + 7) // 8


def pack(codes: IntegerArray, bits: int) -> Tensor:
    """Pack signed integer codes into bytes, in the layout of the table above.

    16 bits store the full int16 range. The codes from 32640 to 32767 have a high plane that wrapped around, and only
    `unpack` recovers them: code that reads the planes from the bytes needs codes up to `PLANES_MAX`, as `split_planes`
    checks.

    Args:
        codes: integers in [-2**(bits - 1), 2**(bits - 1) - 1], any shape, taken in row-major order.
        bits: bits per code, 2 to 16.

    Returns:
        uint8, shape (`packed_bytes`,).

    Raises:
        ValueError: not integers, a code out of range, or unsupported ``bits``.
    """
    _check_bits(bits)
    flat = _integers(codes, *_code_range(bits), f"{bits}-bit packing").reshape(-1)
    if bits == 4:
        return pack_int4(flat)
    if bits == 8:
        return flat.to(torch.int8).view(torch.uint8)
    if bits == 16:
        return torch.cat(split_planes(flat, check=False)).view(torch.uint8)
    pairs = flat.cpu().numpy().astype("<i2").view(np.uint8).reshape(-1, 2)
    bit_rows = np.unpackbits(pairs, axis=1, bitorder="little")
    return torch.from_numpy(np.packbits(bit_rows[:, :bits], bitorder="little"))


def unpack(packed: IntegerArray, bits: int, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8, one-dimensional.
        bits: bits per code, 2 to 16.
        shape: shape of the codes.

    Returns:
        Codes of that shape, int8 for up to 8 bits and int16 above.

    Raises:
        ValueError: wrong dtype, a number of bytes that does not fit the shape, or unsupported ``bits``.
    """
    _check_bits(bits)
    numel = math.prod(shape)
    data = _bytes(packed, packed_bytes(numel, bits), f"shape {tuple(shape)} with {bits} bits a code")
    if bits == 4:
        codes = unpack_int4(data, numel)
    elif bits == 8:
        codes = data.view(torch.int8)
    elif bits == 16:
        planes = data.view(torch.int8)
        # The conversion to int16 undoes the wrapping of the high plane above PLANES_MAX.
        codes = join_planes(planes[:numel], planes[numel:]).to(torch.int16)
    else:
        bit_rows = np.unpackbits(data.cpu().numpy(), bitorder="little", count=numel * bits).reshape(numel, bits)
        filled = np.zeros((numel, 16), dtype=np.uint8)
        filled[:, :bits] = bit_rows
        wide = np.packbits(filled, axis=1, bitorder="little").view("<i2").reshape(-1).astype(np.int32)
        # Two's complement of `bits` bits.
        sign = 1 << (bits - 1)
        codes = torch.from_numpy((wide ^ sign) - sign).to(torch.int8 if bits < 8 else torch.int16)
    return codes.reshape(tuple(shape))


def _check_bits(bits: int) -> None:
    if bits not in range(2, 17):
        raise ValueError(f"bits per code must be an integer from 2 to 16, got {bits}")


def _code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _integers(codes: IntegerArray, lowest: int, highest: int, purpose: str, check: bool = True) -> Tensor:
    tensor = torch.as_tensor(codes)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ValueError(f"{purpose} takes integer codes, got {tensor.dtype}; round and convert to int32 first")
    if check and tensor.numel():
        smallest, largest = (int(bound) for bound in torch.aminmax(tensor.to(torch.int64)))
        if smallest < lowest or largest > highest:
            culprit = smallest if smallest < lowest else largest
            raise ValueError(f"{purpose} takes codes from {lowest} to {highest}, got {culprit}; clamp the codes")
    return tensor


def _bytes(packed: IntegerArray, expected: int, what: str) -> Tensor:
    data = torch.as_tensor(packed)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"packed codes must be one-dimensional uint8, got {data.dtype} of shape {tuple(data.shape)}")
    if data.numel() != expected:
        raise ValueError(f"{what} takes {expected} bytes, got {data.numel()}; check the shape and the bits")
    return data.contiguous()
