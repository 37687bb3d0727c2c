"""Every kernel against the integer oracle, through the generator and the compiler, tensor by tensor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import graph_kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kestrel.export.c_check import Toolchain, extremes, run_program, trace
from kestrel.export.c_files import RUNTIME, write_c
from kestrel.export.c_model import generate
from kestrel.export.c_pack import pack_rows
from kestrel.lower.graph import IntegerGraph

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make: apt-get install gcc make"
)
SANITISED = Toolchain("gcc", "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all")


def compare(graph: IntegerGraph, folder: Path, toolchain: Toolchain) -> None:
    """Every tensor of the C model equals the oracle's."""
    model = generate(graph)
    write_c(model, folder)
    codes = extremes(graph)
    expected: dict[str, np.ndarray] = {}
    graph.run(codes, trace=expected)
    actual = trace(model, graph, codes, toolchain, folder)
    missing = {name for name, _, _ in graph.all_tensors()} - set(actual) - {"class"}
    inputs = set(graph.inputs) | {name for op in graph.ops if hasattr(op, "body") for name in op.body.inputs}
    assert missing <= inputs, "a tensor was not traced"
    mismatch = graph.first_mismatch(expected, actual)
    assert mismatch is None, str(mismatch)


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs_of_all_ops_equal_the_oracle(seed: int, tmp_path: Path) -> None:
    compare(graph_kit.random_graph(seed, rounds=3), tmp_path, SANITISED if seed % 2 else Toolchain("gcc", "-O2"))


@pytest.mark.parametrize("flags", ["-O3", "-Os -fno-tree-vectorize", "-O2 -m32"])
def test_every_storage_of_weights_equals_the_oracle(flags: str, tmp_path: Path) -> None:
    if "-m32" in flags and not _links("-m32", tmp_path):
        pytest.skip("this gcc cannot link 32-bit programs")
    compare(graph_kit.all_storages(3), tmp_path, Toolchain("gcc", flags))


def _links(flag: str, folder: Path) -> bool:
    (folder / "probe.c").write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
    command = ["gcc", flag, str(folder / "probe.c"), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_logits_come_clip_by_clip(tmp_path: Path) -> None:
    """What one clip leaves behind does not reach the next one."""
    graph = graph_kit.random_graph(11)
    write_c(generate(graph), tmp_path)
    codes = extremes(graph)
    program = Toolchain("gcc", "-O2").build(tmp_path, "model")
    together = run_program(program, codes)
    np.testing.assert_array_equal(together[::-1], run_program(program, codes[::-1]))
    np.testing.assert_array_equal(together, graph.run(codes)["logits"])


@given(st.integers(0, 2**32 - 1), st.sampled_from(graph_kit.STORAGES), st.integers(1, 4), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_their_values(seed: int, storage: str, rows: int, length: int) -> None:
    values = graph_kit.constant(np.random.default_rng(seed), (rows, length), storage).values
    packed = pack_rows(values, storage)
    np.testing.assert_array_equal(_unpacked(packed, length), values)
    if packed.kind == "KESTREL_TERNARY":
        assert packed.row_bytes == -(-length // 5)


def _unpacked(packed, length: int) -> np.ndarray:
    """Written from kestrel.h, value by value."""
    if packed.kind == "KESTREL_DIRECT":
        return packed.array.astype(np.int64)
    bits = {"KESTREL_INT4": 4, "KESTREL_INT2": 2, "KESTREL_BINARY": 1}.get(packed.kind, packed.field_bits)
    found = []
    for row in packed.array:
        if packed.kind == "KESTREL_TERNARY":
            digits = [(int(byte) * 3 ** (k + 1) // 256) % 3 - 1 for byte in row for k in range(5)]
            found.append(digits[:length])
            continue
        number = int.from_bytes(row.tobytes(), "little")
        fields = [number >> bits * i & (1 << bits) - 1 for i in range(length)]
        if packed.kind == "KESTREL_BINARY":
            found.append([1 - 2 * field for field in fields])
            continue
        signed = [field - (1 << bits) if field >> bits - 1 else field for field in fields]
        found.append([2 * k + 1 for k in signed] if packed.kind == "KESTREL_ODD" else signed)
    return np.array(found)


def test_kernels_use_neither_heap_nor_floating_point(tmp_path: Path) -> None:
    target = tmp_path / "ops.o"
    command = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{RUNTIME / 'include'}"]
    subprocess.run([*command, "-c", str(RUNTIME / "src" / "kestrel_ops.c"), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-u", str(target)], capture_output=True, text=True, check=True).stdout.split()
    used = {name for name in symbols if name != "U"}
    assert used <= {"memcpy", "memset", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}, used
    source = (RUNTIME / "src" / "kestrel_ops.c").read_text()
    assert not any(word in source.replace("floating", "") for word in ("float ", "double ", "malloc"))
