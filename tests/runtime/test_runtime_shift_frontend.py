"""The C shift-add front end against its integer model, bit by bit, on extreme, random and real clips."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kestrel.frontend import shift_add_c
from kestrel.frontend.shift_add import ShiftAddFeatures, shift_add_codes
from kestrel.frontend.spec import FrontendSpec
from tests.runtime.test_runtime_frontend import (
    COMPILER,
    INCLUDE,
    ROOT,
    SANITIZERS,
    WARNINGS,
    extreme_clips,
    random_clips,
    real_clips,
    spec_of,
)

DRIVER = Path(__file__).with_name("shift_frontend_driver.c")
SOURCE = ROOT / "runtime" / "src" / "kestrel_shift_frontend.c"
PLAIN = spec_of("tinyspeech_mcu")
OTHER = dataclasses.replace(
    PLAIN, sample_rate=8000, decimation=1, hop=256, mel_bands=7, f_min=300, f_max=4000, log_floor=1e-6
)

pytestmark = pytest.mark.skipif(
    COMPILER is None and not os.environ.get("CI"), reason="no C compiler: install gcc to compare the C front end"
)


def run(spec: FrontendSpec, clips: np.ndarray, folder: Path) -> np.ndarray:
    """Features of the C front end, built with sanitizers: int16 [clips, T, F]."""
    assert COMPILER is not None, "CI needs gcc"
    shift_add_c.write_header(ShiftAddFeatures(spec).tables, folder / shift_add_c.HEADER_NAME)
    command = [COMPILER, *WARNINGS, *SANITIZERS, f"-I{folder}", f"-I{INCLUDE}", str(SOURCE), str(DRIVER)]
    done = subprocess.run([*command, "-o", str(folder / "driver")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = [str(folder / "driver"), str(len(clips)), str(clips.shape[1])]
    ran = subprocess.run(words, input=clips.astype("<i2").tobytes(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()[-3000:]
    return np.frombuffer(ran.stdout, "<i2").reshape(len(clips), -1, spec.mel_bands)


@pytest.mark.parametrize("spec", [PLAIN, OTHER], ids=["tinyspeech_mcu", "8 kHz"])
def test_features_are_identical(spec: FrontendSpec, tmp_path: Path) -> None:
    clips = [extreme_clips(), random_clips(24), np.random.default_rng(1).integers(-32768, 32768, (8, 16000))]
    real = real_clips(24)
    every = np.concatenate([*clips, *([] if real is None else [real])]).astype(np.int16)
    wanted = shift_add_codes(spec, every)
    got = run(spec, every, tmp_path)
    assert got.shape == wanted.shape
    assert np.array_equal(got, wanted), np.argwhere(got != wanted)[:3]


def test_headers_are_the_same_bytes() -> None:
    first, second = (shift_add_c.header(ShiftAddFeatures(PLAIN).tables) for _ in range(2))
    assert first == second and "KSF_HOP 160" in first
