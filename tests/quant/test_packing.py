import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kestrel.quant.packing import WeightCodes, code_range, encode, pack, unpack


@st.composite
def codes_at_bits(draw):
    bits = draw(st.integers(1, 16))
    low, high = code_range(bits)
    allowed = st.sampled_from([-1, 1]) if bits == 1 else st.integers(low, high)
    return bits, draw(st.lists(allowed, max_size=70))


@given(codes_at_bits())
def test_unpack_is_the_inverse_of_pack(case):
    bits, codes = case
    data = pack(codes, bits)
    assert len(data) == math.ceil(len(codes) * bits / 8)
    back = unpack(data, bits, len(codes))
    assert back.tolist() == codes
    assert back.dtype == (np.int8 if bits <= 8 else np.int16)


def naive_pack(codes, bits):
    """The definition, bit by bit: the number whose bits are the fields, least significant first."""
    number = 0
    for place, code in enumerate(codes):
        number |= ((code < 0) if bits == 1 else code % (1 << bits)) << (place * bits)
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


@given(codes_at_bits())
def test_pack_equals_the_definition(case):
    bits, codes = case
    assert pack(codes, bits) == naive_pack(codes, bits)


@pytest.mark.parametrize(
    ("codes", "bits", "data"),
    [
        ([1, -1, -8, 7], 4, "f178"),  # low half of a byte first
        ([1, -1], 8, "01ff"),
        ([-32768, 32767], 16, "0080ff7f"),
        ([1, -1, -1, 1, 1, 1, 1, 1, -1], 1, "0601"),
        ([3, -4, 0], 3, "2300"),  # 011 100 000 -> 0b00_100_011, then a last byte that begins with 0
        ([], 5, ""),
    ],
)
def test_golden_bytes(codes, bits, data):
    assert pack(codes, bits).hex() == data


@pytest.mark.parametrize(("codes", "bits"), [([8], 4), ([-9], 4), ([0], 1), ([2], 1), ([128], 8)])
def test_a_code_that_does_not_fit_is_refused(codes, bits):
    with pytest.raises(ValueError, match="does not fit"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_are_1_to_16(bits):
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack([1], bits)


@pytest.mark.parametrize("data", [b"\x00", b"\x00\x00\x00"])
def test_unpack_wants_exactly_the_bytes_of_the_codes(data):
    with pytest.raises(ValueError, match="need 2 bytes"):
        unpack(data, 4, 4)


finite = st.floats(-4, 4, width=32)


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5), st.integers(2, 16))
def test_codes_are_within_half_a_step_of_the_weights(rows, bits):
    values = np.array(rows, np.float32)
    group = encode(values, bits)
    high = 2 ** (bits - 1) - 1
    assert group.codes.shape == values.shape and group.scale.shape == (len(rows),)
    assert np.abs(group.codes.astype(int)).max() <= high
    largest = np.abs(values).max(axis=1)
    step = np.where(largest > 0, largest / high, 1.0)
    assert (np.abs(group.decode() - values) <= 0.5001 * step[:, None] + 1e-30).all()


@given(st.integers(2, 8), st.sampled_from([0.2, 1.0, 1.2]), st.data())
def test_weights_on_a_quantisers_grid_are_kept(bits, limit, data):
    half = 2 ** (bits - 1)
    levels = data.draw(st.lists(st.integers(1 - half, half - 1), min_size=1, max_size=20))
    weights = np.array(levels, np.float32) / half * np.float32(limit)
    group = encode(weights, bits, limit)
    assert group.codes.tolist() == levels
    assert group.scale.shape == (1,)
    np.testing.assert_allclose(group.decode(), weights, rtol=3e-7)


def test_each_block_has_its_own_scale():
    values = np.stack([np.full((2, 2), 0.5), np.full((2, 2), 0.01)])
    group = encode(values, 8)
    np.testing.assert_allclose(group.scale, [0.5 / 127, 0.01 / 127], rtol=1e-6)
    assert (group.codes == 127).all()


def test_a_block_of_zeros_stays_zero():
    group = encode(np.zeros((2, 3)), 8)
    assert (group.decode() == 0).all() and np.isfinite(group.scale).all()


def test_one_bit_is_the_sign_and_the_mean_magnitude():
    group = encode(np.array([[0.5, -1.0, 0.0]]), 1)
    assert group.codes.tolist() == [[1, -1, 1]] and group.scale[0] == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_must_be_finite(bad):
    with pytest.raises(ValueError, match="not finite"):
        encode(np.array([0.0, bad]), 8)


@pytest.mark.parametrize(("bits", "expected"), [(4, 5 + 8), (8, 10 + 8), (12, 15 + 8), (16, 20 + 8)])
def test_stored_bytes_are_those_of_packed_codes_and_scales(bits, expected):
    group = encode(np.linspace(-1, 1, 10).reshape(2, 5), bits)
    assert group.stored_bytes == expected == len(group.packed()) + len(group.scale_bytes())


def test_packed_codes_come_back_through_unpack():
    group = encode(np.random.default_rng(0).normal(size=(3, 4, 5)), 6)
    back = unpack(group.packed(), 6, 60).reshape(3, 4, 5)
    assert (WeightCodes(back, group.scale, 6).decode() == group.decode()).all()
