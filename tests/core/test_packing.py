"""Integers to bytes and back: exact round trips, known bytes, and clear refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq.files.packing import (
    PLANES_MAX,
    PLANES_MIN,
    join_planes,
    pack,
    pack_int4,
    packed_bytes,
    planes_max,
    split_planes,
    unpack,
    unpack_int4,
)

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int32)


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, bits=st.integers(2, 16), seed=st.integers(0, 2**31))
def test_round_trip(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(math.prod(shape), bits),)
    restored = unpack(packed, bits, shape)
    assert restored.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert restored.shape == shape
    assert torch.equal(restored.to(torch.int32), codes)


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape).to(torch.int64), codes)


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_layout_of_the_input_does_not_matter(bits: int) -> None:
    codes = random_codes((6, 10), bits, 0)
    for view in (codes.t(), codes[:, ::2], codes[::3].t(), codes.unsqueeze(1).expand(6, 2, 10)):
        packed = pack(view, bits)
        assert torch.equal(packed, pack(view.contiguous(), bits))
        assert torch.equal(unpack(packed, bits, view.shape).to(torch.int32), view)
    spread = torch.zeros(2 * packed_bytes(60, bits), dtype=torch.uint8)
    spread[::2] = pack(codes, bits)
    assert torch.equal(unpack(spread[::2], bits, (6, 10)).to(torch.int32), codes)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_numpy_goes_in_as_well(bits: int) -> None:
    codes = random_codes((3, 5), bits, 0)
    packed = pack(codes.numpy(), bits)
    assert torch.equal(packed, pack(codes, bits))
    restored = unpack(packed.numpy(), bits, (3, 5))
    np.testing.assert_array_equal(restored.numpy(), codes.numpy())


def test_bytes_are_pinned() -> None:
    assert pack_int4(torch.tensor([1, -2, 7, -8, 3])).tolist() == [0xE1, 0x87, 0x03]
    assert pack(torch.tensor([1, -2, 127, -128]), 8).tolist() == [1, 254, 127, 128]
    # 000001, 111110, 011111, 100000, each from its lowest bit on.
    assert pack(torch.tensor([1, -2, 31, -32]), 6).tolist() == [0b10000001, 0b11111111, 0b10000001]
    # 12 bits: 0x12c, 0xed4, 0x0ff and four bits to fill the byte.
    assert pack(torch.tensor([300, -300, 255]), 12).tolist() == [0x2C, 0x41, 0xED, 0xFF, 0x00]
    # Both high planes first: 300 = 256 + 44, -300 = -256 - 44, 255 = 256 - 1.
    assert pack(torch.tensor([300, -300, 255]), 16).tolist() == [1, 255, 1, 44, 212, 255]


@given(numel=st.integers(0, 40), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_int4_round_trip(numel: int, seed: int) -> None:
    codes = random_codes((numel,), 4, seed).to(torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == ((numel + 1) // 2,)
    restored = unpack_int4(packed, numel)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes)
    if numel % 2:
        assert packed[-1] >> 4 == 0


def test_planes_are_exact_over_their_whole_range() -> None:
    codes = torch.arange(PLANES_MIN, PLANES_MAX + 1, dtype=torch.int32)
    assert (PLANES_MIN, PLANES_MAX, len(codes)) == (-32896, 32639, 65536)
    high, low = split_planes(codes)
    assert high.dtype == low.dtype == torch.int8
    assert torch.equal(high.to(torch.int32) * 256 + low.to(torch.int32), codes)
    assert torch.equal(join_planes(high, low), codes)
    assert join_planes(high, low).dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_planes_of_any_integer_dtype_and_shape(dtype: torch.dtype) -> None:
    codes = torch.tensor([[-128, -1, 0], [1, 127, 5]], dtype=dtype).t()
    high, low = split_planes(codes)
    assert high.shape == low.shape == codes.shape
    assert torch.equal(join_planes(high, low), codes.to(torch.int32))


def test_planes_of_int16_do_not_overflow_on_the_way() -> None:
    codes = torch.tensor([32639, -32768], dtype=torch.int16)
    assert torch.equal(join_planes(*split_planes(codes)), codes.to(torch.int32))


@pytest.mark.parametrize("code", [32640, 32767, -32897, 10**6])
def test_planes_refuse_what_they_cannot_hold(code: int) -> None:
    with pytest.raises(ValueError, match=rf"from -32896 to 32639, got {code}"):
        split_planes(torch.tensor([0, code]))


def test_three_planes_hold_codes_of_24_bits() -> None:
    top = planes_max(3)
    assert (planes_max(1), planes_max(2), top) == (127, PLANES_MAX, 8355711)
    lowest = -(1 << 23) - 32896
    codes = torch.cat([torch.arange(lowest, top, 997, dtype=torch.int32), torch.tensor([lowest, -1, 0, 1, top])])
    high, middle, low = split_planes(codes, planes=3)
    assert high.dtype == middle.dtype == low.dtype == torch.int8
    assert torch.equal(high.to(torch.int32) * 65536 + middle.to(torch.int32) * 256 + low.to(torch.int32), codes)
    assert torch.equal(join_planes(high, middle, low), codes)
    for code in (top + 1, lowest - 1):
        with pytest.raises(ValueError, match=rf"3 int8 planes takes codes from {lowest} to {top}, got {code}"):
            split_planes(torch.tensor([code]), planes=3)
    with pytest.raises(ValueError, match="2 or 3 planes, not 4"):
        split_planes(codes, planes=4)
    with pytest.raises(ValueError, match="differ in shape"):
        join_planes(high, middle, low[1:])


def test_unchecked_planes_wrap() -> None:
    high, low = split_planes(torch.tensor([32767]), check=False)
    assert (high.item(), low.item()) == (-128, -1)


def test_packed_planes_are_the_split_planes() -> None:
    codes = random_codes((4, 5), 16, 0).clamp(max=PLANES_MAX)
    high, low = split_planes(codes)
    planes = pack(codes, 16).view(torch.int8)
    assert torch.equal(planes[:20], high.reshape(-1))
    assert torch.equal(planes[20:], low.reshape(-1))


@pytest.mark.parametrize("bits", range(2, 17))
def test_codes_out_of_range_are_named(bits: int) -> None:
    half = 2 ** (bits - 1)
    for code in (half, -half - 1):
        with pytest.raises(ValueError, match=rf"codes from -{half} to {half - 1}, got {code};"):
            pack(torch.tensor([0, code]), bits)


@pytest.mark.parametrize("bits", [-3, 0, 1, 17, 32])
def test_unsupported_bits_are_named(bits: int) -> None:
    for call in (lambda: pack(torch.zeros(2, dtype=torch.int8), bits), lambda: packed_bytes(2, bits)):
        with pytest.raises(ValueError, match=rf"from 2 to 16, got {bits}"):
            call()
    with pytest.raises(ValueError, match=rf"from 2 to 16, got {bits}"):
        unpack(torch.zeros(2, dtype=torch.uint8), bits, (2,))


@pytest.mark.parametrize(("bits", "expected"), [(4, 4), (5, 5), (6, 6), (7, 7), (8, 7), (16, 14)])
def test_wrong_number_of_bytes_is_named(bits: int, expected: int) -> None:
    for count in (expected - 1, expected + 1, 0):
        with pytest.raises(ValueError, match=rf"takes {expected} bytes, got {count}"):
            unpack(torch.zeros(count, dtype=torch.uint8), bits, (7,))
    with pytest.raises(ValueError, match="takes 2 bytes, got 3"):
        unpack_int4(torch.zeros(3, dtype=torch.uint8), 4)


def test_wrong_dtypes_are_named() -> None:
    for values in (torch.zeros(2), torch.zeros(2, dtype=torch.bool), np.zeros(2)):
        for call in (pack_int4, split_planes, lambda codes: pack(codes, 8)):
            with pytest.raises(ValueError, match="takes integer codes"):
                call(values)
    with pytest.raises(ValueError, match="one-dimensional uint8"):
        unpack(torch.zeros(2, dtype=torch.int8), 8, (2,))
    with pytest.raises(ValueError, match="one-dimensional uint8"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 8, (2,))
    with pytest.raises(ValueError, match="planes must be int8"):
        join_planes(torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="differ in shape"):
        join_planes(torch.zeros(2, dtype=torch.int8), torch.zeros(1, 2, dtype=torch.int8))
