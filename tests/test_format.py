"""The momentum format: an oracle in NumPy written from its definition, its error bound, and its edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import HALF_STEP, assert_same, error_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import lion8bit
from lion8bit import reference
from lion8bit.layout import BLOCK_SIZES, scales_shape

SQUARED_RANGE = {4: np.float32(49), 8: np.float32(16002.25)}


def oracle_dither(scale: np.float32) -> np.float32:
    """u in (-1/2, 1/2) from the low byte of a scale."""
    return np.float32((int(np.float32(scale).view(np.uint32)) % 256 + 0.5) / 256 - 0.5)


def oracle_quantize(row: np.ndarray, block_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """codes and scales of one row, element by element, from the definition."""
    codes, scales = [], []
    for start in range(0, len(row), block_size):
        block = row[start : start + block_size]
        scale = np.float32(np.abs(block).max())
        if scale < np.float32(2.0**-100):
            scale = np.float32(0)
        u = oracle_dither(scale)
        gain = SQUARED_RANGE[bits] / scale if scale else np.float32(0)
        for m in block:
            scaled = np.float32(np.abs(m) * gain)
            level = np.float32(np.copysign(np.sqrt(scaled), m) + u)
            codes.append(int(np.rint(level)))
        scales.append(scale)
    return np.array(codes, dtype=np.int8), np.array(scales, dtype=np.float32)


def oracle_dequantize(codes: np.ndarray, scales: np.ndarray, block_size: int, bits: int) -> np.ndarray:
    values = []
    for index, code in enumerate(codes):
        scale, u = scales[index // block_size], oracle_dither(scales[index // block_size])
        t = np.float32(np.float32(code) - u)
        square = np.float32(t * np.abs(t))
        if bits == 4:
            square = np.float32(np.float32(code) * np.abs(np.float32(code) - 2 * u))
        value = np.float32(square * np.float32(scale * np.float32(1 / SQUARED_RANGE[bits])))
        values.append(np.float32(0) if code == 0 else value)
    return np.array(values, dtype=np.float32)


def oracle_pack(codes: np.ndarray) -> np.ndarray:
    padded = [*codes.tolist(), *[0] * (len(codes) % 2)]
    return np.array([low % 16 + high % 16 * 16 for low, high in zip(padded[::2], padded[1::2])], dtype=np.uint8)


MOMENTA = hnp.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-100, 2.0**-101, 2.0**126]),
    ),
)


@settings(max_examples=200, deadline=None)
@given(row=MOMENTA, block_size=st.sampled_from(BLOCK_SIZES), bits=st.sampled_from([4, 8]))
def test_reference_equals_the_oracle(row: np.ndarray, block_size: int, bits: int) -> None:
    codes, scales = lion8bit.quantize(torch.from_numpy(row), block_size, bits)
    expected_codes, expected_scales = oracle_quantize(row, block_size, bits)
    stored = torch.from_numpy(oracle_pack(expected_codes))[None] if bits == 4 else torch.from_numpy(expected_codes)
    assert_same(codes, stored, "codes")
    assert_same(scales[0], torch.from_numpy(expected_scales), "scales")
    decoded = lion8bit.dequantize(codes, scales, block_size, row.shape)
    expected = oracle_dequantize(expected_codes, expected_scales, block_size, bits)
    assert_same(decoded, torch.from_numpy(expected), "momentum")


# The largest error of one element, in units of its block's scale. In the square-root domain the code is within half a
# step, so with r = sqrt(|m|/s) and h = 1/(2A) the decoded value is within (r+h)^2 - r^2 = 2rh + h^2 of m, s times that.
# With 4 bits u^2 is subtracted, which is at most h^2 in these units and only makes the value smaller.
# fp32 rounds six times on the way, each by 2^-24 relative to at most (1 + h)^2: 16 units of 2^-24 cover them.


@settings(max_examples=200, deadline=None)
@given(row=MOMENTA, block_size=st.sampled_from(BLOCK_SIZES), bits=st.sampled_from([4, 8]))
def test_error_is_within_the_bound(row: np.ndarray, block_size: int, bits: int) -> None:
    momentum = torch.from_numpy(row)[None]
    codes, scales = reference.encode(momentum, block_size, bits)
    error = (reference.decode(codes, scales, block_size, row.size).double() - momentum.double()).abs()
    assert bool((error <= error_bound(momentum, scales, block_size, bits)).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_error_bound_is_tight(bits: int) -> None:
    """Some element comes within 2 % of the bound, so that the test above could fail."""
    momentum = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = reference.encode(momentum, 128, bits)
    error = (reference.decode(codes, scales, 128, 128).double() - momentum.double()).abs()
    assert float((error / error_bound(momentum, scales, 128, bits)).max()) > 0.98


def test_4_bits_have_no_bias() -> None:
    """The mean over all 256 dithers is the momentum, up to the steps of the dither, at every magnitude and sign.

    With y = 7*sqrt(m/s) the mean of the decoded values is s/49 times the square of y, rounded to a multiple of 1/256.
    """
    byte = torch.arange(256, dtype=torch.int32)[:, None]
    scales = (torch.tensor([[0.75]]).view(torch.int32) & ~0xFF | byte).view(torch.float32)
    level = torch.linspace(0, 7, 3001)[1:-1].double()
    for sign in (1, -1):
        momentum = torch.cat([torch.full((256, 1), 1.0).double(), sign * (level / 7).square().expand(256, -1)], 1)
        rows = (momentum * scales.double()).float()
        rows[:, 0] = scales[:, 0]
        codes, found = reference.encode(rows, 4096, 4)
        assert_same(found, scales, "scales")
        mean = (reference.decode(codes, scales, 4096, 3000).double() / scales.double()).mean(0)[1:] * 49
        assert bool(((mean - sign * level.square()).abs() <= level / 256 + 2.0**-17).all())


@pytest.mark.parametrize("cols", [1, 2, 63, 64, 65, 200])
def test_two_codes_in_a_byte(cols: int) -> None:
    """The first one in the low half; an odd row ends with half a byte of 0."""
    codes = torch.randint(-7, 8, (5, cols), dtype=torch.int8, generator=torch.Generator().manual_seed(cols))
    packed = reference.packed(codes)
    assert packed.shape == (5, -(-cols // 2)) and packed.dtype == torch.uint8
    assert_same(reference.unpacked(packed, cols), codes, "codes")
    assert torch.equal(packed[:, 0] % 16, codes[:, 0] % 16)
    assert cols % 2 == 0 or not (packed[:, -1] // 16).any()


def test_error_is_unbiased() -> None:
    """Over blocks with independent scales the mean error is zero within 5 standard errors, at every magnitude."""
    generator = torch.Generator().manual_seed(0)
    for fraction in (0.003, 0.05, 0.4, 0.9):
        momentum = torch.full((40000, 64), fraction)
        momentum[:, 0] = 1.0
        momentum *= torch.rand(40000, 1, generator=generator) + 0.5
        codes, scales = reference.encode(momentum, 64)
        error = ((reference.decode(codes, scales, 64) - momentum) / scales)[:, 1].double()
        # In the root domain the error is uniform; squaring adds its variance, s/(12 A^2), which is far below a step.
        expected = HALF_STEP[8] ** 2 / 3 if fraction > HALF_STEP[8] ** 2 else 0.0
        assert abs(float(error.mean()) - expected) < 5 * float(error.std()) / math.sqrt(len(error))


@settings(max_examples=300, deadline=None)
@given(
    bits=st.integers(int(np.float32(2.0**-98).view(np.uint32)), int(np.float32(2.0**126).view(np.uint32))),
    beta=st.sampled_from([0.5, 0.9, 0.99, 0.999, 0.9999]),
)
def test_a_decayed_scale_keeps_its_dither(bits: int, beta: float) -> None:
    """Its low byte stays, so codes mean the same; the value is within 2^-16 of the exact one, and goes down."""
    scale = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    decayed = reference.decayed_scale(scale, beta)
    assert int(decayed.view(torch.int32)) % 256 == bits % 256
    exact = float(scale) * beta
    assert abs(float(decayed) - exact) <= exact * 2.0**-16 * (1 + 2.0**-7)
    assert float(decayed) < float(scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_code_0_is_zero(block_size: int, bits: int) -> None:
    """Beside a large element, small ones are either 0 or have their own sign: the dither alone is never read."""
    generator = torch.Generator().manual_seed(0)
    smallest = {4: 5, 8: 8}[bits]
    momentum = torch.randn(200, block_size, generator=generator)
    momentum *= 10.0 ** -torch.linspace(smallest - 5, smallest, 200)[:, None]
    momentum[:, 0] = 1.5 * momentum.abs().amax(1).clamp(min=1) * (1 + torch.rand(200, generator=generator))
    codes, scales = reference.encode(momentum, block_size, bits)
    decoded = reference.decode(codes, scales, block_size, block_size)
    codes = reference.unpacked(codes, block_size) if bits == 4 else codes
    assert torch.equal(decoded == 0, codes == 0) and 0.2 < float((codes == 0).float().mean()) < 0.8
    assert bool((decoded * momentum >= 0).all())


def test_zero_is_exact_and_tiny_blocks_vanish() -> None:
    momentum = torch.tensor([[0.0, -0.0, 1.0, -1.0], [2.0**-101, -(2.0**-102), 0.0, 1e-45]])
    codes, scales = reference.encode(momentum, 64)
    decoded = reference.decode(codes, scales, 64)
    assert codes[0, :2].tolist() == [0, 0] and codes[1].tolist() == [0] * 4
    assert decoded[0, :2].tolist() == [0.0, 0.0] and decoded[1].tolist() == [0.0] * 4
    assert scales[1].item() == 0.0


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_any_magnitude_survives(block_size: int) -> None:
    """The relative error does not depend on the magnitude, from 2^-100 to 2^126."""
    momentum = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    for exponent in (-99, -60, -20, 0, 60, 120):
        scaled = momentum * 2.0**exponent
        decoded = reference.decode(*reference.encode(scaled, block_size), block_size).double()
        assert float((decoded - scaled.double()).norm() / scaled.double().norm()) < 0.01


@pytest.mark.parametrize("cols", [40, 70])
def test_a_used_row_does_not_touch_its_neighbours(cols: int) -> None:
    momentum = torch.zeros(5, cols)
    momentum[2] = torch.randn(cols)
    codes, scales = lion8bit.quantize(momentum, 64)
    assert scales.count_nonzero() == -(-cols // 64)
    assert not codes[[0, 1, 3, 4]].any()


NARROW = [(90, 1), (45, 2), (7, 3, 3), (1, 50), (3, 63), (0, 5), (5, 0), (2, 1, 9, 3)]


@pytest.mark.parametrize("shape", NARROW, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_shorter_than_a_block_are_one_row(shape: tuple[int, ...], transposed: bool) -> None:
    """Codes and scales are those of the elements as a vector in memory order."""
    momentum = torch.randn(shape)
    tensor = momentum.permute(*reversed(range(len(shape)))) if transposed else momentum
    codes, scales = lion8bit.quantize(tensor, 64)
    flat_codes, flat_scales = lion8bit.quantize(momentum.flatten(), 64)
    assert codes.shape == tensor.shape and codes.stride() == tensor.stride()
    in_memory = codes.permute(*reversed(range(len(shape)))) if transposed else codes
    assert_same(in_memory.flatten(), flat_codes, "codes")
    assert_same(scales.flatten(), flat_scales[0], "scales")
    decoded = lion8bit.dequantize(codes, scales, 64)
    assert decoded.stride() == tensor.stride()
    expected = lion8bit.dequantize(flat_codes, flat_scales, 64).view(shape)
    assert_same(decoded.permute(*reversed(range(len(shape)))) if transposed else decoded, expected, "momentum")


@pytest.mark.parametrize("shape", [(90, 1), (45, 2), (3, 63), (64, 64), (33, 65)], ids=str)
def test_a_scale_for_each_narrow_row_is_understood(shape: tuple[int, int]) -> None:
    """As format version 2 had them."""
    momentum = torch.randn(shape)
    codes, scales = reference.encode(momentum, 64)
    assert scales.shape == (shape[0], -(-shape[1] // 64))
    expected = reference.decode(codes, scales, 64)
    assert_same(lion8bit.dequantize(codes.contiguous(), scales, 64), expected, "momentum")


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.one_of(st.integers(1, 4), st.sampled_from([63, 127, 128, 129, 255, 257, 8192])), max_size=3),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_state_is_never_larger_than_fp32(shape: list[int], block_size: int) -> None:
    """From two elements on, which is below any sensible min_8bit_size."""
    blocks, elements = math.prod(scales_shape(shape, block_size)), math.prod(shape)
    assert blocks * block_size >= elements
    assert elements + 4 * blocks <= 4 * max(2, elements)
    if len(shape) > 1 and math.prod(shape[1:]) < block_size:
        assert blocks == -(-elements // block_size)


@pytest.mark.parametrize(
    ("tensor", "scales_shape"),
    [
        (torch.randn(300), (1, 5)),
        (torch.randn(()), (1, 1)),
        (torch.randn(4, 1, 130), (4, 3)),
        (torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last), (16, 2)),
        (torch.randn(16, 7, 3, 3).to(memory_format=torch.channels_last), (16,)),
        (torch.randn(50, 70).t(), (50, 2)),
        (torch.randn(50, 60).t(), (47,)),
        (torch.randn(3, 200).bfloat16(), (3, 4)),
        (torch.randn(0, 5), (0,)),
        (torch.randn(0, 64), (0, 1)),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}" if isinstance(t, torch.Tensor) else str(t),
)
def test_quantize_keeps_shape_and_memory_order(tensor: torch.Tensor, scales_shape: tuple[int, ...]) -> None:
    codes, scales = lion8bit.quantize(tensor, 64)
    decoded = lion8bit.dequantize(codes, scales, 64)
    assert codes.shape == tensor.shape and codes.stride() == tensor.stride()
    assert scales.shape == scales_shape
    largest = float(tensor.float().abs().amax()) if tensor.numel() else 0.0
    assert torch.allclose(decoded, tensor.float(), rtol=0, atol=1.01 * largest * (2 * HALF_STEP[8] + HALF_STEP[8] ** 2))


def test_quantize_refuses() -> None:
    with pytest.raises(ValueError, match="block_size must be one of"):
        lion8bit.quantize(torch.ones(4), 100)
    with pytest.raises(ValueError, match="finite"):
        lion8bit.quantize(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TypeError, match="floating-point"):
        lion8bit.quantize(torch.ones(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"pass momentum.contiguous\(\)"):
        lion8bit.quantize(torch.randn(4, 10)[:, ::2])
    codes, scales = lion8bit.quantize(torch.randn(2, 300), 128)
    with pytest.raises(ValueError, match="scales must be"):
        lion8bit.dequantize(codes, scales, 64)
    with pytest.raises(TypeError, match="int8"):
        lion8bit.dequantize(codes.float(), scales, 128)


@settings(max_examples=300, deadline=None)
@given(value=st.floats(width=32, allow_nan=True), random=st.integers(0, 65535))
def test_16_bit_rounding(value: float, random: int) -> None:
    """Stochastic rounding gives one of the two neighbours, and leaves exact values alone."""
    x = torch.tensor([value], dtype=torch.float32)
    bits = torch.tensor([random])
    for dtype, convert in ((torch.bfloat16, reference.to_bfloat16), (torch.float16, reference.to_float16)):
        rounded, nearest = convert(x, bits), x.to(dtype)
        if math.isnan(value):
            assert bool(rounded.isnan())
        elif math.isinf(value):
            assert_same(rounded, nearest, str(dtype))
        else:
            exact = nearest.float().item()
            if exact == value:
                assert_same(rounded, nearest, f"exact {dtype}")
            elif math.isfinite(exact):
                step = torch.nextafter(nearest, torch.tensor(math.copysign(math.inf, value - exact), dtype=dtype))
                assert rounded.item() in (nearest.item(), step.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_stays_put(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    convert = reference.to_bfloat16 if dtype == torch.bfloat16 else reference.to_float16
    for random in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        assert_same(convert(values, torch.full(values.shape, random)).float(), values, f"random {random}")


@pytest.mark.parametrize("value", [0.1, -3.3e-5, 2.0e-6, 1.5e-8, 1.0001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(value: float, dtype: torch.dtype) -> None:
    """The mean over all 2^16 random numbers is the value, up to the 2^-14 of a step that the random bits resolve."""
    x = torch.full((1 << 16,), value)
    convert = reference.to_bfloat16 if dtype == torch.bfloat16 else reference.to_float16
    rounded = convert(x, torch.arange(1 << 16)).double()
    step = float(rounded.max() - rounded.min())
    assert abs(float(rounded.mean()) - float(x[0])) <= max(step, 2.0**-24 if dtype == torch.float16 else 0) * 2.0**-13


def test_random_bits_are_uniform_and_independent() -> None:
    """Mean, variance and correlations of the 16-bit numbers across elements, rows, steps and parameters.

    Each statistic is normal to high accuracy with n = 2^18; 5 sigma on 9 of them fails by chance once in 190,000.
    """
    n, cols = 1 << 18, 4096

    def draw(seed: int, step: int) -> torch.Tensor:
        bits = reference.random_bits((n // cols, cols), seed=seed, step=step, first=0, row_stride=cols)
        return (bits.double().flatten() - 32767.5) / 65536

    base, sigma = draw(7, 1), math.sqrt(1 / 12)
    assert abs(float(base.mean())) < 5 * sigma / math.sqrt(n)
    assert abs(float(base.square().mean()) - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    others = [draw(7, 2), draw(8, 1), draw(0, 1), draw(7, 0xFFFFFFFF)]
    pairs = [(base, other) for other in others] + [(base[:-k], base[k:]) for k in (1, 2, 128, cols)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 5 / 12 / math.sqrt(len(one))
