"""Streamed networks in C: logits equal to the graph's, frame by frame, with sanitizers; packing and straight-line code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kestrel.export.stream_c import choose_straight, stream_model
from kestrel.export.stream_pack import pack_matrix, straight_cost, straight_lines
from kestrel.export.stream_writer import digit_code
from kestrel.lower.narrow import narrow_form
from kestrel.lower.stream import stream_program
from kestrel.lower.tensor import Constant
from tests.lower.stream_kit import Maker, picture, spotter, weights

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("stream_driver.c")
INCLUDE, KERNELS = ROOT / "runtime" / "include", ROOT / "runtime" / "src" / "kestrel_stream.c"
WARNINGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror"]
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = pytest.mark.skipif(
    COMPILER is None and not os.environ.get("CI"), reason="no C compiler: install gcc to run streamed networks in C"
)


def compiled(files: dict[str, str], sources: list[Path], folder: Path, options: list[str] = SANITIZERS) -> Path:
    assert COMPILER is not None, "CI needs gcc"
    for name, text in files.items():
        (folder / name).write_text(text)
    made = [folder / name for name in files if name.endswith(".c")]
    command = [COMPILER, *WARNINGS, *options, f"-I{folder}", f"-I{INCLUDE}", *map(str, [*made, *sources])]
    done = subprocess.run([*command, "-o", str(folder / "program")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def logits_in_c(maker: Maker, features: np.ndarray, straight: int, folder: Path) -> np.ndarray:
    program = stream_program(narrow_form(maker.graph))
    model = stream_model(program, straight=choose_straight(program, straight))
    path = compiled(model.files, [KERNELS, DRIVER], folder)
    ran = subprocess.run([str(path)], input=features.astype("<i2").tobytes(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    return np.frombuffer(ran.stdout, "<i4").reshape(len(features), -1)


CASES = {
    "int4": lambda: spotter(0, channels=10, wide=18),
    "odd4": lambda: spotter(1, "odd4", channels=9, wide=20),
    "odd2": lambda: spotter(2, "odd2", channels=12, wide=15),
    "ternary": lambda: spotter(3, "ternary", channels=11, wide=14),
    "binary": lambda: spotter(4, "binary", channels=8, wide=13),
    "int6": lambda: spotter(5, "int6", channels=7, wide=9),
    "odd8": lambda: spotter(6, "odd8", channels=6, wide=11),
    "picture": picture,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("straight", [0, 100_000], ids=["tables", "straight"])
def test_logits_are_identical(name: str, straight: int, tmp_path: Path) -> None:
    maker = CASES[name]()
    features = maker.features_of(12)
    wanted = narrow_form(maker.graph).run(features)["logits"]
    assert np.array_equal(logits_in_c(maker, features, straight, tmp_path), wanted)


def test_segments_give_the_latest_clip_length(tmp_path: Path) -> None:
    """Without a new start, logits after every segment are those of the clip that ends there, but for what came before it."""
    maker = Maker(3, frames=12, width=6)
    maker.finish(maker.pointwise(maker.codes(), 5), 4)  # no memory between columns
    program = stream_program(narrow_form(maker.graph), 3)
    source = DRIVER.read_text().replace("ready = kestrel_stream_column(features, scratch) || ready;", "if (kestrel_stream_column(features, scratch)) { kestrel_stream_logits(scratch, logits); fwrite(logits, sizeof logits, 1, stdout); }")  # fmt: skip
    source = source.replace("if (++frame == KESTREL_STREAM_FRAMES) {", "if (++frame < 0) { (void)ready;")
    path = compiled({**stream_model(program).files, "driver.c": source}, [KERNELS], tmp_path)
    stream = maker.features_of(4).reshape(-1, 6)  # 48 frames
    ran = subprocess.run([str(path)], input=stream.astype("<i2").tobytes(), capture_output=True, check=True)
    found = np.frombuffer(ran.stdout, "<i4").reshape(-1, 4)
    clips = np.stack([stream[start : start + 12] for start in range(0, 37, 4)])
    assert np.array_equal(found, narrow_form(maker.graph).run(clips)["logits"])


def test_the_same_bytes_each_time() -> None:
    first, second = (stream_model(stream_program(narrow_form(spotter(7).graph)), ["yes", "no"]).files for _ in range(2))
    assert first == second


def test_no_float_no_heap_no_library() -> None:
    files = stream_model(stream_program(narrow_form(spotter(7).graph))).files
    text = "".join(files.values()) + KERNELS.read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(float|double|malloc|free|memcpy|memset|memmove)\b", text)


@pytest.mark.parametrize(
    "storage", ["int4", "int3", "odd4", "odd3", "int2", "odd2", "ternary", "binary", "int8", "odd5"]
)
def test_packing_keeps_every_weight(storage: str) -> None:
    rng = np.random.default_rng(0)
    low, high = Constant.range_of(storage)
    values = rng.integers(low, high + 1, (5, 13))
    if storage.startswith(("odd", "binary")):
        values = np.where(values & 1, values, values + 1).clip(low, high)
    packed = pack_matrix(values, storage)
    words = packed.words.astype(np.int64).T  # [outputs, groups]
    nibbles = ((words[..., None] >> (4 * np.arange(4))) & 15).reshape(len(values), -1)
    if packed.kind.endswith("QUAD"):
        digits = (nibbles.reshape(len(values), -1, 4, 1) >> np.arange(4)) & 1  # [outputs, groups, digit, input]
        found = (digits * np.array([1, 2, 4, -8])[:, None]).sum(axis=2).reshape(len(values), -1)
    elif packed.kind.endswith("PAIR"):
        found = np.stack([nibbles & 3, nibbles >> 2], axis=2).reshape(len(values), -1) - 2
    else:
        found = nibbles[:, ::2] + 16 * (nibbles[:, 1::2] - 8)
    found = (2 * found + 1 if packed.odd else found)[:, :13]
    assert np.array_equal(found, values)


def test_digit_codes() -> None:
    for multiplier in [0, 1, -1, 2, 3, 5, -6, 7, 11, 160, -1000, 4096, 0x5001]:
        code = digit_code(multiplier)
        digits = [(code >> (5 * place)) & 31 for place in range(3)]
        assert sum((-1 if digit & 16 else 1) << (digit & 15) for digit in digits) == multiplier
    with pytest.raises(ValueError, match="signed digits"):
        digit_code(0b1010101)


def test_straight_lines_cost_what_they_hold() -> None:
    rng = np.random.default_rng(2)
    ternary, four = weights(rng, (17, 63), "ternary").values, weights(rng, (17, 63), "odd4").values
    assert straight_cost(ternary) / ternary.size < 1.2 and straight_cost(four) / four.size < 2
    wide = weights(rng, (9, 12), "int8").values  # beyond what straight.py searches
    operations = sum(line.count("+") + line.count(" - ") for line in straight_lines(wide, np.arange(9)))
    assert np.count_nonzero(wide) < operations <= straight_cost(wide) + 9
