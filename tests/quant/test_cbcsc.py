"""CBCSC, memory images and the EdgeDRNN layout: exact round trips, naive references, sizes of what is stored."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.quant import cbcsc, edgedrnn
from kestrel.quant.memory_image import c_arrays, hex_image, read_c_array, read_hex_image


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(codes, PEs, bits) of any sparsity."""
    pes, local, columns = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    bits = draw(st.integers(2, 16))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (pes * local, columns))
    return codes * (rng.random(codes.shape) < draw(st.floats(0, 1))), pes, bits


@settings(max_examples=80, deadline=None)
@given(matrices(), st.integers(0, 3))
def test_round_trips_are_exact(case: tuple[np.ndarray, int, int], more: int) -> None:
    codes, pes, bits = case
    packed = cbcsc.encode(codes, pes, bits)
    assert np.array_equal(cbcsc.decode(packed), codes)
    assert packed.shape == codes.shape and packed.pes == pes
    beats = min(packed.beats + more, len(codes) // pes)
    padded = cbcsc.encode(codes, pes, bits, beats)
    assert padded.beats == beats and np.array_equal(cbcsc.decode(padded), codes)
    again = cbcsc.Cbcsc.of_bytes(padded.value_bytes(), padded.index_bytes(), padded.values.shape, len(codes), bits)
    assert np.array_equal(again.values, padded.values) and np.array_equal(again.local, padded.local)
    joined = cbcsc.Cbcsc.of_words(padded.words(), len(codes), bits)
    assert np.array_equal(joined.values, padded.values) and np.array_equal(joined.local, padded.local)
    word_bits = bits + padded.index_bits
    image = hex_image(padded.words(), word_bits)
    words = read_hex_image(image, word_bits).reshape(padded.values.shape)
    assert np.array_equal(cbcsc.decode(cbcsc.Cbcsc.of_words(words, len(codes), bits)), codes)
    delta = np.random.default_rng(0).integers(-9, 9, codes.shape[1]) * (np.arange(codes.shape[1]) % 2)
    assert np.array_equal(cbcsc.product(padded, delta), codes @ delta)


def test_layout_by_hand() -> None:
    """Rows 0 and 2 belong to PE 0, rows 1 and 3 to PE 1."""
    packed = cbcsc.encode(np.array([[0, 5], [1, 0], [7, 0], [0, 0]]), 2)
    assert packed.beats == 1 and packed.index_bits == 1
    assert packed.values.tolist() == [[[7, 1]], [[5, 0]]]
    assert packed.local.tolist() == [[[1, 0]], [[0, 0]]]
    assert packed.words().tolist() == [[[15, 2]], [[10, 0]]]


def test_sizes_of_the_published_example() -> None:
    """R = 4096, M = 64, L = 64, gamma 15/16: K = 4, indices of 6 bits; 14 bits instead of 128 for each 16 weights."""
    rng = np.random.default_rng(0)
    codes = np.zeros((4096, 8), np.int64)
    for column in range(8):
        for pe in range(64):
            codes[pe + 64 * rng.permutation(64)[:4], column] = rng.integers(1, 128, 4)
    packed = cbcsc.encode(codes, 64)
    assert (packed.beats, packed.index_bits) == (4, 6)
    assert len(packed.value_bytes()) == 8 * 4 * 64 and len(packed.index_bytes()) == 8 * 4 * 64 * 6 // 8
    assert (codes == 0).mean() == 15 / 16


def test_what_cannot_be_encoded() -> None:
    codes = np.ones((8, 2), np.int64)
    for arguments, text in (
        ((codes, 3), "8 rows cannot be spread over 3"),
        ((codes * 200, 2), "does not fit in 8 bits"),
        ((codes, 2, 8, 3), "up to 4 of 4"),
        ((codes, 2, 8, 5), "bursts of 5 beats"),
        ((codes * 0.5, 2), "integer codes"),
    ):
        with pytest.raises(ValueError, match=text):
            cbcsc.encode(*arguments)
    packed = cbcsc.encode(codes, 2)
    with pytest.raises(ValueError, match="need 2 bytes"):
        cbcsc.unpack_unsigned(packed.index_bytes() + b"0", 2, 8)
    with pytest.raises(ValueError, match="does not fit in 2 bits"):
        cbcsc.pack_unsigned([4], 2)
    assert cbcsc.encode(np.zeros((4, 2), np.int64), 4).index_bytes() == b"", "one row in each element needs no index"


def test_hex_images() -> None:
    assert hex_image([-1, 127, -128], 8) == "FF\n7F\n80\n"
    assert hex_image([-1, 5], 12) == "0FFF\n0005\n" and hex_image([-2], 20) == "000FFFFE\n"
    assert hex_image([255], 8) == "FF\n" and read_hex_image("FF\n", 8, signed=False).tolist() == [255]
    for codes, bits, text in (([256], 8, "does not fit"), ([-1, 200], 8, "neither"), ([1], 33, "1 to 32 bits")):
        with pytest.raises(ValueError, match=text):
            hex_image(codes, bits)
    with pytest.raises(ValueError, match="more than 8 bits"):
        read_hex_image("1FF\n", 8)


def test_c_arrays_come_back_and_compile(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    matrix, vector, deep = rng.integers(-8, 8, (7, 9)), rng.integers(-9999, 9999, 30), rng.integers(-2, 2, (2, 3, 4))
    arrays = {"w": (matrix, 4), "bias": (vector, 16), "val": (deep, 32)}
    header, source = c_arrays("params", arrays, {"PES": 8})
    for key, (codes, _) in arrays.items():
        assert np.array_equal(read_c_array(source, key, np.shape(codes)), codes)
    assert "#define W_ROWS 7" in header and "extern const int8_t w[W_ROWS * W_COLUMNS];" in header
    assert "const int16_t bias[" in source and "const int32_t val[" in source
    with pytest.raises(ValueError, match="does not fit in 4 bits"):
        c_arrays("params", {"w": (matrix * 9, 4)})
    with pytest.raises(ValueError, match="no array x"):
        read_c_array(source, "x", (1,))
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "params.h").write_text(header)
    (tmp_path / "params.c").write_text(source)
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "params.h"\nint main(void){for(int k=0;k<W_ROWS*W_COLUMNS;k++)'
        'printf("%d ",w[k]);printf("%d",PES);return 0;}\n'
    )
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "params.c", "main.c", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.split()
    assert [int(word) for word in told] == [*matrix.reshape(-1, order="F"), 8]


@settings(max_examples=30, deadline=None)
@given(inputs=st.integers(1, 20), hidden=st.integers(1, 6), pes=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_edgedrnn_layers_come_back(inputs: int, hidden: int, pes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(-128, 128, shape) for shape in ((3 * hidden,), (3 * hidden, inputs), (3 * hidden, hidden))]
    matrix = edgedrnn.layer_matrix(*parts, pes)
    assert matrix.shape == (3 * hidden, 1 + -(-inputs // pes) * pes + hidden)
    assert not matrix[:, 1 + inputs : matrix.shape[1] - hidden].any()
    stream = read_hex_image(hex_image(matrix.T, 8), 8)
    again = edgedrnn.split_layer(stream.reshape(matrix.shape, order="F"), inputs, pes)
    for one, other in zip(again, parts, strict=True):
        assert np.array_equal(one, other)
    codes = rng.integers(-128, 128, (5, inputs))
    blocks = edgedrnn.stimuli(codes, pes)
    assert blocks.shape[2] == 8 and np.array_equal(blocks.reshape(5, -1)[:, :inputs], codes)


def test_edgedrnn_registers_and_tables() -> None:
    made = edgedrnn.registers(0x1000, 64, 32, 41, [768, 768], 8)
    assert made[:7].tolist() == [0x1000, 64, 32, 2, 48, 768, 768] and not made[7:].any() and len(made) == 32
    with pytest.raises(ValueError, match="28 layers"):
        edgedrnn.registers(0, 0, 0, 8, [16] * 28, 8)
    with pytest.raises(ValueError, match="rows differ"):
        edgedrnn.layer_matrix(np.zeros(3), np.zeros((4, 2)), np.zeros((3, 3)), 2)
    sigmoid, tanh = edgedrnn.activation_tables(8, 8, 8)
    assert len(sigmoid) == 16 * 256 and len(tanh) == 8 * 256
    assert sigmoid[8 * 256] == 128 and tanh[4 * 256] == 0
    assert sigmoid[9 * 256] == round(256 / (1 + np.exp(-1))) and tanh[3 * 256] == round(-256 * np.tanh(1))
    assert len(edgedrnn.activation_tables(3, 5, 6)[0]) == 256, "Q3.5 reaches from -4 to 4"
